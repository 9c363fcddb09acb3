"""Registers activations, one entry a file in this folder, and what users define at run time."""

from __future__ import annotations

from collections.abc import Callable

from .facts import Facts
from .spec import Activation, ActivationMap, check_name, unpickle_map
from .store import DEFINED, LOSSES, REGISTERED
from .store import lookup as lookup

#: The functions that make an Activation where the public arguments differ from the map's parameters, by name.
_FACTORIES: dict[str, Callable[..., Activation]] = {}
#: What unpickles a map in files that were written when the function had this name.
_unpickle_map = unpickle_map


def register(facts: Facts | None = None, /, **parameters: float) -> Callable[[Callable], ActivationMap]:
    """Decorate a formula: its function name becomes the activation's, the keywords its parameters' defaults.

    A leading underscore is dropped: it leaves the public name to a `factory`. `facts` is what else is known of it.
    """

    def decorate(formula: Callable) -> ActivationMap:
        name = formula.__name__.removeprefix("_")
        REGISTERED[name] = ActivationMap(name, formula, parameters, facts=facts)
        return REGISTERED[name]

    return decorate


def loss(facts: Facts | None = None, /, **parameters: float) -> Callable[[Callable], ActivationMap]:
    """Decorate the formula of an elementwise loss of (prediction, target); arguments as of `register`."""

    def decorate(formula: Callable) -> ActivationMap:
        LOSSES[formula.__name__] = ActivationMap(formula.__name__, formula, parameters, facts=facts)
        return LOSSES[formula.__name__]

    return decorate


def factory(function: Callable[..., Activation]) -> Callable[..., Activation]:
    """Decorate the public constructor of a registered map of the same name."""
    _FACTORIES[function.__name__] = function
    return function


def registered() -> list[ActivationMap]:
    """Return the activations whose code is committed, sorted by name."""
    return [REGISTERED[name] for name in sorted(REGISTERED)]


def registered_losses() -> list[ActivationMap]:
    """Return the losses whose code is committed, sorted by name."""
    return [LOSSES[name] for name in sorted(LOSSES)]


def names() -> tuple[str, ...]:
    """Return the names of the registered activations."""
    return tuple(sorted(REGISTERED))


def get(activation: str | Activation | ActivationMap | None) -> Activation:
    """Return an `Activation` from a name (with default parameters), a map, None (identity) or itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if activation is None:
        return REGISTERED["identity"]()
    if isinstance(activation, ActivationMap):
        return activation()
    if isinstance(activation, str):
        if activation in _FACTORIES:
            return _FACTORIES[activation]()
        if activation in REGISTERED:
            return REGISTERED[activation]()
        for map in reversed(DEFINED.values()):
            if map.name == activation:
                return map()
        raise ValueError(
            f"activation: {activation!r} is not registered; registered: {', '.join(names())}; "
            "or make one from a formula with fused_inr.activations.define"
        )
    raise TypeError(
        "activation: expected a name, an Activation such as fused_inr.activations.sine(omega=30.0), or None; "
        f"got {type(activation).__name__}"
    )


def define(name: str, formula: Callable, **parameters: float) -> Activation:
    """Make an activation from a formula, with the standing of the registered ones: every order, layer and backend.

    ```python
    chirp = fused_inr.activations.define("chirp", lambda z, omega: sympy.sin(omega * z**2), omega=2.0)
    chirp.with_params(omega=3.0)
    ```

    Args:
        name: a Python identifier that no registered activation has.
        formula: function of one or several real sympy symbols (the pre-activations of the branches) and then the
            parameters by name; returns a sympy expression, or a tuple of them for several outputs.
            `fused_inr.activations.symbols` adds stable primitives (sigmoid, softplus, saturate, detach, step).
        parameters: default values; each becomes a parameter of the activation, constant or learnable.

    Raises:
        ValueError: a name that is taken or no identifier, unknown symbols in the formula, functions that cannot
            be compiled.
        TypeError: a formula that is not callable, or returns something else than expressions (a string, say).

    A piece of a `sympy.Piecewise` may overflow, or have no value, where it is not taken: derivatives stay finite. At a
    kink the derivative is one-sided: step(0) = 0, sign(0) = 0. Code is generated when it is first needed; on
    CPUs it is compiled if there is a C++ compiler, else the PyTorch reference serves.
    """
    check_name(name)
    if name in REGISTERED or name in LOSSES:
        raise ValueError(f"name: {name!r} is a registered activation or loss; choose another name")
    if not callable(formula):
        raise TypeError(f"formula: expected a function of sympy symbols, got {type(formula).__name__}")
    if taken := {"learnable", "per_feature"} & set(parameters):
        raise ValueError(f"parameter {min(taken)!r}: every activation has an argument of this name; choose another")
    for parameter, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"parameter {parameter!r}: expected a number as default, got {value!r}")
    map = ActivationMap(name, formula, parameters, generated=False)
    if map.branches < 1:
        raise ValueError("formula: it needs at least one argument that is no parameter (the pre-activation z)")
    DEFINED[map.key] = map
    return map()
