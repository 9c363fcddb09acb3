"""Solves a Poisson problem with a tanh network through torch.compile(backend="fused_inr"), which differentiates twice.

python docs/examples/compile_laplacian.py [--steps 100] [--rows 2000]
"""

import argparse
import math
import time

import torch
from torch import nn

import fused_inr as fi


def residual(model, x):
    """Laplacian of u = x (1 - x) y (1 - y) N(x, y), less that of sin(pi x) sin(pi y)."""
    x = x.requires_grad_()
    u = (x * (1 - x)).prod(1, keepdim=True) * model(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
    wanted = -2 * math.pi**2 * torch.sin(math.pi * x).prod(1)
    return (laplacian - wanted).square().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    for name in ("eager", "fused_inr"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        model = net if name == "eager" else torch.compile(net, backend=name)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        began = time.perf_counter()
        for i in range(options.steps):
            optimizer.zero_grad()
            loss = residual(
                model, torch.rand(options.rows - i % 7, 2)
            )  # another number of rows compiles no more than once
            loss.backward()
            optimizer.step()
        print(f"{name}: residual {loss.item():.3g} after {options.steps} steps, {time.perf_counter() - began:.1f} s")
    print(fi.backends.explain(torch.compile(net, backend="fused_inr"), torch.rand(options.rows, 2)))


if __name__ == "__main__":
    main()
