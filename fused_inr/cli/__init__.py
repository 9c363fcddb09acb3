"""The command line: `fused-inr fit`, `fused-inr doctor`, `fused-inr bench`.

`main.py` reads the arguments; `fit.py` tells the story of one fit out of `pictures.py` (picture to tensor and back),
`training.py` (model, step, checkpoint), `compare.py` (the same fit elsewhere), `figure.py` and `files.py` (results).
`children.py` runs processes, for the benches too.
Nothing in the rest of the package imports from here.
"""


class CliError(Exception):
    """An error of the user's, in one line: printed on stderr, exit code 2."""
