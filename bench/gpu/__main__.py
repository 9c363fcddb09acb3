import sys

from ...cli import CliError
from .driver import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except CliError as error:
        print(f"fused-inr: error: {error}", file=sys.stderr)
        sys.exit(2)
