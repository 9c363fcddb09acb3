"""Layers as published codes write them, for tests of what is done with modules that are not ours."""

import torch
from torch import nn


class PublishedSplit(nn.Module):
    """SplitNet's layer as published: one Linear, four blocks."""

    def __init__(self, n_in, n_out, m=10.0):
        super().__init__()
        self.linear = nn.Linear(n_in, 4 * n_out)
        self.m = m

    def forward(self, x):
        a, b, c, d = self.linear(x).chunk(4, -1)
        return self.m * torch.tanh(a) * torch.sigmoid(b) * torch.sin(c) * torch.cos(d)
