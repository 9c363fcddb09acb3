"""Trains a signed distance with softplus layers on its Eikonal loss, as it is and fused.

python docs/examples/fuse_sdf.py [--steps 40] [--rows 2048]
"""

import argparse
import copy
import time

import torch
from torch import nn

import fused_inr as fi


class Distance(nn.Module):
    """Eight softplus layers, the input joined to the fourth, as IGR and NeuS have it."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3 if i == 0 else width, width - 3 * (i == 3)) for i in range(7)])
        self.last, self.activation = nn.Linear(width, 1), nn.Softplus(beta=100)

    def forward(self, x):
        h = x
        for i, layer in enumerate(self.layers):
            if i == 4:
                h = torch.cat([h, x], -1) / 2**0.5
            h = self.activation(layer(h))
        return self.last(h)


def step(model, rows):
    """On a sphere the distance is 0, and everywhere its gradient has length 1."""
    surface = nn.functional.normalize(torch.randn(rows // 2, 3), dim=1) * 0.5
    x = torch.cat([surface, torch.rand(rows // 2, 3) * 2 - 1]).requires_grad_()
    y = model(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y[: rows // 2].abs().mean() + 0.1 * (g.norm(dim=1) - 1).square().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Distance()
    fused = copy.deepcopy(model)
    print(fi.fuse(fused, torch.rand(options.rows, 3) * 2 - 1))
    for name, m in (("original", model), ("fused", fused)):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(m.parameters(), 1e-3)
        began = time.perf_counter()
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss = step(m, options.rows)
            loss.backward()
            optimizer.step()
        print(f"{name}: loss {loss.item():.4f} after {options.steps} steps, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
