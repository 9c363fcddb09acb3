"""Walks a network as a chain of products z = W x + b and the functions between them, however it is written.

`fused_layers`  the fused layers of one of our networks, in the order of the data.
`chain`         the same for any module: our layers, or what torch.fx finds between the `nn.Linear`s of others.
`watch`         the products as they happen: needs no chain, since it only looks on.

Modules are told by their interface, so that `init` imports no layer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .. import activations
from ..activations import Activation


class FusedLayerLike(Protocol):
    """What an initialisation needs to know of a fused layer."""

    in_features: int
    activation: Activation

    @property
    def weight(self) -> Tensor:
        """The weight [B*N, K], as it is computed now."""

    @property
    def bias(self) -> Tensor | None:
        """The bias [B*N], if there is one."""

    def activation_with_parameters(self) -> Activation:
        """Return the activation with the layer's learnable parameters as its values."""


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module is one of our fused layers."""
    return hasattr(module, "activation_with_parameters")


def fused_layers(module: nn.Module) -> list[FusedLayerLike]:
    """Return the fused layers of a network in the order of the data (those of `module.net` if there is one).

    Raises TypeError if `module` is no module and ValueError if it contains no fused layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a fused layer or a network of them, got {type(module).__name__}")
    network: nn.Module = getattr(module, "net", module)
    layers = [cast(FusedLayerLike, m) for m in network.modules() if is_fused(m)]
    if not layers:
        raise ValueError(
            f"module contains no fused layer (FusedLinear, SineLayer, ...): {type(module).__name__}; "
            "for other modules initialise each weight with vi3nr_uniform_, vi3nr_normal_ or siren_uniform_"
        )
    return layers


def sees_coordinates(module: nn.Module, layers: list[FusedLayerLike]) -> bool:
    """Tell whether the first layer's input are the coordinates: its own `is_first`, else True for a network."""
    own = getattr(layers[0], "is_first", None)
    return not is_fused(module) if own is None else bool(own)


# -- a chain of products


@dataclass
class Link:
    """One product, z = W x + b, and the function that follows it.

    Attributes:
        name: of the module that holds the weight.
        weight: [B*N, K] in B blocks of rows, one a branch; bias: [B*N] or None.
        activation: the function as one of this package's, where it is one.
        function: [.., B*N] to [.., C*N] in any case.
        holder: the module with the weight; norm: a LayerNorm or RMSNorm behind the function; skip: whether the sum of
            what comes out and what came in, over sqrt(2), is what the next product sees.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    function: Callable[[Tensor], Tensor]
    activation: Activation | None
    branches: int = 1
    outputs: int = 1
    holder: nn.Module | None = None
    norm: nn.LayerNorm | nn.RMSNorm | None = None
    skip: bool = False

    @property
    def fan_in(self) -> int:
        """The number of features that the product takes."""
        return self.weight.shape[1]

    @property
    def units(self) -> int:
        """The number of rows of a branch."""
        return self.weight.shape[0] // self.branches

    def values(self, z: Tensor) -> Tensor:
        """Compute the function of independent draws: z [n, B] to [n, C]."""
        n, units = z.shape[0], self.units
        rows = -(-n // units)
        z = torch.cat((z, z.new_zeros(rows * units - n, self.branches)))
        wide = z.reshape(rows, units, self.branches).transpose(1, 2).reshape(rows, -1)
        try:
            y = self.function(wide)
        except RuntimeError:  # a module in it takes its parameters' type only
            y = self.function(wide.to(self.weight.dtype))
        y = y.reshape(rows, self.outputs, units)
        return y.transpose(1, 2).reshape(-1, self.outputs)[:n]


@dataclass
class ProductChain:
    """The products in the order of the data. `enter` is what happens to the network's input before the first one."""

    links: list[Link]
    enter: Callable[[Tensor], Tensor] | None = None


def chain(module: nn.Module) -> ProductChain:
    """Return the products of `module` and what lies between them.

    Raises:
        TypeError: `module` is no module.
        ValueError: no product in it, or no chain; the message names the place and what to do.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a network or a layer, got {type(module).__name__}")
    if is_fused(module) or _is_network(module) or (isinstance(module, nn.Sequential) and all(map(is_fused, module))):
        return _of_fused_layers(module)
    if not any(p.dim() == 2 for p in module.parameters()):
        raise ValueError(
            f"module contains no fused layer (FusedLinear, SineLayer, ...) and no nn.Linear: {type(module).__name__}"
        )
    if isinstance(module, nn.Linear):
        raise ValueError(
            "module contains no fused layer, it is a single nn.Linear: nothing tells what its input is; initialise its "
            "weight with vi3nr_uniform_, vi3nr_normal_ or siren_uniform_"
        )
    return _traced(module)


def _is_network(module: nn.Module) -> bool:
    """Tell whether it is one of our models, unchanged: layers in `net`, one after the other."""
    net = getattr(module, "net", None)
    return (
        isinstance(getattr(module, "fusion", None), str) and isinstance(net, nn.Sequential) and all(map(is_fused, net))
    )


def _of_fused_layers(module: nn.Module) -> ProductChain:
    layers = fused_layers(module)
    names = {id(m): name for name, m in module.named_modules()}
    links = [_fused_link(names[id(m)], m) for m in layers]
    for link, skip in zip(links, getattr(getattr(module, "net", None), "skips", ())):
        link.skip = skip
    for i, (link, norm) in enumerate(zip(links, getattr(module, "norms", None) or ())):
        if type(norm) not in (nn.LayerNorm, nn.RMSNorm):
            raise ValueError(f"norms.{i}: {type(norm).__name__} is no nn.LayerNorm or nn.RMSNorm; {_OTHERWISE}")
        link.norm = cast(nn.LayerNorm | nn.RMSNorm, norm)
    return ProductChain(links, getattr(module, "encoding", None))


def holder_of(name: str, layer: Any) -> nn.Module:
    """Return the module that holds a fused layer's weight.

    Raises:
        ValueError: something else than a matrix stands there.
    """
    holder = getattr(layer, "linear", layer)
    if holder is not layer and type(holder).forward is not nn.Linear.forward:
        own = name or type(layer).__name__
        raise ValueError(f"{own}: its linear is {type(holder).__qualname__}, not a plain nn.Linear; {_OTHERWISE}")
    return holder


def _fused_link(name: str, layer: Any) -> Link:
    activation = layer.activation_with_parameters()
    holder = holder_of(name, layer)
    shape = (activation.branches, activation.outputs)
    return Link(name, layer.weight, layer.bias, activation, activation, *shape, holder)


def refuse_computed(name: str, holder: nn.Module | None) -> None:
    """Make sure that a module's weight stays what it is filled with.

    Raises:
        ValueError: the module's weight is computed before each call, so that filling it changes nothing.
    """
    if holder is None or isinstance(holder._parameters.get("weight"), nn.Parameter):
        return
    if parametrize.is_parametrized(holder, "weight"):
        parts: Any = holder.parametrizations["weight"]  # type: ignore[index]
        if all(hasattr(p, "right_inverse") for p in parts):
            return
        how = "its parametrisation has no right_inverse"
    else:
        how = "a hook (weight_norm, spectral_norm, prune) computes it before each call"
    raise ValueError(
        f"{name}: its weight cannot be filled, {how}; take that off, initialise the module, and put it on again"
    )


def assign(holder: nn.Module, weight: Tensor) -> None:
    """Give a parametrised module a weight, as far as its parametrisation can have it."""
    with torch.no_grad():
        holder.weight = weight
        found: Any = holder.weight
        if not torch.allclose(found, weight, rtol=1e-3, atol=1e-3 * float(weight.abs().max())):
            warnings.warn(
                f"the parametrisation of {type(holder).__name__} keeps its weight from what it was to be: root mean "
                f"square {float(found.square().mean().sqrt()):.4g}, wanted {float(weight.square().mean().sqrt()):.4g}",
                RuntimeWarning,
                stacklevel=4,
            )


def warn_of_others(module: nn.Module, covered: list[nn.Module], who: str) -> None:
    """Warn once, naming the modules whose weights stay as they are: convolutions, embeddings, bare parameters."""
    known = {id(m) for c in covered for m in c.modules()}
    encoding = getattr(module, "encoding", None)
    if isinstance(encoding, nn.Module):
        known |= {id(m) for m in encoding.modules()}
    left = []
    for name, m in module.named_modules():
        if id(m) not in known and any(p.dim() >= 2 for p in m.parameters(recurse=False)):
            left.append(f"{name or 'the module itself'} ({type(m).__name__})")
    if left:
        warnings.warn(
            f"{who} leaves weights as they are: {', '.join(left)}; initialise them by themselves, with "
            "vi3nr_uniform_(weight, gain) for example",
            RuntimeWarning,
            stacklevel=3,
        )


_OTHERWISE = "use lsuv_init_, which needs no formula, or initialise each weight with vi3nr_uniform_ and its gain"


class _Tracer(fx.Tracer):
    """Traces a module down to its products."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a submodule is called as it is: products, and modules without matrices."""
        plain = not any(p.dim() >= 2 for p in m.parameters())  # activations, encodings: called as they are
        return is_fused(m) or isinstance(m, nn.Linear) or plain or super().is_leaf_module(m, module_qualified_name)


class _Graph:
    """A traced module: its products, and the functions between two places of it."""

    def __init__(self, module: nn.Module):
        tracer = _Tracer()
        try:
            with _as_layers(module):
                self.graph = tracer.trace(module)
        except Exception as error:  # whatever the module's own code does with a symbolic input
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{type(module).__name__}: torch.fx cannot trace it ({reason}), so the functions between its linear "
                f"layers stay unknown; {_OTHERWISE}"
            ) from error
        self.module = fx.GraphModule(module, self.graph)
        self.nodes = list(self.graph.nodes)

    def product(self, node: fx.Node) -> tuple[str, Tensor, Tensor | None, fx.Node, nn.Module | None] | None:
        """Return name, weight, bias, the input's node, and the module if there is one, of a node that is a product."""
        if node.op == "call_module":
            m = self.module.get_submodule(str(node.target))
            if is_fused(m) or (isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward):
                given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
                layer: Any = m
                return str(node.target), layer.weight, layer.bias, cast(fx.Node, given), m
        if node.op == "call_function" and node.target is nn.functional.linear:
            x, weight, bias = (
                node.kwargs.get(name, node.args[i] if i < len(node.args) else None)
                for i, name in enumerate(("input", "weight", "bias"))
            )
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                name = str(weight.target).removesuffix(".weight").removesuffix("weight")
                held = None if not isinstance(bias, fx.Node) else self.attribute(bias)
                return name or "weight", self.attribute(weight), held, cast(fx.Node, x), None
        return None

    def attribute(self, node: fx.Node) -> Tensor:
        """Return the tensor that a `get_attr` node names."""
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def between(self, end: fx.Node, stops: set[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
        """Return the nodes that lead to `end`, and where they begin: among `stops` and the network's inputs."""
        needed: set[fx.Node] = set()
        roots: set[fx.Node] = set()
        todo = [end]
        while todo:
            node = todo.pop()
            if node in stops or node.op == "placeholder":
                roots.add(node)
            elif node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        return [n for n in self.nodes if n in needed], roots

    def function(self, start: fx.Node, nodes: list[fx.Node], end: fx.Node) -> Callable[[Tensor], Tensor]:
        """Return the function that `nodes` compute from `start` to `end`."""

        def evaluate(z: Tensor) -> Tensor:
            interpreter = fx.Interpreter(self.module, garbage_collect_values=False)
            interpreter.env = {start: z}
            for node in nodes:
                interpreter.env[node] = interpreter.run_node(node)
            return interpreter.env[end]

        return evaluate


def _traced(module: nn.Module) -> ProductChain:
    graph = _Graph(module)
    products = {node: found for node in graph.nodes if (found := graph.product(node)) is not None}
    if not products:
        raise ValueError(f"module contains no fused layer and no nn.Linear that its forward calls: {module!r}")
    order = list(products)
    (output,) = [n for n in graph.nodes if n.op == "output"]
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise ValueError(f"{type(module).__name__}: its output is no single tensor; {_OTHERWISE}")
    stops = set(order)
    inputs = [products[node][3] for node in order] + [result]
    pieces: list[tuple[list[fx.Node], fx.Node]] = []
    for i, end in enumerate(inputs):
        place = f"the input of {products[order[i]][0]}" if i < len(order) else "the output"
        nodes, roots = graph.between(end, stops)
        expected = {order[i - 1]} if i else {n for n in roots if n.op == "placeholder"}
        if roots != expected or len(roots) != 1:
            from_ = ", ".join(sorted(products[n][0] if n in products else f"the argument {n.name}" for n in roots))
            raise ValueError(
                f"{type(module).__name__}: {place} depends on {from_ or 'no layer'}, where the one product before "
                f"it was expected (skip connections and gates are no chain); {_OTHERWISE}"
            )
        pieces.append((nodes, end))
    links = []
    for i, node in enumerate(order):
        name, weight, bias, _, held = products[node]
        nodes, end = pieces[i + 1]
        function = graph.function(node, nodes, end)
        if held is None or not is_fused(held):
            links.append(_plain_link(name, weight, bias, function))
            links[-1].holder = held
        elif nodes:
            raise ValueError(
                f"{type(module).__name__}: something follows the fused layer {name}, whose activation was to be the "
                f"function between two products; {_OTHERWISE}"
            )
        else:
            links.append(_fused_link(name, held))
    nodes, end = pieces[0]
    (start,) = [n for n in graph.nodes if n.op == "placeholder"][:1]
    return ProductChain(links, graph.function(start, nodes, end) if nodes else None)


def _plain_link(name: str, weight: Tensor, bias: Tensor | None, function: Callable[[Tensor], Tensor]) -> Link:
    """Return a link whose function is checked to work element by element.

    Raises:
        ValueError: what follows the product does not work element by element.
    """
    if weight.is_meta:
        return Link(name, weight, bias, function, activations.get(None))
    rows = weight.shape[0]
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(8, rows, generator=rng).to(weight)
    with torch.no_grad():
        y = function(z)
        columns = y.shape[-1] if isinstance(y, Tensor) and y.dim() == 2 and len(y) == 8 else 0
        if not columns or rows % columns or not y.is_floating_point():
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"what follows {name} turns [8, {rows}] into {got}: {_NOT_ELEMENTWISE}")
        branches = rows // columns
        rolled = function(z.reshape(8, branches, columns).roll(1, -1).reshape(8, rows)).roll(-1, -1)
        other = z.clone()
        other[0, ::columns] += 0.5
        moved = function(other)
    moved[0, 0] = y[0, 0]  # the one element that may change
    if not (_same(rolled, y) and _same(moved, y)):
        raise ValueError(f"what follows {name} mixes elements, or differs from feature to feature: {_NOT_ELEMENTWISE}")
    link = Link(name, weight, bias, function, None, branches)
    link.activation = identified(link) if branches == 1 else None
    return link


_NOT_ELEMENTWISE = f"no function of one pre-activation, element by element; {_OTHERWISE}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def candidates_at_zero(value: float, slope: float, curve: float) -> list[Activation]:
    """Return the registered activations of one feature that a function with these derivatives at 0 may be.

    Those without parameters come first; the others have the parameters that their files read off the derivatives.
    """
    found = []
    for map in sorted(activations.registered(), key=lambda m: m.n_params):
        if map.branches == map.outputs == 1:
            read = map.facts.at_zero
            parameters = read(value, slope, curve) if read is not None else None if map.n_params else {}
            if parameters is not None:
                found.append(map().with_params(**parameters))
    return found


def identified(link: Link) -> Activation | None:
    """Find the registered activation that `link.function` is, by its values and first derivatives at 0."""

    def f(z: Tensor) -> Tensor:
        return link.values(z.unsqueeze(1)).squeeze(1).double()

    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        value = f(zero)
        slope = curve = value.detach() * 0
        if value.requires_grad:
            slope = torch.autograd.grad(value.sum(), zero, create_graph=True)[0]
            if slope.requires_grad:
                curve = torch.autograd.grad(slope.sum(), zero, allow_unused=True)[0]
                curve = slope.detach() * 0 if curve is None else curve
    f0, f1, f2 = value.item(), slope.item(), curve.item()
    candidates = candidates_at_zero(f0, f1, f2)
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(4096, generator=rng, dtype=torch.float64) * 10 ** (4 * torch.rand(4096, generator=rng).double() - 3)
    with torch.no_grad():
        y = f(z)
        for candidate in candidates:
            if torch.allclose(candidate(z.unsqueeze(1)).squeeze(1), y, rtol=1e-4, atol=2e-4):
                return candidate
    return None


# -- products as they happen


Visit = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]


class _Watch(TorchFunctionMode):
    def __init__(self, names: dict[int, str], visit: Visit):
        super().__init__()
        self.names, self.visit = names, visit

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight, bias = (
                kwargs.get(name, args[i] if i < len(args) else None)
                for i, name in enumerate(("input", "weight", "bias"))
            )
            if id(weight) in self.names:
                if x.shape[-1] != weight.shape[1]:
                    raise ValueError(
                        f"sample_input: {self.names[id(weight)]} takes {weight.shape[1]} features, got {tuple(x.shape)}"
                    )
                return self.visit(self.names[id(weight)], x, weight, bias)
        return func(*args, **kwargs)


@contextlib.contextmanager
def watch(module: nn.Module, visit: Visit) -> Iterator[None]:
    """Let `visit(name, x, weight, bias)` compute each product whose weight is a parameter of `module`, in the block.

    Fused layers run as F.linear and their activation in plain PyTorch; modules are in evaluation mode.
    """
    names = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            names[id(parameter)] = name.removesuffix("weight").removesuffix(".") or "weight"
    fused = [(name, m) for name, m in module.named_modules() if is_fused(m)]
    training = {m: m.training for m in module.modules()}
    replaced = []
    try:
        with _as_layers(module), _Watch(names, visit):
            module.eval()
            for name, m in fused:
                layer: Any = m
                names[id(getattr(getattr(layer, "linear", layer), "weight", None))] = name or type(m).__name__
                if "forward" in vars(m):
                    raise ValueError(f"{name}: its forward was replaced, which hides the product; put it back first")
                m.forward = _plain_forward(layer)
                replaced.append(m)
            yield
    finally:
        for m in replaced:
            del m.forward
        for m, was in training.items():
            m.training = was


def _plain_forward(layer: FusedLayerLike) -> Callable[[Tensor], Tensor]:
    linear = getattr(layer, "linear", None)

    def forward(x: Tensor) -> Tensor:
        # an adapter, or hooks: what stands in the place of the matrix is called
        z = nn.functional.linear(x, layer.weight, layer.bias) if linear is None else linear(x)
        return layer.activation_with_parameters()(z)

    return forward


@contextlib.contextmanager
def _as_layers(module: nn.Module) -> Iterator[None]:
    """Make our networks run layer by layer within the block."""
    networks: list[Any] = [m for m in module.modules() if isinstance(getattr(m, "fusion", None), str)]
    chosen = [m.fusion for m in networks]
    try:
        for m in networks:
            m.fusion = "layers"
        yield
    finally:
        for m, fusion in zip(networks, chosen):
            m.fusion = fusion
