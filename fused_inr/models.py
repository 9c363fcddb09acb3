"""Networks of fused layers.

`hidden_layers` counts the hidden-to-hidden layers, as the SIREN repository does: a first layer, `hidden_layers` hidden
ones, and a last one that is linear unless `outermost_linear=False`. The layers stand in `net`, an `nn.Sequential`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import activations, backends
from ._checks import boolean, finite_float, one_of, positive_int
from .init.network import vi3nr_init_
from .init.siren import siren_init_
from .layers import ActivationLike, FusedLayer, FusedLinear, SineLayer, SplitLayer, alias, has_hooks
from .network import NORMS, in_sequence
from .ops import mlp as _op
from .pytorch import any_global_hook
from .structure import Structure, read

__all__ = ["MLP", "SIREN", "SplitNet"]

ModelInit = str | Callable[[nn.Module], object]


_DERIVED = (
    "the coordinates require a gradient, as where a loss takes derivatives of the network: "
    "layers differentiate twice without computing anything again"
)
_FUSIONS = ("auto", "network", "layers")
_SAVES = ("preactivations", "nothing")


class Chain(nn.Sequential):
    """Layers one after the other: x <- norm(layer(x)), and where `skips` says so x <- (norm(layer(x)) + x) / sqrt(2).

    `norms` belong to the network that holds the chain; the first layers have one each. A layer that is deleted takes
    its skip connection and its norm with it, one that is inserted comes without, and a slice keeps both. After layers
    were appended, `skips` must be set: one bool a layer.
    """

    skips: tuple[bool, ...]

    def __init__(self, layers: Iterable[nn.Module], skips: tuple[bool, ...], norms: nn.ModuleList | None):
        super().__init__(*layers)
        self.skips = skips
        self._norms = (norms,)  # in a tuple: not a child

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        norms, places = self._norms[0], range(len(self))[index]
        if norms is not None:  # a layer without a norm may stand before one with it
            norms = nn.ModuleList(norms[i] if i < len(norms) else nn.Identity() for i in places)
        return Chain(list(self)[index], tuple(self.skips[i] for i in places), norms)

    def insert(self, index: int, module: nn.Module) -> Chain:
        place = index if index >= 0 else len(self) + index
        super().insert(index, module)
        self.skips = (*self.skips[:place], False, *self.skips[place:])
        norms = self._norms[0]
        if norms is not None and place < len(norms):
            norms.insert(place, nn.Identity())
        return self

    def _no_arithmetic(self, other):
        raise TypeError("a network with skip connections or norms is no list: insert, append or delete its layers")

    __add__ = __iadd__ = __mul__ = __rmul__ = __imul__ = _no_arithmetic

    def __delitem__(self, index) -> None:
        places = range(len(self))[index]
        gone = set(places) if isinstance(index, slice) else {places}
        super().__delitem__(index)
        self.skips = tuple(skip for i, skip in enumerate(self.skips) if i not in gone)
        norms = self._norms[0]
        for i in sorted(gone, reverse=True):
            if norms is not None and i < len(norms):
                del norms[i]

    def set_norms(self, norms: nn.ModuleList | None) -> None:
        """Takes the norms that stand behind the first layers, or None."""
        self._norms = (norms,)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: layers were added or taken out, and nobody said which have a skip connection.
        """
        if len(self.skips) != len(self):
            raise RuntimeError(
                f"the network has {len(self)} layers, but skips tells of {len(self.skips)}: set net.net.skips to a "
                "tuple of one bool a layer, True where its input is added to its output"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check()
        norms = [] if self._norms[0] is None else list(self._norms[0])
        behind = [*norms[: len(self)], *[None] * (len(self) - len(norms))]
        return in_sequence(x, zip(self, behind, self.skips))


_OUR_CONTAINERS = (nn.Sequential.forward, Chain.forward)


class _Kept(NamedTuple):
    """A network's structure, and the container that it was read from."""

    net: nn.Module
    structure: Structure


#: Of every network that is alive, what it consisted of when it was last called; no part of it, so that copies and
#: files of networks know nothing of it.
_structures: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


class CoordinateNetwork(nn.Module):
    """Coordinates, encoding, layers. `first` and `hidden` make a layer from (in_features, out_features).

    Attributes (also arguments of every model):
        fusion: "auto" runs the whole network as one operation where that serves, else layer by layer;
            "network" demands the first and raises where it cannot be had, "layers" is always the second.
            `backends.explain(net, x)` tells which it is, and why.
        save: what the whole network's forward stores for its backward: "preactivations" (the least arithmetic) or
            "nothing" (recomputed tile by tile: memory does not grow with depth).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        hidden_layers: int,
        out_features: int,
        *,
        first: Callable[[int, int], FusedLayer],
        hidden: Callable[[int, int], FusedLayer],
        linear: Callable[[int, int], FusedLayer],
        init: ModelInit,
        inits: dict[str, Callable[[nn.Module], object] | None],
        outermost_linear: bool,
        encoding: nn.Module | None,
        fusion: str,
        save: str,
        residual: bool,
        norm: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.fusion = one_of("fusion", fusion, _FUSIONS)
        self.save = one_of("save", save, _SAVES)
        self.in_features = positive_int("in_features", in_features)
        self.hidden_features = positive_int("hidden_features", hidden_features)
        self.hidden_layers = positive_int("hidden_layers", hidden_layers, minimum=0)
        self.out_features = positive_int("out_features", out_features)
        self.outermost_linear = boolean("outermost_linear", outermost_linear)
        self.residual = boolean("residual", residual)
        self.norm = None if norm is None else one_of("norm", norm, tuple(NORMS))
        self.encoding = encoding

        layers = [first(_encoded_features(encoding, self.in_features), self.hidden_features)]
        for _ in range(self.hidden_layers):
            layers.append(hidden(layers[-1].output_features, self.hidden_features))
        if self.outermost_linear:
            layers.append(linear(layers[-1].output_features, self.out_features))
        else:
            outputs = layers[-1].activation.outputs
            if self.out_features % outputs:
                raise ValueError(
                    f"out_features must be a multiple of the activation's {outputs} outputs where the last layer has "
                    f"an activation (outermost_linear=False), got {self.out_features}"
                )
            layers.append(hidden(layers[-1].output_features, self.out_features // outputs))
        skips = tuple(self.residual and 1 <= i <= self.hidden_layers for i in range(len(layers)))
        norms = None
        if self.norm is not None:
            module: Any = NORMS[self.norm].module
            norms = nn.ModuleList(module(m.output_features, eps=1e-5, device=device, dtype=dtype) for m in layers[:-1])
        plain = norms is None and not any(skips)
        self.net = nn.Sequential(*layers) if plain else Chain(layers, skips, norms)
        if norms is not None:
            self.norms = norms

        self._init = inits[init] if isinstance(init, str) else init
        function = getattr(init, "func", init)  # of a functools.partial
        self._init_name = init if isinstance(init, str) else getattr(function, "__name__", type(function).__name__)
        if self._init is not None:
            self._init(self)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        net = self._modules.get("net")
        if isinstance(net, Chain) and name in ("net", "norms"):
            net.set_norms(cast(nn.ModuleList | None, self._modules.get("norms")))

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "norms" and isinstance(self._modules.get("net"), Chain):
            cast(Chain, self.net).set_norms(None)

    @property
    def _skips(self) -> tuple[bool, ...]:
        """Of each layer, whether it has a skip connection; empty where none has."""
        if not isinstance(self.net, Chain):
            return ()
        self.net.check()
        return self.net.skips if any(self.net.skips) else ()

    def norm_modules(self) -> list[nn.Module]:
        """What stands behind the first layers."""
        norms = getattr(self.net, "_norms", (None,))[0]
        return [] if norms is None else list(norms)[: len(self.net)]

    def reset_parameters(self) -> None:
        """Draw everything again as at construction (also an encoding that has a `reset_parameters`)."""
        for module in (self.encoding, *self.net.children(), *(getattr(self, "norms", None) or ())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if self._init is not None:
            self._init(self)

    def forward(self, coordinates: Tensor) -> Tensor:
        """coordinates [.., in_features] to [.., out_features]."""
        if self.encoding is not None:
            coordinates = self.encoding(coordinates)
        return self.decode(coordinates)

    def decode(self, coordinates: Tensor) -> Tensor:
        """What follows the encoding."""
        if self.fusion == "layers":
            return self.net(coordinates)
        operands, decision = self.whole_call(coordinates)
        if operands is not None and decision.way == "network":
            return _op.network(coordinates, operands, decision, self.save == "preactivations")
        if self.fusion == "network":
            raise RuntimeError(f"fusion='network': {decision.reason}; fusion='auto' runs this call layer by layer")
        if operands is not None and decision.way == "plain":
            return _op.plain(coordinates, operands, decision.reason)
        backends.record_layers(decision.reason)
        return self.net(coordinates)

    @property
    def own_forward(self) -> bool:
        """Whether a call does what `CoordinateNetwork.forward` does and no more: no forward of a subclass or of the
        instance, no hooks."""
        kind = type(self)
        own = kind.forward is CoordinateNetwork.forward and kind.decode is CoordinateNetwork.decode
        return own and not has_hooks(self) and not any_global_hook()

    def _structure(self) -> Structure:
        """What the network consists of, as it is now."""
        compiling, net = torch.compiler.is_compiling(), self.net
        kept = None if compiling else _structures.get(self)
        if kept is not None and kept.net is net:
            if kept.structure.holds():
                return kept.structure
            if (operands := kept.structure.substituted()) is not None:
                return Structure.of(operands)
        if isinstance(net, Chain):
            net.check()
        # tensors that stand in for parameters (torch.func.functional_call) are those of one call
        keep = not compiling and type(next(net.parameters(), None)) is nn.Parameter
        found = read(net, self.norm_modules(), _OUR_CONTAINERS, keep)
        if found.kept:
            _structures[self] = _Kept(net, found)
        return found

    def whole_call(self, x: Tensor, direction: str = "forward") -> tuple[_op.Operands | None, _op.Decision]:
        """The layers as operands, where they can be, and how this call of them runs, and why."""
        if not isinstance(x, Tensor):
            return None, _op.Decision("", "", f"an input that is a {type(x).__name__}", "layers")
        structure = self._structure()
        operands = structure.operands
        if operands is None:
            return None, _op.Decision("", "", structure.reason, "layers")
        auto = self.fusion == "auto"
        derived = False
        if direction == "forward":
            derived = auto and x.requires_grad and x.is_leaf and torch.is_grad_enabled()
            direction = direction if operands.tracked(x) else "inference"
        decision = _op.decide(x, operands, direction, auto)
        if derived and decision.way == "network":
            return operands, _op.Decision("", "", _DERIVED, "layers")
        return operands, decision

    def extra_repr(self) -> str:
        parts = [f"init={self._init_name!r}"]
        if self.fusion != "auto":
            parts.append(f"fusion={self.fusion!r}")
        if self.save != "preactivations":
            parts.append(f"save={self.save!r}")
        if self.residual:
            parts.append("residual=True")
        if self.norm is not None:
            parts.append(f"norm={self.norm!r}")
        return ", ".join(parts)


def _encoded_features(encoding: nn.Module | None, in_features: int) -> int:
    """Columns that the first layer sees."""
    if encoding is None:
        return in_features
    if not isinstance(encoding, nn.Module):
        raise TypeError(f"encoding must be an nn.Module or None, got {type(encoding).__name__}")
    expected = getattr(encoding, "in_features", in_features)
    if expected != in_features:
        raise ValueError(f"encoding takes {expected} coordinates, but in_features is {in_features}")
    width = getattr(encoding, "out_features", None)
    if not isinstance(width, int):
        raise ValueError(
            "encoding must tell its number of columns as an integer attribute out_features, "
            f"got {width!r} from {type(encoding).__name__}"
        )
    return positive_int("encoding.out_features", width)


def _last(layer: Callable[..., FusedLayer], output_activation: ActivationLike, outermost_linear: bool):
    """The last layer, linear or with the output's own activation, of one output a feature."""
    if output_activation is None:
        return layer
    chosen = activations.get(output_activation)
    if not outermost_linear:
        raise ValueError("output_activation: with outermost_linear=False the last layer has the network's activation")
    if chosen.outputs != 1:
        raise ValueError(
            f"output_activation: {chosen.name!r} has {chosen.outputs} outputs; one of a single output is needed"
        )
    return partial(layer, activation=chosen)


def _checked_init(init: ModelInit, accepted: Iterable[str]) -> ModelInit:
    return init if callable(init) else one_of("init", init, tuple(accepted))


def _vi3nr(sigma_p: float | None, first_sigma_p: float | None) -> Callable[[nn.Module], object]:
    return partial(vi3nr_init_, sigma_p=sigma_p, first_sigma_p=first_sigma_p)


class MLP(CoordinateNetwork):
    """A multi-layer perceptron with any activation.

    Args:
        in_features: coordinates.
        hidden_features: width N of the layers. An activation with C outputs gives the next layer C*N inputs.
        hidden_layers: hidden-to-hidden layers, >= 0 (the network has `hidden_layers + 2`).
        out_features: columns of the output.
        activation: an `Activation` or a name; layers share its constants, each has its own learnable parameters.
        init: "default" (as `nn.Linear`), "siren" (activations with omega; flic 1, initc 6), "vi3nr"
            (`init.vi3nr_init_`: input uniform on [-1, 1], biases zero), or a function that is given the network, e.g.
            `functools.partial(fused_inr.init.vi3nr_init_, sample_input=x)`.
        outermost_linear: whether the last layer is linear, or has the activation too.
        bias: whether the layers have biases.
        encoding: a module from coordinates [.., in_features] to [.., encoding.out_features], e.g. `FourierFeatures`.
        sigma_p, first_sigma_p: for init="vi3nr" (pre-activations before omega); by default `init.default_sigma_p`.
        output_activation: of the last layer in place of none, e.g. "sigmoid"; one output, and outermost_linear=True.
        residual: True gives the hidden-to-hidden layers skip connections, x <- (activation(W x + b) + x) / sqrt(2): the
            factor keeps the mean square of a sum of two independent terms.
        norm: "layer" puts a `nn.LayerNorm`, "rms" a `nn.RMSNorm` (of eps 1e-5, too) behind the activation of every
            layer but the last, before the sum of a skip connection, each with its own weight and bias
            (`norms.0.weight`, ...; an RMSNorm has no bias): part of the whole network on the CPU.
        fusion: "auto" (the whole network as one operation where that serves, else layer by layer), "network", "layers".
        save: "preactivations" or "nothing": what the forward of a whole network stores for its backward.
        device, dtype: of the layers' parameters (not of an encoding, which keeps its own).

    State dict keys: `net.0.weight`, `net.0.bias`, ... Raises TypeError or ValueError for arguments not as above.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        hidden_layers: int,
        out_features: int,
        activation: ActivationLike = "relu",
        init: ModelInit = "default",
        outermost_linear: bool = True,
        bias: bool = True,
        *,
        encoding: nn.Module | None = None,
        sigma_p: float | None = None,
        first_sigma_p: float | None = None,
        output_activation: ActivationLike = None,
        residual: bool = False,
        norm: str | None = None,
        fusion: str = "auto",
        save: str = "preactivations",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        chosen = activations.get(activation)
        layer = partial(FusedLinear, bias=bias, device=device, dtype=dtype)
        super().__init__(
            in_features,
            hidden_features,
            hidden_layers,
            out_features,
            first=partial(layer, activation=chosen),
            hidden=partial(layer, activation=chosen),
            linear=_last(layer, output_activation, outermost_linear),
            init=_checked_init(init, ("default", "siren", "vi3nr")),
            inits={"default": None, "siren": siren_init_, "vi3nr": _vi3nr(sigma_p, first_sigma_p)},
            outermost_linear=outermost_linear,
            encoding=encoding,
            fusion=fusion,
            save=save,
            residual=residual,
            norm=norm,
            device=device,
            dtype=dtype,
        )


class SIREN(CoordinateNetwork):
    """A network of sine layers (Sitzmann et al. 2020).

    Args:
        in_features, hidden_features, hidden_layers, out_features: see `MLP`.
        omega: of all layers but the first; 30.0 by default, also accepted as `hidden_omega_0` or `omega_0`.
        first_omega: of the first layer; 30.0 by default, also accepted as `first_omega_0`.
        flic, initc: constants of the SIREN initialisation: 1 and 6 as published; 2 and 40 are the tuned pair.
        outermost_linear: whether the last layer is linear, or a sine too.
        bias: whether the layers have biases.
        init: "siren", "default", "vi3nr", or a function that is given the network.
        encoding, sigma_p, first_sigma_p, output_activation, residual, norm, fusion, save, device, dtype: see `MLP`.
        learnable: True makes every omega a parameter (`net.0.omega`), 0-D or with `per_feature` one a feature.

    State dict keys: `net.0.linear.weight`, ..., and `net.4.weight` for the last linear layer, as in the published
    notebook, whose checkpoints load; from the same seed the initial weights are its own, bit for bit.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        hidden_layers: int,
        out_features: int,
        omega: float | None = None,
        first_omega: float | None = None,
        flic: float = 1.0,
        initc: float = 6.0,
        outermost_linear: bool = True,
        bias: bool = True,
        *,
        first_omega_0: float | None = None,
        hidden_omega_0: float | None = None,
        omega_0: float | None = None,
        init: ModelInit = "siren",
        encoding: nn.Module | None = None,
        sigma_p: float | None = None,
        first_sigma_p: float | None = None,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        output_activation: ActivationLike = None,
        residual: bool = False,
        norm: str | None = None,
        fusion: str = "auto",
        save: str = "preactivations",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if hidden_omega_0 is not None and omega_0 is not None:
            raise TypeError("hidden_omega_0 and omega_0 are the same argument: give one of them")
        old_name = "omega_0" if hidden_omega_0 is None else "hidden_omega_0"
        old_value = omega_0 if hidden_omega_0 is None else hidden_omega_0
        omega = finite_float("omega", alias("omega", omega, old_name, old_value, 30.0))
        first_omega = alias("first_omega", first_omega, "first_omega_0", first_omega_0, 30.0)
        first_omega = finite_float("first_omega", first_omega)
        flic, initc = finite_float("flic", flic, above=0), finite_float("initc", initc, above=0)
        siren = _checked_init(init, ("siren", "default", "vi3nr")) == "siren"
        # SIREN's distribution is known layer by layer: no second draw for the network
        sine = partial(
            SineLayer,
            bias=bias,
            flic=flic,
            initc=initc,
            init="siren" if siren else None,
            learnable=learnable,
            per_feature=per_feature,
            device=device,
            dtype=dtype,
        )
        last = partial(siren_init_, omega=omega, initc=initc) if siren else None
        super().__init__(
            in_features,
            hidden_features,
            hidden_layers,
            out_features,
            first=partial(sine, is_first=True, omega=first_omega),
            hidden=partial(sine, omega=omega),
            linear=_last(
                partial(FusedLinear, bias=bias, init=last, device=device, dtype=dtype),
                output_activation,
                outermost_linear,
            ),
            init=init,
            inits={"siren": None, "default": None, "vi3nr": _vi3nr(sigma_p, first_sigma_p)},
            outermost_linear=outermost_linear,
            encoding=encoding,
            fusion=fusion,
            save=save,
            residual=residual,
            norm=norm,
            device=device,
            dtype=dtype,
        )


class SplitNet(CoordinateNetwork):
    """A network of split layers: m tanh(w1 z1) sigmoid(w2 z2) sin(w3 z3) cos(w4 z4).

    Args:
        in_features, hidden_features, hidden_layers, out_features: see `MLP`.
        m: factor of the product; 5.935 keeps unit variance for pre-activations of standard deviation 1.
        omegas: w1 .. w4, or one number for all.
        outermost_linear: whether the last layer is linear, or a split layer too.
        bias: whether the layers have biases.
        init: "vi3nr" by default, with pre-activations of standard deviation 1 in every branch (what LSUV, the
            original's way, tunes them to) and zero biases; "default" (as `nn.Linear`), or a function.
        encoding, sigma_p, first_sigma_p, output_activation, residual, norm, fusion, save, device, dtype: see `MLP`.
            The published pictures use `FourierFeatures(2, 128, std=10.0)`, `outermost_linear=False` and omegas of 1.
        learnable: True or some of "m", "w1" .. "w4": parameters of each split layer; `per_feature`: one a feature.

    State dict keys: `net.0.linear.weight` [4N, K], ..., and `net.4.weight` for a last linear layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        hidden_layers: int,
        out_features: int,
        m: float = 10.0,
        omegas: float | tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        outermost_linear: bool = True,
        bias: bool = True,
        *,
        init: ModelInit = "vi3nr",
        encoding: nn.Module | None = None,
        sigma_p: float | None = None,
        first_sigma_p: float | None = None,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        output_activation: ActivationLike = None,
        residual: bool = False,
        norm: str | None = None,
        fusion: str = "auto",
        save: str = "preactivations",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        split = partial(
            SplitLayer,
            bias=bias,
            m=m,
            omegas=omegas,
            learnable=learnable,
            per_feature=per_feature,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            in_features,
            hidden_features,
            hidden_layers,
            out_features,
            first=split,
            hidden=split,
            linear=_last(
                partial(FusedLinear, bias=bias, device=device, dtype=dtype), output_activation, outermost_linear
            ),
            init=_checked_init(init, ("vi3nr", "default")),
            inits={"default": None, "vi3nr": _vi3nr(sigma_p, first_sigma_p)},
            outermost_linear=outermost_linear,
            encoding=encoding,
            fusion=fusion,
            save=save,
            residual=residual,
            norm=norm,
            device=device,
            dtype=dtype,
        )
