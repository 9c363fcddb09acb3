"""Layers: activation(x W^T + b) in one operation, as `nn.Module`s.

`FusedLinear` replaces `nn.Linear` followed by an activation: its parameters are `weight` and `bias`, as there. The
named layers (`SineLayer`, `GaussianLayer`, `SincLayer`, `SplitLayer`) replace the classes that people have: they keep
their matrix in a child `linear`, so that checkpoints of those load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from . import activations, backends
from ._checks import boolean, finite_float, one_of, positive_int
from .activations import Activation, ActivationMap
from .functional import linear_act
from .init.network import vi3nr_init_
from .init.siren import siren_init_
from .network import compute_dtype

__all__ = ["FusedLayer", "FusedLinear", "GaussianLayer", "SincLayer", "SineLayer", "SplitLayer"]

#: What `init=` of a layer may be: a name, or a function that is given the layer (weights are PyTorch's by then).
LayerInit = str | Callable[[nn.Module], object] | None
ActivationLike = str | Activation | ActivationMap | None

_INITS: dict[str, Callable[[nn.Module], object] | None] = {
    "default": None,
    "siren": siren_init_,
    "vi3nr": partial(vi3nr_init_, sigma_p=None),  # the rule: no search while layers are made
}


class FusedLayer(nn.Module):
    """What all fused layers share: y = activation(x weight^T + bias) by `fused_inr.functional.linear_act`.

    Attributes:
        in_features: K, the last dimension of x [.., K].
        out_features: N; an activation with B branches has a weight [B*N, K], branch b in rows b*N .. (b+1)*N.
        output_features: C*N, the last dimension of the output for an activation with C outputs (C is 1 for most).
        activation: the `Activation` as constructed; see `activation_with_parameters` for the present values.

    Learnable parameters of the activation are parameters of the layer under their own name (`layer.omega`), 0-D or [N].
    """

    in_features: int
    out_features: int
    output_features: int
    activation: Activation

    def __init__(self, in_features: int, out_features: int, activation: ActivationLike, init: LayerInit):
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.out_features = positive_int("out_features", out_features)
        given = activations.get(activation)
        # the values at construction stay with the activation, detached: reset_parameters returns to them
        self.activation = given.with_params(
            **{k: v.detach().clone() for k, v in given.params.items() if isinstance(v, Tensor)}
        )
        self.output_features = given.outputs * self.out_features
        self._tensor_names = tuple(
            n for n in given.param_names if n in given.learnable or isinstance(given.params[n], Tensor)
        )
        if init is not None and not callable(init):
            one_of("init", init, tuple(_INITS))
        self._init = _INITS[init] if isinstance(init, str) else init
        self._init_name = init if isinstance(init, str) else None

    def _register_activation_parameters(self, device, dtype) -> None:
        """Learnable parameters become nn.Parameters, constant tensors buffers (not in the state_dict)."""
        for name in self._tensor_names:
            if name in self.__dict__ or name in self._parameters or name in self._modules or hasattr(self, name):
                raise ValueError(
                    f"activation: its parameter {name!r} has the name of an attribute of {type(self).__name__}; "
                    "give the parameter another name"
                )
            value = self.activation.params[name]
            if isinstance(value, Tensor) and value.dim() and value.shape[0] != self.out_features:
                raise ValueError(
                    f"activation: parameter {name!r} has shape {tuple(value.shape)}, "
                    f"accepted are [] and [out_features] = [{self.out_features}]"
                )
            per_feature = self.activation.per_feature and name in self.activation.learnable
            shape = (self.out_features,) if per_feature else getattr(value, "shape", ())
            tensor = torch.empty(shape, device=device, dtype=dtype)
            if name in self.activation.learnable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _reset_activation_parameters(self) -> None:
        with torch.no_grad():
            for name in self._tensor_names:
                value = self.activation.params[name]
                target = getattr(self, name)
                target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)

    def activation_with_parameters(self) -> Activation:
        """The activation with this layer's present parameters (tensors where they are learnable) in it."""
        if not self._tensor_names:
            return self.activation
        return self.activation.with_params(**{name: getattr(self, name) for name in self._tensor_names})

    def why_called(self) -> str:
        """Why the layer cannot be an operand of a whole network; empty where it can."""
        return ""

    def operands(self) -> tuple[Tensor, Tensor | None, Activation]:
        """Weight, bias and the activation with its present parameters: what `forward` computes with."""
        weight, bias = cast(Tensor, self.weight), cast(Tensor | None, self.bias)
        return weight, bias, self.activation_with_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias again as at construction, and set learnable parameters back to their initial values."""
        self._reset_linear()
        self._reset_activation_parameters()
        if self._init is not None:
            self._init(self)

    def _reset_linear(self) -> None:
        raise NotImplementedError

    def _described_init(self) -> str:
        if self._init_name is not None:
            return repr(self._init_name)
        function = getattr(self._init, "func", self._init)  # of a functools.partial
        return getattr(function, "__name__", type(function).__name__)

    def extra_repr(self) -> str:
        has_bias = getattr(self, "bias", None) is not None
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}",
            f"activation={self.activation!r}",
        ]
        if self.output_features != self.out_features:
            parts.append(f"output_features={self.output_features}")
        if self._init is not None:
            parts.append(f"init={self._described_init()}")
        return ", ".join(parts)


class FusedLinear(FusedLayer):
    """y = activation(x weight^T + bias): `nn.Linear` and an activation in one operation.

    Args:
        in_features: K.
        out_features: N. The output has C*N columns for an activation with C outputs.
        bias: whether there is a bias [B*N].
        activation: an `Activation` (`fused_inr.activations.sine(omega=30.0)`), a name, or None for a linear layer.
            Its `learnable` parameters become parameters of this layer.
        init: "default" or None (as `nn.Linear`: U(-1/sqrt(K), 1/sqrt(K)) for both), "siren" (`init.siren_init_`,
            for activations with omega), "vi3nr" (`init.vi3nr_init_`; both for a hidden layer), or a function that is
            given the layer, e.g. `functools.partial(fused_inr.init.vi3nr_init_, sigma_p=0.1, is_first=True)`.
        device, dtype: of the parameters.

    It is no subclass of `nn.Linear`: what looks for one (dynamic quantisation, adapters) puts another matrix in its
    place and would drop the activation. Initialisers and parameter groups that ask `isinstance(m, nn.Linear)` pass it
    by: ask for `(nn.Linear, fused_inr.FusedLinear)`, or take a `SineLayer` and its kind, whose `linear` is one.

    State dict: `weight` [B*N, K], `bias` [B*N], then learnable parameters; without those the keys and shapes are those
    of `nn.Linear` (for B = 1, of the layer it replaces). Differentiable in x, weight, bias and learnable parameters.
    Raises TypeError or ValueError for arguments that are not as above.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: ActivationLike = None,
        init: LayerInit = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, activation, init)
        _check_dtype(dtype)
        rows = self.activation.branches * self.out_features
        self.weight = nn.Parameter(torch.empty(rows, self.in_features, device=device, dtype=dtype))
        if boolean("bias", bias):
            self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._register_activation_parameters(device, dtype)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] to [.., output_features]."""
        return linear_act(x, self.weight, self.bias, self.activation_with_parameters())

    def _reset_linear(self) -> None:
        # the calls of nn.Linear in its order, so that a seed gives the same numbers
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class _NamedLayer(FusedLayer):
    """A layer around `self.linear`, an `nn.Linear(K, B*N)`: its state_dict keys are `linear.weight`, `linear.bias`.

    `linear` gives pre-activations (without omega). A plain `nn.Linear`, parametrised or not, is not called: its weight
    and bias are operands of the fused operation. What stands in its place (an adapter, a quantised layer, a subclass
    with a forward of its own), or has hooks (`weight_norm`, `spectral_norm`, `prune`, anybody's), is called, and the
    activation follows in plain PyTorch: slower, and what was meant. `backends.explain` tells.
    """

    def why_called(self) -> str:
        """Why `linear` has to be called; empty where its weight and bias say all."""
        linear = self.linear
        if type(linear).forward is not nn.Linear.forward:
            return f"its linear is {type(linear).__module__}.{type(linear).__qualname__}"
        if has_hooks(linear) or nn.modules.module._has_any_global_hook():
            return "its linear has hooks"
        return ""

    def __init__(self, in_features, out_features, bias, activation, init, device, dtype):
        super().__init__(in_features, out_features, activation, init)
        _check_dtype(dtype)
        rows = self.activation.branches * self.out_features
        # draws its own numbers: reset_parameters must not draw them a second time
        self.linear = nn.Linear(self.in_features, rows, bias=boolean("bias", bias), device=device, dtype=dtype)
        self._register_activation_parameters(device, dtype)
        self._reset_activation_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] to [.., output_features]."""
        linear = self.linear
        if reason := self.why_called():
            backends.record_layers(f"{type(self).__name__} in plain PyTorch: {reason}")
            z = linear(x)
            return self.activation_with_parameters()(z.to(compute_dtype(z.dtype))).to(z.dtype)
        return linear_act(x, linear.weight, linear.bias, self.activation_with_parameters())

    def _initialise(self) -> None:
        if self._init is not None:
            self._init(self)

    def _reset_linear(self) -> None:
        reset = getattr(self.linear, "reset_parameters", None)
        if reset is None:
            raise TypeError(
                f"reset_parameters: the linear of {type(self).__name__} is {type(self.linear).__qualname__}, which has "
                "none; put a plain nn.Linear there first"
            )
        reset()

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias


def _activation_parameter(name: str) -> property:
    """A read-only attribute for a parameter of the activation, constant or learnable."""

    def get(self):
        if name in self._tensor_names:
            return nn.Module.__getattr__(self, name)  # among the parameters and buffers
        return self.activation.params[name]

    return property(get, doc=f"The activation's `{name}`: a number, or the learnable parameter.")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")


def alias(name: str, value: float | Tensor | None, other: str, other_value: float | Tensor | None, default: float):
    """The value of an argument that has two names, of which at most one may be given."""
    if value is not None and other_value is not None:
        raise TypeError(f"{name} and {other} are the same argument: give one of them")
    chosen = value if value is not None else other_value
    return default if chosen is None else chosen


class SineLayer(_NamedLayer):
    """y = sin(omega (x W^T + b)): SIREN's layer (Sitzmann et al. 2020); state_dict keys `linear.weight`, `linear.bias`.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        is_first: whether the input are the coordinates; decides the initialisation only.
        omega: 30.0 by default; `omega_0`, the published code's name, is accepted in its place.
        init: "siren" by default (see `init.siren_uniform_`), or as in `FusedLinear`.
        flic, initc: the two constants of the SIREN initialisation.
        learnable: True (or "omega") makes omega a parameter, `layer.omega`, 0-D or with `per_feature` [out_features].
        device, dtype: of the parameters.

    From the same seed, weights and biases are those of the published SineLayer, bit for bit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        is_first: bool = False,
        omega: float | Tensor | None = None,
        *,
        omega_0: float | Tensor | None = None,
        init: LayerInit = "siren",
        flic: float = 1.0,
        initc: float = 6.0,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        omega = alias("omega", omega, "omega_0", omega_0, 30.0)
        activation = activations.sine(omega=omega, learnable=learnable, per_feature=per_feature)
        super().__init__(in_features, out_features, bias, activation, init, device, dtype)
        self.is_first = boolean("is_first", is_first)
        self.flic = finite_float("flic", flic, above=0)
        self.initc = finite_float("initc", initc, above=0)
        if init == "siren":
            self._init = partial(siren_init_, flic=self.flic, initc=self.initc)
        self._initialise()

    omega = _activation_parameter("omega")

    @property
    def omega_0(self) -> float | Tensor:
        """`omega` under the published code's name."""
        return self.omega

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, is_first={self.is_first}"
        if (self.flic, self.initc) != (1.0, 6.0) and self._init_name == "siren":
            shown += f", flic={self.flic:g}, initc={self.initc:g}"
        return shown


class GaussianLayer(_NamedLayer):
    """y = exp(-z^2 / (2 sigma^2)), z = x W^T + b, or exp(-(scale z)^2); state_dict keys as WIRE's GaussLayer.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        sigma: standard deviation of the bump in units of z (VI3NR's; 0.05 when neither is given), or
        scale: WIRE's form, scale = 1/(sqrt(2) sigma). At most one of them.
        init, device, dtype: as in `FusedLinear`.
        learnable: True (or the parameter's name) makes sigma or scale a parameter of the layer; `per_feature`: [N].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sigma: float | Tensor | None = None,
        scale: float | Tensor | None = None,
        init: LayerInit = None,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        activation = activations.gaussian(sigma=sigma, scale=scale, learnable=learnable, per_feature=per_feature)
        super().__init__(in_features, out_features, bias, activation, init, device, dtype)
        self._initialise()


class SincLayer(_NamedLayer):
    """y = sin(omega z) / (omega z), 1 at 0, z = x W^T + b; state_dict keys `linear.weight`, `linear.bias`.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        omega: 1.0 by default (VI3NR's; `torch.sinc` is pi); `omega_0` is accepted in its place.
        init, device, dtype: as in `FusedLinear`.
        learnable: True (or "omega") makes omega a parameter of the layer, 0-D or with `per_feature` [N].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        omega: float | Tensor | None = None,
        *,
        omega_0: float | Tensor | None = None,
        init: LayerInit = None,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        omega = alias("omega", omega, "omega_0", omega_0, 1.0)
        activation = activations.sinc(omega=omega, learnable=learnable, per_feature=per_feature)
        super().__init__(in_features, out_features, bias, activation, init, device, dtype)
        self._initialise()

    omega = _activation_parameter("omega")


class SplitLayer(_NamedLayer):
    """y = m tanh(w1 z1) sigmoid(w2 z2) sin(w3 z3) cos(w4 z4): the layer of SplitNet.

    z1 .. z4 are the four blocks of x W^T + b with one `linear.weight` [4N, K] in the order tanh, sigmoid, sin, cos.

    Args:
        in_features: K.
        out_features: N, columns of the output (the matrix has 4N rows).
        bias: whether there is a `linear.bias` [4N].
        m: factor of the product.
        omegas: w1 .. w4, or one number for all.
        init: as in `FusedLinear`; a `SplitNet` initialises its layers by VI3NR.
        learnable: True or some of "m", "w1" .. "w4": parameters of the layer, 0-D or with `per_feature` [N].
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        m: float | Tensor = 10.0,
        omegas: float | tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        *,
        init: LayerInit = None,
        learnable: bool | str | Iterable[str] = (),
        per_feature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        activation = activations.split(m=m, omegas=omegas, learnable=learnable, per_feature=per_feature)
        super().__init__(in_features, out_features, bias, activation, init, device, dtype)
        self._initialise()


#: The forwards of the layers here: of FusedLinear, of those that keep an nn.Linear.
OUR_FORWARDS = (FusedLinear.forward, _NamedLayer.forward)
