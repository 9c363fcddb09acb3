"""Writing results: all of them or none, and never half of one."""

import contextlib
import os
import tempfile
from pathlib import Path

from . import CliError


def prepare_folder(folder: Path, option: str = "--out") -> None:
    """Make `folder` if only its last component is missing; make sure, before any work, that it can be written to."""
    try:
        if not folder.exists():
            if not folder.parent.is_dir():
                raise CliError(f"{option} {folder}: the folder {folder.parent} does not exist; make it first")
            folder.mkdir()
        elif not folder.is_dir():
            raise CliError(f"{option} {folder}: is a file, and a folder is needed")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CliError(f"{option} {folder}: cannot write there: {error.strerror or error}") from error


def write_all(contents: dict[Path, bytes]) -> None:
    """Put every content under its name, or, if any cannot be written (full disk), change none of the files.

    Each content goes to a temporary file in the same folder, onto the disk, and only when all are there over the old
    files (`os.replace` is atomic): a reader, or a killed process, sees a file whole, old or new.
    """
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            staged.append((temporary, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in staged:
            os.replace(temporary, path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}; the files there are unchanged") from error
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
