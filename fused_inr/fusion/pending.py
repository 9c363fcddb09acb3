"""Pending pre-activations: within a region a linear layer is not computed until what follows it is known.

`Region` is a TorchFunctionMode. It answers `F.linear` and its kin with a `Pending`, a tensor that holds the operands
(its `Deferred`) instead of values. Pointwise functions give further pendings with a longer formula; a linear layer of a
pending makes a chain. Anything else makes it a value: one fused operation of linear and activation, one whole-network
operation for a chain, or PyTorch's own functions where the formula is none, or where these are faster.

What is right is never a matter of prediction. An operand that is about to be changed in place, a view that is written
to, a pre-activation that is looked at, a Function of the model's own: each makes the value first.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..activations import Activation, lookup
from ..functional import linear_act
from ..network import Norm
from ..ops import mlp as _op
from ..pytorch import (
    arguments_of_functions,
    forward_mode,
    saved_tensor_hooks,
    transforms_active,
    without_overrides,
    without_subclasses,
)
from . import formulas
from .functions import KNOWN, Function, evaluate, inplace_function
from .memory import Memory, Site

__all__ = ["Pending", "Region", "current"]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_COMPLEX = (torch.complex64, torch.complex128)
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_SEVERAL = (list, tuple)
#: Types of arguments that hold nothing.
_LEAVES = frozenset((int, float, bool, str, complex, torch.Size, torch.dtype, torch.device, slice, type(...)))

_following = itertools.count(1).__next__


class Root:
    """A linear layer that has not been computed: z = x W^T + b.

    Attributes:
        x: rows [.., K], or the `Deferred` that they will be the value of.
        weight, bias: [N, K] or [G, N, K] and to match; of a complex layer the complex ones.
        compute: z from x as the model wrote it.
        shape: of z.
        channels: whether features are dimension 1 and not the last one (a convolution of width 1).
        grad: whether gradients were recorded.
        cast: autocast's type, None where it is off.
        site: which of the region's linear layers it is.
        value: z, once it is known.
        viewed: whether there are pendings of a part of z.
        branches: of how many parts z consists, where formulas of several layers have met (else 0).
        partner: the site of the second of these layers.
    """

    __slots__ = (
        "bias",
        "branches",
        "cast",
        "channels",
        "compute",
        "device",
        "dtype",
        "grad",
        "partner",
        "shape",
        "site",
        "value",
        "viewed",
        "weight",
        "x",
    )  # fmt: skip

    def __init__(self, x, weight, bias, compute, shape, dtype, device, site, grad, cast, channels=False):
        self.x, self.weight, self.bias, self.compute = x, weight, bias, compute
        self.shape, self.dtype, self.device, self.site = shape, dtype, device, site
        self.grad, self.cast, self.channels = grad, cast, channels
        self.value: Tensor | None = None
        self.viewed = False
        self.branches = 0
        self.partner: Site | None = None

    @property
    def features(self) -> int:
        """Columns of z."""
        return self.shape[1] if self.channels else self.shape[-1]

    @property
    def complex(self) -> bool:
        """Whether z is complex."""
        return self.dtype in _COMPLEX

    def blocks(self, complex_rows: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; of a complex layer as a real one of twice the columns, real parts first."""
        w, b = self.weight, self.bias
        if not self.complex:
            return w, b
        if complex_rows:
            w = torch.cat([torch.cat([w.real, -w.imag], 1), torch.cat([w.imag, w.real], 1)])
        else:
            w = torch.cat([w.real, w.imag])
        return w, None if b is None else torch.cat([b.real, b.imag])


class Deferred:
    """A formula of a root's pre-activation, with its leaves.

    Attributes:
        root, state, leaves: what it is.
        norm: a norm over the formula's columns, or None.
        result: its value, once it is known.
        order: counts nodes, so that the older is computed first.
        consumers: linear layers that take it as their rows.
    """

    __slots__ = ("consumers", "leaves", "norm", "order", "result", "root", "state")

    def __init__(self, root: Root, state: formulas.State, leaves: tuple):
        self.root, self.state, self.leaves = root, state, leaves
        self.norm: Norm | None = None
        self.result: Tensor | None = None
        self.consumers = 0
        self.order = _following()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the value."""
        return self.state.dtype or self.root.dtype


class Pending(torch.Tensor):
    """A tensor whose value is not computed yet; `Region` makes it, any function that needs values ends it."""

    node: Deferred
    #: its shape, at hand
    form: Any

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        region = current()
        if region is None:  # somebody has kept it
            args, kwargs = _outside.real_in_order(args, kwargs or {})
            return function(*args, **kwargs)
        return region.called(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):  # type: ignore[override]
        # past every Python override: a value is all that helps, and autograd is over by now
        found = [a.node for a in _pendings((args, kwargs or {}))]
        if torch.is_grad_enabled() and any(_tracked(n) for n in found):
            raise RuntimeError(
                f"{function} was called on a pre-activation that fused_inr has not computed, past PyTorch's overrides, "
                "so that its gradient would be lost; call fused_inr.unfuse(model), or leave the method out of `methods`"
            )
        region = current() or _outside
        return function(*region.real(args), **region.real(kwargs or {}))


def _pendings(value: Any) -> Iterator[Pending]:
    if type(value) is Pending:
        yield value
    elif isinstance(value, _SEVERAL):
        for v in value:
            yield from _pendings(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _pendings(v)


def _tracked(node: Deferred) -> bool:
    """Whether the value will have a derivative."""
    if node.result is not None:
        return node.result.requires_grad
    root = node.root
    if not root.grad:
        return False
    x = root.x
    if type(x) is Deferred:
        if _tracked(x):
            return True
    elif x.requires_grad:
        return True
    if root.weight.requires_grad or (root.bias is not None and root.bias.requires_grad):
        return True
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in node.leaves)


_new = torch.Tensor._make_wrapper_subclass
_ROWS = frozenset((*_PLAIN, Pending))


def _shape_of(root: Root, state: formulas.State) -> Any:
    if state.branches > 1 and not root.branches:
        return (*root.shape[:-1], root.shape[-1] // state.branches)
    return root.shape


# -- functions that need no value

_GETTERS = {
    getattr(Tensor, n).__get__
    for n in "shape dtype device ndim layout is_cuda is_sparse is_mps is_quantized is_meta is_nested is_cpu".split()
}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_FACTS = {
    getattr(Tensor, n)
    for n in "size dim is_floating_point is_complex numel ndimension nelement element_size __len__".split()
} | {torch.is_floating_point, torch.is_complex, torch.numel}
_CHUNK = {torch.chunk, Tensor.chunk}
_SPLIT = {torch.split, Tensor.split, torch.functional.split}
_DROPOUT = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_FLOAT = {Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16}
_FLOAT |= {Tensor.bfloat16: torch.bfloat16}
_GETITEM = Tensor.__getitem__
#: Of their second argument they take the shape.
_SHAPES = {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}


class Region(TorchFunctionMode):
    """Within it linear layers are pending; `memory` is what is known of them from other calls.

    Args:
        memory: of the model, or of the block of code.
    """

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory
        self.count = 0
        self.open: list[weakref.ref[Pending]] = []
        self.pendings = 0
        self.entered_with_grad = True
        self.hooks: Any = None
        self._arguments: Any = None

    # -- entry and exit

    def __enter__(self):
        self.count = self.pendings = 0
        self.open = []
        self.entered_with_grad = torch.is_grad_enabled()
        self.hooks = saved_tensor_hooks()
        _regions.stack.append(self)
        self._arguments = arguments_of_functions(self._real_aside)
        self._arguments.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        _regions.stack.remove(self)
        self._arguments.__exit__(None, None, None)
        if kind is None:
            held = self.open
            self.realise()
            for ref in held:  # what somebody keeps holds its value, and none of the operands
                if (pending := ref()) is not None:
                    pending.node.root = pending.node.leaves = None  # type: ignore[assignment]
        self.open = []

    def realise(self) -> None:
        """Computes every pending that somebody holds."""
        found = [p for ref in self.open if (p := ref()) is not None and p.node.result is None]
        self.open = []
        for pending in sorted(found, key=lambda p: p.node.order):
            self.value(pending.node)

    # -- what is called

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if kinds and not kwargs:
            found = self._followed(function, args)
            if found is not None:
                return found
        linear = LINEAR.get(function)
        if linear is not None and self._defers():
            found = linear(self, function, args, kwargs or {})
            if found is not None:
                return found
        if kinds:
            return self.called(function, args, kwargs or {})
        if self.open and (inplace_function(function) or (kwargs and kwargs.get("out") is not None)):
            self.realise()
        return function(*args, **kwargs) if kwargs else function(*args)

    def _followed(self, function: Any, args: tuple) -> Pending | None:
        """A function of one pending, and at most one number that becomes a parameter, by what was remembered of it;
        None where all has to be looked at."""
        pending = args[0]
        number, first = None, True
        if len(args) == 2:
            number = args[1]
            if type(pending) is not Pending:
                pending, number, first = number, pending, False
            if type(number) is not float and type(number) is not int:
                return None
        elif len(args) != 1:
            return None
        if type(pending) is not Pending:
            return None
        node = pending.node
        if node.result is not None:
            return None
        state, root, leaves = node.state, node.root, node.leaves
        if number is None:
            after = state.steps.get(function)
        else:
            # the number itself where it is part of the formula
            after = state.steps.get((function, first, number))
            if after is None:
                after = state.steps.get((function, first))
                if after is None or number in formulas.KEPT:
                    return None
                for leaf in leaves:
                    if leaf is number:
                        return None
                leaves = (*leaves, number)
        if (
            after is None
            or node.norm is not None
            or root.cast is not None
            or (root.value is not None and state.bare and state.branches == 0)
            or torch.is_grad_enabled() is not root.grad
            or torch.is_autocast_enabled(root.device.type)
        ):
            return None
        made = _new(Pending, pending.form, dtype=after.dtype or root.dtype, device=root.device)
        made.node = Deferred(root, after, leaves)
        made.form = pending.form
        self.open.append(weakref.ref(made))
        return made

    def _defers(self) -> bool:
        """Whether a linear layer may wait: its value would be the same later."""
        if transforms_active() or forward_mode():
            return False
        # without gradients inside a region with them: a Function's forward, whose values nothing may follow
        if self.entered_with_grad and not torch.is_grad_enabled():
            return False
        return saved_tensor_hooks() == self.hooks and not torch._C._is_tracing()

    def called(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """A function with a pending among its arguments."""
        known = KNOWN.get(function)
        if known is not None:
            found = self._extended(known, args, kwargs, function)
            if found is not None:
                return found
        elif function in _GETTERS or function in _FACTS:
            with without_subclasses():
                return function(*args, **kwargs)
        elif function in _SHAPES:
            found = _shaped(self, function, args, kwargs)
            if found is not None:
                return found
        elif args and type(args[0]) is Pending and args[0].node.result is None:
            special = SPECIAL.get(function)
            if special is not None:
                found = special(self, args[0], function, args, kwargs)
                if found is not None:
                    return found
        if inplace_function(function) or kwargs.get("out") is not None:
            self.realise()
        args, kwargs = self.real_in_order(args, kwargs)
        return function(*args, **kwargs)

    def real_in_order(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments with values in place of pendings, of which the oldest is computed first."""
        found = [p.node for p in _pendings((args, kwargs)) if p.node.result is None]
        if len(found) > 1:
            for node in sorted(found, key=lambda n: n.order):
                self.value(node)
        return self.real(args), self.real(kwargs)

    def _real_aside(self, value: Any) -> Any:
        """`real` where the region is not asked first: nothing that is computed is pending."""
        with without_overrides():
            return self.real(value)

    def real(self, value: Any) -> Any:
        """The same with values in place of pendings, also in tuples, lists, dictionaries and what is like them."""
        kind = type(value)
        if kind is Pending:
            return self.value(value.node)
        if kind is tuple:
            return tuple([self.real(v) for v in value]) if value else value
        if kind is list:
            return [self.real(v) for v in value]
        if kind is dict:
            return {k: self.real(v) for k, v in value.items()}
        if value is None or kind in _LEAVES or isinstance(value, Tensor):
            return value
        # a NamedTuple, an ordered dictionary, whatever PyTorch's pytrees know
        return tree_map_only(Pending, lambda p: self.value(p.node), value)

    # -- pendings

    def _pending(self, node: Deferred, shape: Any = None) -> Pending:
        form = shape or node.root.shape
        pending = _new(Pending, form, dtype=node.dtype, device=node.root.device)
        pending.node = node
        pending.form = form
        self.open.append(weakref.ref(pending))
        return pending

    def deferred(
        self, x: Any, weight: Tensor, bias: Tensor | None, compute: Callable, shape: Any, channels: bool = False
    ) -> Any:
        """A pending pre-activation of rows x, or its value where that is known to be wanted."""
        site = self.memory.site(self.count)
        self.count += 1
        before = None
        if type(x) is Pending:
            node = x.node
            x = node.result
            if x is None:
                before = node
                x_dtype, x_device = node.dtype, node.root.device
                forked = node.root.site
                if forked.shared or (node.consumers and not forked.joins):
                    forked.shared = True
                    x, before = self.value(node), None
        if before is None:
            x_dtype, x_device = x.dtype, x.device
        device, dtype = x_device.type, weight.dtype
        if type(weight) not in _PLAIN or not (x_dtype.is_floating_point or x_dtype.is_complex):
            return None
        cast = None
        if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = cast = torch.get_autocast_dtype(device)
        elif x_dtype != dtype:
            return None
        if cast is not None and (weight.dtype.is_complex or x_dtype == torch.float64):
            return None
        if site.eager(shape):
            return compute(x if before is None else self.value(before))
        self.pendings += 1
        if before is not None:
            before.consumers += 1
        grad = torch.is_grad_enabled()
        root = Root(before or x, weight, bias, compute, shape, dtype, x_device, site, grad, cast, channels)
        if self.memory.recorder is not None:
            site.saw(weight, shape)
        return self._pending(Deferred(root, formulas.start(root.dtype), ()))

    def _extended(self, known: Function, args: tuple, kwargs: dict, function: Any = None) -> Any:
        """The pending that a pointwise function of pendings is; None where it is none."""
        if known.reversed:
            args = (args[1], args[0])
        me: Pending | None = None
        for a in args:
            if type(a) is Pending and a.node.result is None:
                if me is None:
                    me = a
                elif a.node.root is not me.node.root:
                    if a.form == me.form:
                        return self._met(known, args, kwargs)
                    # what is broadcast is an operand of the other's formula
                    smaller = a if math.prod(a.form) < math.prod(me.form) else me
                    self.value(smaller.node)
                    return self._extended(known, args[::-1] if known.reversed else args, kwargs, function)
        if me is None:
            return None
        node = me.node
        root, state = node.root, node.state
        if node.norm is not None or (root.value is not None and state.bare and state.branches == 0):
            return None
        if known.inplace and (type(args[0]) is not Pending or args[0].node.result is not None):
            return None
        name = known.name
        grad = torch.is_grad_enabled()
        if grad and not root.grad:
            return None
        cast = root.cast
        if cast is not None or torch.is_autocast_enabled(root.device.type):
            now = torch.get_autocast_dtype(root.device.type) if torch.is_autocast_enabled(root.device.type) else None
            if now != cast:
                return None
        detached = root.grad and not grad
        alone = state.branches == 0 if state.bare else state.branches < 2 and state.expression == _COPY
        # an operand of the layer itself; what is detached is none
        of_layer = alone and not kwargs and not detached and name in ("add", "mul")
        if of_layer and root.bias is None and name == "add":
            found = self._biased(me, args, known.inplace)
            if found is not None:
                return found
        given = _Given(me, name)
        literal = _LITERAL_FROM.get(name)
        try:
            if literal is None:
                codes = tuple([given.code(a) for a in args])
            else:
                codes = tuple([given.code(a) if i < literal else _literal(a) for i, a in enumerate(args)])
            named = tuple([(k, given.code(v)) for k, v in kwargs.items()]) if kwargs else ()
        except _NoFormula:
            # a modulation of its own for each group of rows is part of the layer
            return self._modulated(me, name, args, known.inplace) if of_layer else None
        if name == "detach":
            root.viewed = True  # it shares the memory of what it is detached from
        key = (name, known.inplace, detached, cast, codes, named)
        found = state.next.get(key, _MISSING)
        if found is _MISSING:
            found = self._first_time(known, given, args, kwargs, detached, root)
            formulas.remember(state, key, found)
            if found is not None and not (found[1] or detached or named or cast or name == "detach"):
                self._remember_step(function, state, codes, found[0], len(given.leaves) > len(node.leaves))
        if found is None:
            return None
        after, inplace = found
        new = Deferred(root, after, tuple(given.leaves))
        if not inplace:
            return self._pending(new, _shape_of(root, after))
        target = args[0]
        if root.viewed or target.node.consumers or target.node is not node:
            self._views(root)
            return None
        target.node = new
        return target

    def _first_time(self, known, given: _Given, args, kwargs, detached: bool, root: Root) -> Any:
        """The state that a function leads to, and whether it works in place; None where it leads to none."""
        literal = _LITERAL_FROM.get(known.name, len(args))
        expressions = tuple([given.expression(a) if i < literal else ("=", a) for i, a in enumerate(args)])
        named = tuple([(k, given.expression(v)) for k, v in kwargs.items()])
        dtype = given.result_type(known.name, expressions, named)
        if dtype is None:
            return None
        if dtype == root.dtype and _keeps_values(known.name, expressions):
            state = given.me.node.state
            branches = max(1, state.branches)
            copied = formulas.apply("clone", (state.expression,), (), branches, root.dtype, detached, None)
            return (state if known.inplace else copied), known.inplace
        branches = max([n.state.branches for n in given.nodes] + [1])
        after = formulas.apply(
            known.name, expressions, named, branches, root.dtype, detached, None if dtype == root.dtype else dtype
        )
        if after is None:
            return None
        inplace = known.inplace or _asks_inplace(known.name, args, kwargs)
        if inplace and dtype != root.dtype:
            return None
        return after, inplace

    @staticmethod
    def _remember_step(
        function: Any, state: formulas.State, codes: tuple, after: formulas.State, new_leaf: bool
    ) -> None:
        """Remembers what `_followed` takes: one pending, and at most one number that is no leaf yet."""
        if codes == ("me",):
            state.steps[function] = after
        elif len(codes) == 2 and "me" in codes:
            first = codes[0] == "me"
            code = codes[1] if first else codes[0]
            if code[0] == "=" and type(code[1]) is float and len(state.steps) < _MOST_STEPS:
                state.steps[function, first, code[1]] = after
            elif code[0] == "v" and len(code) == 2 and new_leaf:
                state.steps[function, first] = after

    def _biased(self, me: Pending, args: tuple, inplace: bool) -> Pending | None:
        """A bias that is added by hand becomes the layer's."""
        root = me.node.root
        other = args[1] if args[0] is me else args[0]
        if type(other) is Pending:
            other = other.node.result
        if type(other) not in _PLAIN or root.channels or other.dtype != root.weight.dtype or root.viewed:
            return None
        shape, features = other.shape, root.shape[-1]
        if not shape or shape[-1] != features or len(shape) > len(root.shape):
            return None
        if root.weight.dim() == 2:
            if other.numel() != features:
                return None
            bias = other if other.dim() == 1 else other.reshape(features)
        else:
            batch = root.weight.shape[:-2]
            if len(batch) != len(root.shape) - 2 or other.dim() < 2 or other.shape[-2] != 1:
                return None
            bias = other.squeeze(-2).expand(*batch, features)
        return self._replaced(me, root.weight, bias, lambda z: z + other, inplace)

    def _modulated(self, me: Pending, name: str, args: tuple, inplace: bool) -> Pending | None:
        """A shift or a factor for each group of rows: layers of a batch, with weights of their own."""
        root = me.node.root
        other = args[1] if args[0] is me else args[0]
        if type(other) is Pending:
            other = other.node.result
        shape = root.shape
        if type(other) not in _PLAIN or root.channels or root.complex or len(shape) != 3:
            return None
        if root.weight.dim() == 3 and root.weight.shape[0] != shape[0]:
            return None
        features, rows = shape[-1], shape[1]
        if other.shape == shape and rows > 1 and other.stride(1) == 0:  # expanded by hand
            other = other[:, :1]
        if other.shape != (shape[0], 1, features) or other.dtype != root.weight.dtype or root.viewed:
            return None
        if rows < 2 * features:  # gradients of the weights of a group would be larger than its activations
            return None
        by = other.squeeze(1)
        weight, bias = root.weight, root.bias
        if name == "add":
            weight = weight.expand(shape[0], *weight.shape[-2:])
            bias = by if bias is None else bias + by
            return self._replaced(me, weight, bias, lambda z: z + other, inplace)
        weight = weight * by.unsqueeze(-1)
        bias = None if bias is None else bias * by
        return self._replaced(me, weight, bias, lambda z: z * other, inplace)

    def _replaced(self, me: Pending, weight, bias, more: Callable, inplace: bool) -> Pending:
        """The same layer with another weight or bias; `more` makes its pre-activation from the former one."""
        old = me.node.root
        before = me.node

        def compute(x):
            return more(old.compute(x))

        new = Root(
            old.x, weight, bias, compute, old.shape, old.dtype, old.device, old.site, old.grad, old.cast, old.channels
        )
        node = Deferred(new, formulas.start(new.dtype), ())
        if not inplace:
            return self._pending(node)
        node.order = before.order
        me.node = node
        return me

    def _met(self, known: Function, args: tuple, kwargs: dict) -> Any:
        """Formulas of two layers with the same rows: one layer of both weights, with a branch for each."""
        nodes = [a.node for a in args if type(a) is Pending and a.node.result is None]
        if len(nodes) != 2 or kwargs or known.inplace:
            return None
        a, b = nodes
        r, s = a.root, b.root
        rows, same = r.x, r.x is s.x
        if type(rows) is Deferred and not same:
            # the second layer made it a value: next time both may wait for it
            same = rows.result is s.x or (type(s.x) is Deferred and s.x.result is rows.result is not None)
            rows.root.site.joins, rows.root.site.shared = same, not same
        if not same or r.weight.shape != s.weight.shape or r.weight.dim() != 2 or r.complex or s.complex:
            return None
        if (r.bias is None) != (s.bias is None) or r.channels or s.channels or r.grad != s.grad or r.cast != s.cast:
            return None
        if (
            max(a.state.branches, b.state.branches) > 1
            or a.norm
            or b.norm
            or r.value is not None
            or s.value is not None
        ):
            return None
        if r.site.shared or s.site.shared or a.state.dtype or b.state.dtype:
            return None
        weight = torch.cat([r.weight, s.weight])
        bias = None if r.bias is None else torch.cat([r.bias, s.bias])

        def compute(x):
            return torch.stack([r.compute(x), s.compute(x)])

        root = Root(r.x, weight, bias, compute, r.shape, r.dtype, r.device, r.site, r.grad, r.cast)
        root.branches = 2
        root.partner = s.site
        if type(rows) is Deferred:
            rows.consumers = 1
        moved = []
        for node, branch in ((a, 0), (b, 1)):
            leaves = tuple(range(len(node.leaves)))
            expression = formulas.shifted(node.state.expression, leaves, branch)
            new = Deferred(root, formulas.state_of(expression, 2, root.dtype), node.leaves)
            moved.append(self._pending(new))
        both = iter(moved)
        again = tuple(next(both) if type(v) is Pending and v.node.result is None else v for v in args)
        if known.reversed:
            again = again[::-1]
        return self._extended(known, again, kwargs)

    def _views(self, root: Root) -> None:
        """Makes values of a root and of all that is pending of it, views as views of one tensor."""
        z = self._z(root)
        found = [p for ref in self.open if (p := ref()) is not None and p.node.root is root]
        for pending in sorted(found, key=lambda p: p.node.order):
            node = pending.node
            if node.result is None:
                node.result = z if node.state.bare and node.state.branches == 0 else self.by_pytorch(node)

    # -- values

    def value(self, node: Deferred) -> Tensor:
        """The value of a node, computed where it is not known yet."""
        if node.result is None:
            root = node.root
            if node.consumers:
                root.site.shared = True  # next time before the layer that takes it as its rows
            if root.cast is None and torch.is_grad_enabled() is root.grad:
                if not torch.is_autocast_enabled(root.device.type):
                    return self._kept(node, self._computed(node))
            with _as_at(root):
                return self._kept(node, self._computed(node))
        return node.result

    @staticmethod
    def _kept(node: Deferred, value: Tensor) -> Tensor:
        """A node's value, from now on the root's too where it is the pre-activation: views are views of it."""
        node.result = value
        if node.state.bare and node.state.branches == 0 and node.root.value is None:
            node.root.value = value
        return value

    def _computed(self, node: Deferred) -> Tensor:
        root = node.root
        activation = self._activation(node)
        if activation is not None and root.value is None:
            try:
                return self._fused(node, activation)
            except (TypeError, ValueError, NotImplementedError) as error:
                root.site.off = f"the fused operation refuses it: {error}"
                root.site.left(root.site.off)
                x = root.x
                root.value = root.compute(self.value(x) if type(x) is Deferred else x)
        elif activation is not None and not node.state.bare:
            # the pre-activation was wanted, too: at the next call it is computed at once
            root.site.value = True
        return self.normed(node.norm, self.by_pytorch(node))

    def _fused(self, node: Deferred, activation: Activation) -> Tensor:
        """The value by fused operations: of the layer, or of the chain of layers that ends in it."""
        root, x = node.root, node.root.x
        if type(x) is not Deferred and node.state.dtype is None and node.norm is None and not node.state.bare:
            if not (root.channels or root.complex or x.is_complex()):
                if root.site.memory.recorder is not None:
                    root.site.ran([(node, activation)], None)
                return linear_act(x, root.weight, root.bias, activation)
        chain = [(node, activation)]
        while type(x) is Deferred and x.result is None and self._joins(x, root):
            before = self._activation(x)
            if before is None:
                break
            chain.append((x, before))
            x = x.root.x
        if type(x) is Deferred:
            x = self.value(x)
        chain.reverse()
        if len(chain) > 1 or node.norm is not None:
            whole = self._network(x, chain)
            if whole is not None:
                return whole
        complex_rows = x.is_complex()
        for n, a in chain:
            if n.state.bare and not (n.root.complex and complex_rows and x.dtype not in _COMPLEX):
                n.root.value = x = n.root.compute(x)
                complex_rows = x.is_complex()
                continue
            n.root.site.ran([(n, a)], None)
            x = self._layer(x, n, a, complex_rows)
            complex_rows = n.dtype in _COMPLEX
            if not complex_rows:
                n.result = x
        return _joined(x) if complex_rows and not x.is_complex() else x

    @staticmethod
    def _joins(node: Deferred, root: Root) -> bool:
        """Whether a node can be a layer of one network with the layer that takes it as its rows."""
        r = node.root
        return (
            r.value is None
            and r.grad == root.grad
            and r.cast == root.cast
            and r.channels == root.channels
            and (node.dtype in _COMPLEX) == root.complex
            and (node.state.dtype is None or node.dtype in _COMPLEX)
        )

    def _activation(self, node: Deferred) -> Activation | None:
        """The activation that a node's formula is, None where PyTorch computes it."""
        root, state = node.root, node.state
        if state.bare:
            if state.branches > 1 or node.root.branches:
                return None
            return _identity()
        matched = state.matched(node.leaves, root.complex, node.dtype in _COMPLEX)
        if matched is None:
            root.site.left(state.reason)
            return None
        features = root.features if root.branches else root.features // max(1, state.branches)
        return root.site.activation(matched, node.leaves, features)

    def _network(self, x: Tensor, chain: list[tuple[Deferred, Activation]]) -> Tensor | None:
        """The chain as one operation; None where it goes layer by layer."""
        first = chain[0][0].root
        if first.channels or any(n.root.weight.dim() != 2 for n, _ in chain):
            return None
        if first.site.memory.layers_only:
            return None
        operands = first.site.operands(chain, x.is_complex())
        rows = _separated(x) if x.is_complex() else x
        direction = "forward"
        if not operands.tracked(x):
            direction = "inference"
        decision = _op.decide(rows, operands, direction)
        if decision.way != "network":
            return None
        last = chain[-1][0]
        last.root.site.ran(chain, decision)
        y = _op.network(rows, operands, decision, True)
        if last.dtype in _COMPLEX:
            return _joined(y)
        return y if y.dtype == last.dtype else y.to(last.dtype)

    def _layer(self, x: Tensor, node: Deferred, activation: Activation, complex_rows: bool) -> Tensor:
        """One layer by itself; complex columns come as real parts beside imaginary parts."""
        root = node.root
        if x.is_complex():
            x = _separated(x)
        rows = x.transpose(1, 2) if root.channels else x
        weight, bias = root.blocks(complex_rows)
        y = linear_act(rows, weight, bias, activation)
        if root.channels:
            y = y.transpose(1, 2).contiguous()
        dtype = node.state.dtype
        if dtype is not None and y.dtype != dtype and dtype not in _COMPLEX:
            y = y.to(dtype)
        return self.normed(node.norm, y)

    @staticmethod
    def normed(norm: Norm | None, y: Tensor) -> Tensor:
        """The norm of y by PyTorch's own functions, y where there is none."""
        if norm is None:
            return y
        if norm.kind == "layer":
            return F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)
        return F.rms_norm(y, y.shape[-1:], norm.weight, norm.eps)

    def _z(self, root: Root) -> Tensor:
        """The pre-activation of a root."""
        if root.value is None:
            with _as_at(root):
                x = root.x
                if type(x) is Deferred:
                    # together with the layers before it, where they are one network
                    if x.result is None and not root.branches:
                        node = Deferred(root, formulas.start(root.dtype), ())
                        y = self._computed(node)
                        root.value = y
                        return y
                    x = self.value(x)
                root.value = root.compute(x)
        return root.value

    def by_pytorch(self, node: Deferred) -> Tensor:
        """The value by the functions that the model calls."""
        root, state = node.root, node.state
        z = self._z(root)
        if state.bare and state.branches == 0:
            return z
        if root.branches:
            zs = tuple(z.unbind(0))
        else:
            zs = (z,) if state.branches < 2 else z.chunk(state.branches, -1)
        return evaluate(state.expression, zs, node.leaves)


#: Arguments from this position on are part of the formula.
_LITERAL_FROM = {"softplus": 2}


def _literal(a: Any) -> tuple:
    if isinstance(a, float | int):
        return "=", float(a)
    raise _NoFormula


class _NoFormula(Exception):
    """An argument that no formula takes."""


class _Given:
    """The arguments of a function as codes, by which a state remembers it, and as expressions."""

    __slots__ = ("features", "leaves", "me", "name", "ndim", "nodes", "numbers", "root")

    def __init__(self, me: Pending, name: str):
        self.me, self.name = me, name
        self.root = me.node.root
        self.leaves = list(me.node.leaves)
        self.nodes = [me.node]
        self.numbers: dict[int, float] = {}
        shape = _shape_of(self.root, me.node.state)
        self.features, self.ndim = shape[-1], len(shape)

    def code(self, a: Any) -> Any:
        """A hashable description, in which tensors, pendings and most numbers are positions of leaves."""
        kind = type(a)
        if kind is Pending:
            node = a.node
            if node.result is None:
                if node is self.me.node:
                    return "me"
                if node.norm is not None:
                    raise _NoFormula
                mine, other = self.me.node.state.branches, node.state.branches
                if mine != other and max(mine, other) > 1:
                    raise _NoFormula
                self.nodes.append(node)
                return node.state, tuple([self._leaf(leaf) for leaf in node.leaves])
            a = node.result
            kind = type(a)
        if kind is float or kind is int:
            if formulas.keeps(self.name, a):
                return "=", float(a)
            return "v", self._leaf(a)
        if kind in _PLAIN:
            if a.dim() == 0 and a.dtype in _INTEGERS and a.device.type == "cpu":
                return self.code(self._converted(a, a.item()))
            return "v", self._leaf(a), self._tensor_kind(a), a.dtype
        if a is None or kind is bool or kind is str:
            return kind, a
        if kind is complex and a.real == 0:
            if a.imag in formulas.KEPT:
                return "=", a
            return "j", self._leaf(self._converted(a, a.imag))
        if isinstance(a, float | int):  # NumPy's, say
            return self.code(self._converted(a, float(a)))
        raise _NoFormula

    def _converted(self, a: Any, value: float) -> float:
        """The number that stands for an argument: the same object whenever it is asked for."""
        return self.numbers.setdefault(id(a), value)

    def _leaf(self, leaf: Any) -> int:
        for i, known in enumerate(self.leaves):
            if known is leaf:
                return i
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def _tensor_kind(self, t: Tensor) -> str:
        if not t.dtype.is_floating_point or t.device != self.root.device or t.dim() > self.ndim:
            raise _NoFormula
        if t.numel() == 1:
            return "one"
        if t.shape[-1] == self.features and t.numel() == self.features and not self.root.channels:
            return "each"
        raise _NoFormula

    def expression(self, a: Any) -> Any:
        """The same as an expression."""
        if type(a) is Pending and a.node.result is None:
            node = a.node
            if node is self.me.node:
                return node.state.expression
            return formulas.shifted(node.state.expression, tuple([self._leaf(v) for v in node.leaves]), 0)
        code = self.code(a)
        if code[0] == "v":
            return "v", code[1]
        if code[0] == "j":
            return "mul", (("=", 1j), ("v", code[1])), ()
        return "=", a if code[0] == "=" else code[1]

    def result_type(self, name: str, args: tuple, kwargs: tuple) -> torch.dtype | None:
        """The type of the function's value; None where PyTorch refuses the arguments, or the shape is another."""
        root = self.root
        z = torch.full((1,) * (self.ndim - 1) + (self.features,), 0.5, dtype=root.dtype, device=root.device)
        count = max(1, max(n.state.branches for n in self.nodes))
        with torch.no_grad():
            try:
                given = {k: v for k, v in kwargs if k not in ("inplace",)}
                y = evaluate((name, args, tuple(given.items())), (z,) * count, tuple(self.leaves))
            except Exception:
                return None
        return y.dtype if isinstance(y, Tensor) and y.shape == z.shape else None


def _asks_inplace(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function's `inplace` argument is true."""
    if kwargs.get("inplace"):
        return True
    from .symbolic import FORMULAS

    names = list(inspect.signature(FORMULAS[name]).parameters)
    return "inplace" in names and len(args) > names.index("inplace") and bool(args[names.index("inplace")])


def _keeps_values(name: str, expressions: tuple) -> bool:
    """Whether a function multiplies or divides by 1."""
    one = ("=", 1.0)
    return (name in ("mul", "div") and expressions[1] == one) or (name == "mul" and expressions[0] == one)


#: A copy of a pre-activation.
_COPY = ("clone", (("z", 0),), ())
_MISSING = object()
#: Steps that a state remembers.
_MOST_STEPS = 64
_identity_activation: Activation | None = None


def _identity() -> Activation:
    global _identity_activation
    if _identity_activation is None:
        _identity_activation = lookup("identity")()
    return _identity_activation


@contextlib.contextmanager
def _as_at(root: Root) -> Iterator[None]:
    """Grad mode and autocast as they were where the layer was called."""
    device = root.device.type
    grad = torch.is_grad_enabled()
    cast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    if grad == root.grad and cast == root.cast:
        yield
        return
    with contextlib.ExitStack() as stack:
        if grad != root.grad:
            stack.enter_context(torch.set_grad_enabled(root.grad))
        if cast != root.cast:
            stack.enter_context(torch.autocast(device, dtype=root.cast, enabled=root.cast is not None))
        yield


def _separated(x: Tensor) -> Tensor:
    """Real parts beside imaginary parts."""
    return torch.cat([x.real, x.imag], -1)


def _joined(y: Tensor) -> Tensor:
    """The complex numbers of which real parts lie beside imaginary parts."""
    re, im = y.chunk(2, -1)
    return torch.complex(re, im)


# -- linear layers, however they are written


def _args(names: tuple[str, ...], args: tuple, kwargs: dict) -> list | None:
    if len(args) > len(names) or any(k not in names for k in kwargs):
        return None
    found = list(args) + [None] * (len(names) - len(args))
    for k, v in kwargs.items():
        found[names.index(k)] = v
    return found


def _value_of(region: Region, t: Any) -> Any:
    return region.value(t.node) if type(t) is Pending else t


def _linear(region: Region, function, args, kwargs):
    if len(args) == 3 and not kwargs:
        x, w, b = args
    else:
        given = _args(("input", "weight", "bias"), args, kwargs)
        if given is None:
            return None
        x, w, b = given
    site = region.memory.site(region.count)
    if site.same is None or site.same[0] is not w or site.same[1] is not b:
        w, b = _value_of(region, w), _value_of(region, b)
        if (
            type(w) not in _PLAIN
            or w.dim() != 2
            or (b is not None and (type(b) not in _PLAIN or b.shape != w.shape[:1]))
        ):
            return None
        if type(w) is torch.nn.Parameter and (b is None or type(b) is torch.nn.Parameter):
            site.same = w, b
    kind = type(x)
    if kind is Pending:
        shape = x.form
    elif kind in _PLAIN:
        shape = x.shape
    else:
        return None
    features, columns = w.shape
    if not shape or shape[-1] != columns:
        return None
    shape = (shape[0], features) if len(shape) == 2 else (*shape[:-1], features)
    return region.deferred(x, w, b, lambda x: function(x, w, b), shape)


def _matmul(region: Region, function, args, kwargs):
    given = _args(("input", "other"), args, kwargs) if "mat2" not in kwargs else None
    if given is None or len(args) != 2:
        return None
    x, v = given
    v = _value_of(region, v)
    if type(x) not in _ROWS or type(v) not in _PLAIN or v.dim() < 2 or x.dim() < 2:
        return None
    if x.shape[-1] != v.shape[-2] or (v.dim() > 2 and (x.dim() != v.dim() or x.shape[:-2] != v.shape[:-2])):
        return None
    if v.dim() > 2 and v.dtype.is_complex:
        return None
    weight = v.transpose(-1, -2)
    return region.deferred(x, weight, None, lambda x: function(x, v), (*x.shape[:-1], v.shape[-1]))


def _addmm(region: Region, function, args, kwargs):
    if len(args) != 3 or kwargs:
        return None
    b, x, v = args
    b, v = _value_of(region, b), _value_of(region, v)
    if type(x) not in _ROWS or type(v) not in _PLAIN or type(b) not in _PLAIN or v.dim() != x.dim():
        return None
    features = v.shape[-1]
    if v.dim() == 2:
        bias = b if b.dim() == 1 else b[0] if b.dim() == 2 and b.shape[0] == 1 else None
    else:
        bias = b.squeeze(-2) if b.dim() == 3 and b.shape[:2] == (v.shape[0], 1) else None
    if bias is None or bias.shape[-1] != features:
        return None
    weight = v.transpose(-1, -2)
    return region.deferred(x, weight, bias, lambda x: function(b, x, v), (*x.shape[:-1], features))


def _conv1d(region: Region, function, args, kwargs):
    given = _args(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
    if given is None:
        return None
    x, w, b, stride, padding, _, groups = given
    w, b = _value_of(region, w), _value_of(region, b)
    if type(x) not in _ROWS or type(w) not in _PLAIN or w.dim() != 3 or x.dim() != 3 or w.shape[2] != 1:
        return None
    if stride not in (None, 1, (1,), [1]) or padding not in (None, 0, (0,), [0]) or groups not in (None, 1):
        return None
    if x.shape[1] != w.shape[1] or w.dtype.is_complex:
        return None

    def compute(x):
        return function(x, w, b)

    shape = (x.shape[0], w.shape[0], x.shape[2])
    return region.deferred(x, w.squeeze(2), b, compute, shape, channels=True)


#: Functions that are linear layers.
LINEAR: dict[Any, Callable] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch.addmm: _addmm,
    torch.baddbmm: _addmm,
    F.conv1d: _conv1d,
    torch.conv1d: _conv1d,
}


# -- functions of one pending that are neither values nor formulas


def _requires_grad(region, me, function, args, kwargs):
    return _tracked(me.node)


def _chunk(region: Region, me: Pending, function, args, kwargs):
    given = _args(("input", "chunks", "dim"), args, kwargs)
    return None if given is None or type(given[1]) is not int else _parted(region, me, given[1], given[2] or 0)


def _split(region: Region, me: Pending, function, args, kwargs):
    given = _args(("input", "split_size", "dim"), args, kwargs)
    if given is None:
        given = _args(("input", "split_size_or_sections", "dim"), args, kwargs)
    if given is None:
        return None
    size, features = given[1], me.node.root.features
    if isinstance(size, _SEVERAL):
        if len(set(size)) != 1 or sum(size) != features:
            return None
        size = size[0]
    if type(size) is not int or size < 1 or features % size:
        return None
    return _parted(region, me, features // size, given[2] or 0)


def _glu(region: Region, me: Pending, function, args, kwargs):
    given = _args(("input", "dim"), args, kwargs)
    if given is None:
        return None
    parts = _parted(region, me, 2, -1 if given[1] is None else given[1])
    if parts is None:
        return None
    gate = region.called(torch.sigmoid, (parts[1],), {})
    return region.called(torch.mul, (parts[0], gate), {})


def _parted(region: Region, me: Pending, branches: int, dim: int) -> tuple[Pending, ...] | None:
    node = me.node
    root = node.root
    if not (node.state.bare and node.state.branches == 0) or root.value is not None or root.complex or root.channels:
        return None
    if node.norm is not None or dim not in (-1, len(root.shape) - 1) or root.shape[-1] % branches or branches < 2:
        return None
    root.viewed = True
    shape = (*root.shape[:-1], root.shape[-1] // branches)
    return tuple(
        region._pending(Deferred(root, formulas.branch(i, branches, root.dtype), ()), shape) for i in range(branches)
    )


def _getitem(region: Region, me: Pending, function, args, kwargs):
    """A slice of columns that is one of several equal parts."""
    if len(args) != 2 or kwargs or type(args[1]) is not tuple:
        return None
    root = me.node.root
    index, whole = args[1], slice(None)
    if len(index) == 2 and index[0] is Ellipsis:
        last = index[1]
    elif len(index) == len(root.shape) and all(type(i) is slice and i == whole for i in index[:-1]):
        last = index[-1]
    else:
        return None
    if type(last) is not slice:
        return None
    features = root.shape[-1]
    start, stop, step = last.indices(features)
    width = stop - start
    if step != 1 or width < 1 or width == features or features % width or start % width:
        return None
    branches, state = features // width, me.node.state
    if branches > 8 or not (state.bare and state.branches == 0) or root.value is not None or root.complex:
        return None
    if root.channels or me.node.norm is not None:
        return None
    root.viewed = True
    node = Deferred(root, formulas.branch(start // width, branches, root.dtype), ())
    return region._pending(node, (*root.shape[:-1], width))


def _shaped(region: Region, function, args, kwargs):
    """A tensor in the shape of a pending."""
    if len(args) != 2 or kwargs or type(args[1]) is not Pending or type(args[0]) is Pending:
        return None
    return args[0].expand(args[1].form) if function is Tensor.expand_as else args[0].reshape(args[1].form)


def _dropout(region, me, function, args, kwargs):
    given = _args(("input", "p", "training", "inplace"), args, kwargs)
    if given is None:
        given = _args(("input", "p", "train"), args, kwargs)
    if given is None:
        return None
    p, training = (0.5 if given[1] is None else given[1]), (True if given[2] is None else given[2])
    return me if p == 0 or not training else None


def _same(region, me, function, args, kwargs):
    """A pending will be contiguous, and is itself then."""
    return me if len(args) == 1 and not kwargs else None


def _reshaped(region, me, function, args, kwargs):
    """A pending in the shape that it has is itself."""
    shape = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
    if kwargs or not isinstance(shape, tuple | list) or not all(type(n) is int for n in shape):
        return None
    form, known = tuple(me.form), math.prod(n for n in shape if n != -1)
    if -1 in shape and known:
        shape = [math.prod(form) // known if n == -1 else n for n in shape]
    return me if tuple(shape) == form else None


def _cast(region, me, function, args, kwargs):
    """A conversion to the type that the value has."""
    return me if len(args) == 1 and not kwargs and me.dtype is _FLOAT[function] else None


def _to(region, me, function, args, kwargs):
    if len(args) != 2 or kwargs:
        return None
    wanted = args[1]
    if isinstance(wanted, torch.dtype):
        return me if wanted is me.dtype else None
    if isinstance(wanted, torch.device):
        return me if wanted == me.device else None
    if isinstance(wanted, Tensor):
        return me if wanted.dtype is me.dtype and wanted.device == me.device else None
    return None


def _layer_norm(region: Region, me: Pending, function, args, kwargs):
    given = _args(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    return None if given is None else _normed(region, me, "layer", *given[1:])


def _rms_norm(region: Region, me: Pending, function, args, kwargs):
    given = _args(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    return None if given is None or given[3] is None else _normed(region, me, "rms", given[1], given[2], None, given[3])


def _normed(region, me, kind, shape, weight, bias, eps):
    node = me.node
    root = node.root
    if node.state.bare or node.norm is not None or root.complex or root.channels or root.cast is not None:
        return None
    if (not root.grad and torch.is_grad_enabled()) or (root.grad and not torch.is_grad_enabled()) or node.state.dtype:
        return None
    columns = root.features if root.branches else root.features // max(1, node.state.branches)
    if tuple(shape) != (columns,) or any(t is not None and type(t) not in _PLAIN for t in (weight, bias)):
        return None
    new = Deferred(root, node.state, node.leaves)
    new.norm = Norm(kind, weight, bias, 1e-5 if eps is None else float(eps))
    return region._pending(new, _shape_of(root, node.state))


SPECIAL: dict[Any, Callable] = {
    _REQUIRES_GRAD: _requires_grad,
    _GETITEM: _getitem,
    F.glu: _glu,
    Tensor.contiguous: _same,
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    torch.reshape: _reshaped,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    Tensor.to: _to,
    **dict.fromkeys(_CHUNK, _chunk),
    **dict.fromkeys(_SPLIT, _split),
    **dict.fromkeys(_DROPOUT, _dropout),
    **dict.fromkeys(_FLOAT, _cast),
}


class _Regions(threading.local):
    def __init__(self) -> None:
        self.stack: list[Region] = []


_regions = _Regions()


def current() -> Region | None:
    """The region that runs, None outside of any."""
    return _regions.stack[-1] if _regions.stack else None


_outside = Region(Memory())
