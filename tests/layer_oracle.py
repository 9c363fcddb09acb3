"""What the tests of layers, models and initialisation compare with: plain PyTorch, written by hand."""

import math

import torch
from tolerances import UNIT, tolerance
from torch import Tensor, nn

import fused_inr as fi


def split_formula(z: Tensor, m: float = 10.0, w=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    a, b, c, d = z.chunk(4, -1)
    return m * torch.tanh(w[0] * a) * torch.sigmoid(w[1] * b) * torch.sin(w[2] * c) * torch.cos(w[3] * d)


def case(map: fi.activations.ActivationMap) -> tuple:
    """The constructor of an activation with its values for tests, its plain formula, and its largest slope."""
    values = {**map.defaults, **map.facts.test_values}
    return lambda: map(**values), lambda z: map.eager(z, *values.values()), map.facts.slope(**values)


#: name -> (constructor of our activation, plain formula, sup of abs(df/dz_b) over all z and branches)
CASES = {
    "None": (lambda: None, lambda z: z, 1.0),
    "a name": (lambda: "relu", torch.relu, 1.0),
    **{map.name: case(map) for map in fi.activations.registered() if map.facts.slope is not None},
}


def oracle(layer: nn.Module, formula, slope: float, x: Tensor, error: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """A layer in float64, and how far the layer itself may be from it (the bound of TESTING.md), elementwise.

    `error` bounds the error in x. The products and sums of one output err by c (abs(x) abs(W)^T + abs(b)),
    c = (K+3) u; an error e in z becomes slope e; the activation's own rounding adds 4 ulp. The figures are those of
    tolerances.py.
    """
    unit = UNIT[layer.weight.dtype]
    weight = layer.weight.detach().double()
    bias = torch.zeros(weight.shape[0]).double() if layer.bias is None else layer.bias.detach().double()
    x = x.detach().double()
    magnitude = (x.abs() + error) @ weight.abs().T + bias.abs()
    moved = (torch.zeros_like(x) + error) @ weight.abs().T
    z = x @ weight.T + bias
    y = formula(z)
    dz = moved + (layer.in_features + tolerance("dot")) * unit * magnitude
    branches = layer.activation.branches
    dz = sum(dz.chunk(branches, -1)) if branches > 1 else dz
    dz = dz.repeat(*[1] * (dz.dim() - 1), layer.activation.outputs)
    return y, slope * dz + tolerance("evaluation") * 2 * unit * y.abs().clamp(min=1.0)


class NotebookSineLayer(nn.Module):
    """The layer of the SIREN notebook: its attribute names, its order of random draws."""

    def __init__(self, in_features, out_features, bias=True, is_first=False, omega_0=30.0):
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        bound = 1 / in_features if is_first else math.sqrt(6 / in_features) / omega_0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


class NotebookSiren(nn.Module):
    """The network of the SIREN notebook."""

    def __init__(self, d, width, hidden_layers, out, outermost_linear=True, first_omega_0=30.0, hidden_omega_0=30.0):
        super().__init__()
        net = [NotebookSineLayer(d, width, is_first=True, omega_0=first_omega_0)]
        net += [NotebookSineLayer(width, width, omega_0=hidden_omega_0) for _ in range(hidden_layers)]
        if outermost_linear:
            last = nn.Linear(width, out)
            bound = math.sqrt(6 / width) / hidden_omega_0
            with torch.no_grad():
                last.weight.uniform_(-bound, bound)
        else:
            last = NotebookSineLayer(width, out, omega_0=hidden_omega_0)
        self.net = nn.Sequential(*net, last)

    def forward(self, x):
        return self.net(x)
