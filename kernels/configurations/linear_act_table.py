"""
"""

Key = tuple[str, str, str, str, int]
Numbers = tuple[int, int, int, int, int]

TUNED: dict[Key, Numbers] = {
    ("sm100", "forward", "dot", "ieee", 2): (64, 32, 16, 4, 2),
    ("sm100", "forward", "dot", "tf32", 2): (128, 64, 32, 8, 1),
    ("sm100", "forward", "dot", "tf32", 4): (128, 32, 32, 8, 1),
    ("sm100", "gz", "dot", "half", 1): (128, 64, 64, 4, 3),
    ("sm100", "gz", "dot", "tf32", 2): (128, 32, 32, 8, 1),
    ("sm100", "gz", "dot", "tf32", 4): (64, 32, 32, 8, 1),
    ("sm80", "forward", "dot", "x3", 4): (64, 16, 32, 8, 2),
    ("sm80", "gz", "dot", "tf32", 4): (64, 32, 32, 8, 2),
    ("sm80", "gz", "narrow_n", "x3", 2): (32, 4, 32, 4, 1),
    ("sm80", "weight_grad", "dot", "x3", 1): (32, 64, 64, 4, 2),
    ("sm86", "forward", "dot", "x3", 4): (64, 16, 32, 8, 2),
    ("sm86", "gz", "dot", "tf32", 4): (64, 32, 32, 8, 2),
    ("sm86", "weight_grad", "dot", "x3", 1): (32, 64, 64, 4, 2),
    ("sm90", "forward", "dot", "half", 1): (64, 128, 64, 4, 3),
}

WHY: dict[Key, str] = {
    ("sm100", "forward", "dot", "ieee", 2): "ptxas aims at 128 registers with eight warps and spills 8 bytes for it",
    ("sm100", "forward", "dot", "tf32", 2): "with more stages x is overwritten while products of other branches read it (layer_configs.valid)",
    ("sm100", "forward", "dot", "tf32", 4): "with more stages x is overwritten while products of other branches read it (layer_configs.valid)",
    ("sm100", "gz", "dot", "half", 1): "ptxas aims at 80 registers with eight warps and spills 8 bytes for it",
    ("sm100", "gz", "dot", "tf32", 2): "with more stages x is overwritten while products of other branches read it (layer_configs.valid)",
    ("sm100", "gz", "dot", "tf32", 4): "with more stages x is overwritten while products of other branches read it (layer_configs.valid)",
    ("sm80", "forward", "dot", "x3", 4): "without wgmma the split operands stay in registers: 64 columns spill",
    ("sm80", "gz", "dot", "tf32", 4): "a third stage spills 40 bytes where operands are not aligned",
    ("sm80", "gz", "narrow_n", "x3", 2): "16 rows spill 8 bytes, 32 none; not measured",
    ("sm80", "weight_grad", "dot", "x3", 1): "ptxas aims at 128 registers with eight warps and spills 8 bytes for it",
    ("sm86", "forward", "dot", "x3", 4): "without wgmma the split operands stay in registers: 64 columns spill",
    ("sm86", "gz", "dot", "tf32", 4): "a third stage spills 40 bytes where operands are not aligned",
    ("sm86", "weight_grad", "dot", "x3", 1): "ptxas aims at 128 registers with eight warps and spills 8 bytes for it",
    ("sm90", "forward", "dot", "half", 1): "NVIDIA H200, 2026-11-26: 0.69 of the time of (128, 128, 64, 8, 3) where derivatives are kept, 0.96 where not",
}
