"""Fits a picture with a SIREN written in plain PyTorch, as it is and fused: the same numbers, in less time.

python docs/examples/fuse_siren.py [--steps 100] [--size 128]
"""

import argparse
import copy
import time

import torch
from torch import nn

import fused_inr as fi


class Sine(nn.Module):
    def __init__(self, inputs, outputs, first=False, omega_0=30.0):
        super().__init__()
        self.linear, self.omega_0 = nn.Linear(inputs, outputs), omega_0
        bound = 1 / inputs if first else (6 / inputs) ** 0.5 / omega_0
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


def fit(model, x, target, steps):
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
    return -10 * torch.log10(loss.detach()).item(), time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    line = torch.linspace(-1, 1, options.size)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    target = torch.stack([torch.sin(9 * x[:, 0] * x[:, 1]), torch.cos(7 * x.norm(dim=1)), x[:, 0].sign()], 1) / 2 + 0.5
    model = nn.Sequential(Sine(2, 256, True), Sine(256, 256), Sine(256, 256), Sine(256, 256), nn.Linear(256, 3))
    fused = copy.deepcopy(model)
    print(fi.fuse(fused, x))
    for name, m in (("original", model), ("fused", fused)):
        psnr, seconds = fit(m, x, target, options.steps)
        print(f"{name}: {psnr:.2f} dB after {options.steps} steps, {seconds:.1f} s")


if __name__ == "__main__":
    main()
