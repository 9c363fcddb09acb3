"""States what an activation is known for beside its formula, once, in the activation's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What the package knows about one activation (or loss) by name; every field has a value that suits a new one.

    Functions of the parameters take them by name, as numbers.

    Attributes:
        eager: the map as people write it in PyTorch, a function of the branches' pre-activations and then the
            parameters, all by position, that returns a tensor or a tuple of tensors. Benchmarks compare with it, and
            tests hold the generated code to it. None: the generated reference serves, which is PyTorch too.
        sigma_p: the standard deviation of pre-activations, before omega, that VI3NR's initialisation takes where none
            is given, as a function of the parameters; its sign does not matter. None: 1.
        init: how its published code initialises a network: "default" is PyTorch's way. Where it is "siren", a first
            layer that sees coordinates keeps SIREN's spread under VI3NR, too.
        bench_init: how benchmarks initialise an `MLP` of it.
        model: the model of `fused_inr.models` that is built of it, with `model_arguments`.
        model_arguments: the model's own arguments, as a function of the parameters. None: the model is given the
            activation itself.
        layer: the layer of `fused_inr.layers` that is made of it.
        linear: whether it is no activation at all, so that VI3NR gives the layer the spread of the layer before it.
        detached: whether its derivatives are, on purpose, not those of its values.
        at_zero: its parameters, from the value and the first two derivatives that a function has at 0, or None where it
            is not that function; so are functions in foreign networks recognised. An activation of one branch and one
            output without parameters needs none; others without it are not recognised.
        slope: the supremum of abs(df/dz) over all z and branches, as a function of the parameters. None: it has none,
            or it is not known, and tests of rounding errors in whole layers leave the activation out.
        test_values: parameters of tests, where they show more than the defaults.
        test_sigma: the standard deviation of pre-activations about which tests look at its moments.
        public: of a loss, the function of `fused_inr.losses` that computes it.
    """

    eager: Callable[..., Any] | None = None
    sigma_p: Callable[..., float] | None = None
    init: str = "default"
    bench_init: str = "default"
    model: str = "MLP"
    model_arguments: Callable[..., dict[str, Any]] | None = None
    layer: str = "FusedLinear"
    linear: bool = False
    detached: bool = False
    at_zero: Callable[[float, float, float], dict[str, float] | None] | None = None
    slope: Callable[..., float] | None = None
    test_values: Mapping[str, float] = field(default_factory=dict)
    test_sigma: float = 1.0
    public: str | None = None
