"""Runs `fused-inr reproduce NAME`: published figures, computed again here, beside what was published.

Each module here holds one: its options, its cells (the pieces of work that a stopped run need not repeat), a table and
a figure of them. `record.py` runs any of them.
"""

#: name on the command line -> module of this folder, and what it does
REPRODUCTIONS = {
    "vi3nr-toy": ("toy", "VI3NR's 100 layers of 1,000 units: errors of variance, forward and backward"),
    "vi3nr-image": ("image", "VI3NR at sigma_p around the solved one against PyTorch's initialisation, on a picture"),
    "siren-init": ("siren", "SIREN with its own and with tuned constants: spread of each layer, PSNR by width"),
    "splitnet-init": ("split", "SplitNet initialised in four ways, on a picture"),
    "audio": ("audio", "seconds of a recording, fitted by SIRENs initialised in three ways"),
}
