"""What PyTorch puts around an operation: opcheck, torch.func, compile, export, autocast, threads, copies."""

import copy
import threading

import pytest
import torch
from linear_act_oracle import eager, expected, problem, pytest_generate_tests, using  # noqa: F401
from tolerances import tolerance, worst
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_inr as fi
from fused_inr import backends, native
from fused_inr.functional import linear_act
from fused_inr.ops import raw

CLOSE = {"rtol": tolerance("same arithmetic"), "atol": tolerance("same arithmetic")}
#: one branch, parameters; four branches; two branches and two outputs
ACTIVATIONS = {
    "sine": lambda: fi.activations.sine(omega=3.0),
    "split": lambda: fi.activations.split(m=2.0, omegas=(1.0, 0.9, 2.0, 1.1)),
    "complex_gabor": lambda: fi.activations.complex_gabor(omega=2.0, scale=0.5),
}


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]()


def tensors(activation, m=5, k=3, n=4, dtype=torch.float64, batch=()):
    """x, weight, bias."""
    rows = activation.branches * n
    return (
        torch.randn(*batch, m, k, dtype=dtype),
        torch.randn(*batch, rows, k, dtype=dtype) * 0.5,
        torch.randn(*batch, rows, dtype=dtype) * 0.5,
    )


# -- opcheck


def raw_samples(backend: str):
    """Arguments of the three raw operations: types, layouts, what is saved, what is needed, batches, parameters."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    for name, dtype, batch, options in [
        ("sine", torch.float32, (), {}),
        ("sine", torch.float64, (), {"bias": False, "save": False}),
        ("sine", torch.float32, (), {"params": "feature", "transposed": True}),
        ("gaussian", torch.float32, (), {"params": "scalar", "needs": [True, False, False, True]}),
        ("split", torch.float64, (), {"save": False, "needs": [False, True, True, False]}),
        ("split", torch.float32, (2,), {}),
        ("complex_gabor", torch.float32, (3,), {"params": "feature", "bias": False}),
        ("fourier", torch.bfloat16, (), {"save": False}),
        ("relu", torch.float16, (), {"save": False, "needs": [True, False, False, False]}),
    ]:
        act = fi.activations.get(name)
        x, weight, bias = tensors(act, 6, 3, 5, dtype, batch)
        bias = bias if options.get("bias", True) else None
        if options.get("transposed"):
            x, weight = (t.t().contiguous().t() for t in (x, weight))
        kind = options.get("params")
        shape = (5,) if kind == "feature" else ()
        work = torch.float64 if dtype == torch.float64 else torch.float32
        params = [torch.full(shape, v, dtype=work) if kind else None for v in act.params.values()]
        constants = [0.0 if kind else v for v in act.params.values()]
        save = options.get("save", True)
        needs = options.get("needs", [True, True, bias is not None, bool(kind)])
        rest = (params, constants)
        mode = precision.get(dtype, "ieee")
        forward = (x, weight, bias, *rest, name, backend, mode, "preactivations" if save else "")
        g = torch.randn(*batch, 6, act.outputs * 5, dtype=dtype)
        z = torch.randn(*batch, 6, act.branches * 5, dtype=work) if save else None
        backward = (g, x, weight, bias, *rest, z, name, backend, mode, needs)
        rows = [torch.randn(6, k * 5, dtype=work) for k in (act.branches, act.outputs, act.branches)]
        if options.get("transposed"):
            rows[1] = torch.randn(1, act.outputs * 5).expand(6, -1)
        maps = [
            ([rows[0]], *rest, name, backend, 0, False),
            (rows[:2], *rest, name, backend, 1, bool(kind)),
            *([] if kind else [(rows, *rest, name, backend, 2, False)]),
        ]
        yield forward, backward, maps


def test_opcheck_of_every_operation(exact_backend):
    seen = [0, 0, 0]
    with using(exact_backend):
        for forward, backward, maps in raw_samples(exact_backend):
            opcheck(raw.linear_act, forward)
            opcheck(raw.linear_act_backward, backward)
            for arguments in maps:
                opcheck(raw.act_map, arguments)
            seen = [seen[0] + 1, seen[1] + 1, seen[2] + len(maps)]
    assert min(seen) >= 6


def test_opcheck_of_the_native_operators():
    """Called inside the operations above, so never traced; their schemas must still tell the truth."""
    with using("cpu"):
        native = torch.ops.fused_inr_native
        for forward, backward, maps in raw_samples("cpu"):
            x, weight, bias, params, constants, name, _, _, keep = forward
            opcheck(
                native.linear_act.default,
                (x, weight, bias, params, constants, name, bool(keep)),
                test_utils="test_schema",
            )
            g, x, weight, bias, params, constants, z, name, _, _, needs = backward
            arguments = (g, x, weight, bias, params, constants, z, name, needs)
            opcheck(native.linear_act_backward.default, arguments, test_utils="test_schema")
            for inputs, params, constants, name, _, level, learnable in maps:
                arguments = (inputs, params, constants, name, level, learnable)
                opcheck(native.act_map.default, arguments, test_utils="test_schema")


def test_fake_tensors_have_the_shapes_types_and_strides_of_the_real_ones(exact_backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with using(exact_backend):
        for forward, backward, maps in raw_samples(exact_backend):
            calls = [(raw.linear_act, forward), (raw.linear_act_backward, backward), *((raw.act_map, m) for m in maps)]
            for op, arguments in calls:
                real = op(*arguments)
                with FakeTensorMode() as mode:
                    as_fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
                    fake = op(*torch.utils._pytree.tree_map(as_fake, arguments))
                for r, f in zip(real, fake, strict=True):
                    assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), (op, arguments[-5:])


# -- torch.func


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev of hessian": lambda f: jacrev(hessian(f)),
    "grad of grad": lambda f: grad(lambda v: grad(f)(v).sin().sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_over_x_weight_and_bias(activation, transform, exact_backend):
    args = tensors(activation, 3, 2, 2)

    def scalar(f, position):
        return lambda v: f(*args[:position], v, *args[position + 1 :], activation).sin().sum()

    for position in range(3):
        theirs = TRANSFORMS[transform](scalar(eager, position))(args[position])
        with using(exact_backend):
            ours = TRANSFORMS[transform](scalar(linear_act, position))(args[position])
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("per_feature", [False, True], ids=["scalar", "per feature"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_over_learnable_parameters(transform, per_feature, exact_backend):
    activation = fi.activations.sine()
    x, weight, bias = tensors(activation, 3, 2, 2)
    omega = torch.tensor([2.0, 2.5] if per_feature else 2.0, dtype=torch.float64)

    def scalar(f):
        return lambda omega: f(x, weight, bias, activation.with_params(omega=omega)).sin().sum()

    with using(exact_backend):
        ours = TRANSFORMS[transform](scalar(linear_act))(omega)
    torch.testing.assert_close(ours, TRANSFORMS[transform](scalar(eager))(omega), **CLOSE)


def test_mixed_derivatives_of_weights_and_parameters(exact_backend):
    """d/d omega of the gradient with respect to x: what the first backward is not asked for, the second needs."""
    activation = fi.activations.sine()
    x, weight, bias = tensors(activation, 3, 2, 2)
    omega = torch.tensor(2.0, dtype=torch.float64)

    def mixed(f):
        def slope(x, omega):
            return grad(lambda x: f(x, weight, bias, activation.with_params(omega=omega)).sum())(x)

        return jacrev(slope, argnums=1)(x, omega), jacfwd(slope, argnums=1)(x, omega)

    with using(exact_backend):
        ours = mixed(linear_act)
    for a, b in zip(ours, mixed(eager)):
        torch.testing.assert_close(a, b, **CLOSE)


def test_jvp_and_vjp(activation, exact_backend):
    args, tangents = tensors(activation), tensors(activation)

    def run(f):
        g = lambda *t: f(*t, activation)  # noqa: E731
        y, pull = vjp(g, *args)
        everything = jvp(g, args, tangents)
        only_x = jvp(lambda x: g(x, *args[1:]), args[:1], tangents[:1])
        return y, *pull(torch.ones_like(y)), *everything, *only_x

    with using(exact_backend):
        ours = run(linear_act)
    for a, b in zip(ours, run(eager), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_forward_mode_of_autograd(activation, exact_backend):
    import torch.autograd.forward_ad as fwAD

    args, tangents = tensors(activation), tensors(activation)
    with using(exact_backend), fwAD.dual_level():
        duals = [fwAD.make_dual(a, t) for a, t in zip(args, tangents)]
        y, tangent = fwAD.unpack_dual(linear_act(*duals, activation))
    expected_y, expected_tangent = jvp(lambda *t: eager(*t, activation), args, tangents)
    torch.testing.assert_close(y, expected_y, **CLOSE)
    torch.testing.assert_close(tangent, expected_tangent, **CLOSE)


IN_DIMS = {
    "x": (0, None, None),
    "weight": (None, 0, None),
    "bias": (None, None, 0),
    "weight and bias": (None, 0, 0),
    "everything": (0, 0, 0),
    "x, last": (-1, None, None),
    "weight, middle": (None, 1, None),
}


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("dims", IN_DIMS)
def test_vmap(activation, dims, exact_backend):
    in_dims = IN_DIMS[dims]
    args = [
        t if d is None else torch.stack([t + 0.1 * i for i in range(4)], d)
        for t, d in zip(tensors(activation), in_dims)
    ]

    def run(f):
        g = lambda *t: f(*t, activation)  # noqa: E731
        loss = lambda *t: g(*t).square().sum()  # noqa: E731
        return (
            vmap(g, in_dims)(*args),
            *vmap(grad(loss, argnums=(0, 1, 2)), in_dims)(*args),
            vmap(jacrev(g), in_dims)(*args),
            vmap(
                vmap(
                    lambda row: g(
                        row[None], *(t if d is None else t.select(d, 0) for t, d in zip(args[1:], in_dims[1:]))
                    )
                )
            )(torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
        )

    with using(exact_backend):
        ours = run(linear_act)
    for a, b in zip(ours, run(eager), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_vmap_over_learnable_parameters(exact_backend):
    activation = fi.activations.gaussian(sigma=1.0)
    x, weight, bias = tensors(activation)
    sigmas = torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64)

    def run(f):
        g = lambda s: f(x, weight, bias, activation.with_params(sigma=s))  # noqa: E731
        return vmap(g)(sigmas), vmap(grad(lambda s: g(s).sum()))(sigmas), vmap(hessian(lambda s: g(s).sum()))(sigmas)

    with using(exact_backend):
        ours = run(linear_act)
    for a, b in zip(ours, run(eager), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_laplacian_of_a_network_by_vmap_of_hessian(exact_backend):
    net = fi.SIREN(2, 8, 1, 1, omega=3.0, first_omega=3.0, dtype=torch.float64)
    x = torch.rand(6, 2, dtype=torch.float64)

    def by_hand(x):
        for layer in list(net.net)[:-1]:
            x = torch.sin(layer.omega * layer.linear(x))
        return net.net[-1].weight @ x + net.net[-1].bias

    with using(exact_backend):
        ours = vmap(hessian(lambda v: net(v).sum()))(x)
    torch.testing.assert_close(ours, vmap(hessian(lambda v: by_hand(v).sum()))(x), **CLOSE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fi.FusedLinear(3, 5, activation=fi.activations.sine(omega=3.0, learnable=True), dtype=torch.float64),
        lambda: fi.FusedLinear(3, 5, activation="split", dtype=torch.float64),
        lambda: fi.SIREN(3, 8, 1, 2, dtype=torch.float64),
        lambda: fi.SIREN(3, 8, 1, 2, learnable=True, dtype=torch.float64),
        lambda: fi.SplitNet(3, 8, 1, 2, dtype=torch.float64),
    ],
    ids=["layer, learnable omega", "split layer", "siren", "siren, learnable omega", "splitnet"],
)
def test_ensembles(make, exact_backend):
    """stack_module_state, functional_call and vmap: values and gradients of every member as if it stood alone."""
    members = [make() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(7, 3, dtype=torch.float64)
    base = copy.deepcopy(members[0]).to("meta")

    def loss(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,)).square().sum()

    with using(exact_backend):
        values = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
        gradients = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
        for i, member in enumerate(members):
            y = member(x)
            torch.testing.assert_close(values[i], y, **CLOSE)
            alone = torch.autograd.grad(y.square().sum(), list(member.parameters()))
            for (name, _), g in zip(member.named_parameters(), alone, strict=True):
                torch.testing.assert_close(gradients[name][i], g, **CLOSE)


def test_model_agnostic_meta_learning(exact_backend):
    """Two inner steps, differentiated with respect to the weights before them."""
    net = fi.SIREN(2, 8, 1, 1, omega=3.0, first_omega=3.0, dtype=torch.float64)
    start = {k: v.detach().clone() for k, v in net.named_parameters()}
    x, target = torch.rand(9, 2, dtype=torch.float64), torch.rand(9, 1, dtype=torch.float64)

    def outer(call):
        def loss(p):
            return (call(p, x) - target).square().mean()

        def after_two_steps(p):
            for _ in range(2):
                g = grad(loss)(p)
                p = {k: p[k] - 0.01 * g[k] for k in p}
            return loss(p)

        return grad(after_two_steps)(start)

    def by_hand(p, x):
        for i in range(2):
            x = torch.sin(3.0 * (x @ p[f"net.{i}.linear.weight"].T + p[f"net.{i}.linear.bias"]))
        return x @ p["net.2.weight"].T + p["net.2.bias"]

    with using(exact_backend):
        ours = outer(lambda p, x: functional_call(net, p, (x,)))
    theirs = outer(by_hand)
    for k in start:
        torch.testing.assert_close(ours[k], theirs[k], **CLOSE)


def test_forward_over_forward_is_refused(activation, exact_backend):
    """PyTorch computes wrong values for it without an error: ours names order, activation and backend."""
    x, weight, bias = tensors(activation)
    with using(exact_backend), pytest.raises(NotImplementedError) as error:
        jacfwd(jacfwd(lambda x: linear_act(x, weight, bias, activation).sum()))(x)
    for word in ("order 2", activation.name, exact_backend, "hessian"):
        assert word in str(error.value)


# -- torch.compile


def compiled(f, **options):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


def assert_trained_alike(f, g, leaves, x):
    """Two callables of x: the same value and the same gradients of `leaves`, up to rounding."""
    results = []
    for call in (f, g):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **CLOSE)


MODULES = {
    "layer": lambda: fi.FusedLinear(3, 4, activation=fi.activations.sine(omega=3.0), dtype=torch.float64),
    "gaussian layer": lambda: fi.GaussianLayer(3, 4, sigma=1.0, dtype=torch.float64),
    "learnable layer": lambda: fi.SineLayer(3, 4, omega=3.0, learnable=True, per_feature=True, dtype=torch.float64),
    "split layer without bias": lambda: fi.SplitLayer(3, 4, bias=False, dtype=torch.float64),
    "siren": lambda: fi.SIREN(3, 8, 1, 2, dtype=torch.float64),
    "splitnet": lambda: fi.SplitNet(3, 8, 1, 2, dtype=torch.float64),
    "mlp": lambda: fi.MLP(3, 8, 1, 2, activation=fi.activations.complex_gabor(), dtype=torch.float64),
    "whole siren": lambda: fi.SIREN(3, 8, 1, 2, dtype=torch.float64, fusion="network"),
    "whole splitnet": lambda: fi.SplitNet(3, 8, 2, 2, learnable=True, dtype=torch.float64, fusion="network"),
}


@pytest.mark.parametrize("name", MODULES)
def test_compile_forward_and_backward(name, exact_backend):
    module = MODULES[name]()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    with using(exact_backend):
        assert_trained_alike(compiled(module), module, [x, *module.parameters()], x)


@pytest.mark.parametrize("name", ["siren", "whole siren"])
def test_compile_with_inductor(name, exact_backend):
    module, x = MODULES[name](), torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    with using(exact_backend):
        assert_trained_alike(torch.compile(module, fullgraph=True), module, [x, *module.parameters()], x)


def test_whole_networks_and_losses_stay_whole_under_compile(monkeypatch):
    if not native.load():
        pytest.skip(native.status()[1])
    ran = []
    for name in ("mlp", "mlp_backward", "mlp_loss", "linear_act"):
        original = getattr(backends.Cpu, name)

        def noted(self, *args, name=name, original=original):
            ran.append(name)
            return original(self, *args)

        monkeypatch.setattr(backends.Cpu, name, noted)
    net, x, target = fi.SIREN(2, 32, 2, 3, omega=3.0, first_omega=3.0), torch.rand(50, 2), torch.rand(50, 3)

    def gradients(loss):
        return torch.autograd.grad(loss, list(net.parameters()))

    step = compiled(lambda x, target: fi.losses.mse(net, x, target))
    results = [gradients(step(x, target))]
    assert ran == ["mlp_loss"]
    results.append(gradients((compiled(net)(x) - target).square().mean()))
    assert ran == ["mlp_loss", "mlp", "mlp_backward"]
    net.fusion = "layers"
    expected = gradients((net(x) - target).square().mean())
    for found in results:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["layer", "siren", "whole siren"])
def test_compile_with_any_number_of_rows_compiles_twice_at_most(name, exact_backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    module = MODULES[name]()
    for dynamic, most in ((None, 2), (True, 1)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        f = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
        with using(exact_backend):
            for rows in (5, 17, 33, 100, 64):
                x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
                assert_trained_alike(f, module, [x, *module.parameters()], x)
        assert counter.frame_count <= most


def test_a_double_backward_through_a_compiled_function_fails(exact_backend):
    """A limit of PyTorch: an error, never wrong values."""
    module = MODULES["siren"]()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    with using(exact_backend):
        y = compiled(module)(x)
        with pytest.raises(RuntimeError, match=r"donated|double backward|create_graph|does not support"):
            torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(), x)


def test_compiled_inference_and_vmap_inside_compile(exact_backend):
    module, x = MODULES["siren"](), torch.randn(4, 7, 3, dtype=torch.float64)
    with using(exact_backend):
        with torch.no_grad():
            torch.testing.assert_close(compiled(module)(x), module(x), **CLOSE)
            torch.testing.assert_close(compiled(vmap(lambda x: module(x)))(x), module(x), **CLOSE)


@pytest.mark.parametrize("name", ["layer", "siren", "splitnet", "mlp", "whole siren"])
def test_export(name, exact_backend):
    module, x = MODULES[name](), torch.randn(7, 3, dtype=torch.float64)
    rows = torch.export.Dim("rows", min=2)
    with using(exact_backend):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        for n in (2, 7, 40):
            x = torch.randn(n, 3, dtype=torch.float64)
            torch.testing.assert_close(program.module()(x), module(x), **CLOSE)


# -- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sine", "split", "gaussian", "complex_gabor"])
def test_autocast(name, dtype, backend, device):
    """The output has autocast's type, gradients those of their leaves; values as if the inputs were cast by hand."""
    p = problem(name, 33, 3, 17, dtype=torch.float32).to(torch.float32, device).requires_grad()
    with using(backend):
        with torch.autocast(device.type, dtype=dtype):
            y = linear_act(*p.tensors, p.activation)
        assert y.dtype == dtype
        gradients = torch.autograd.grad(y.float().sum(), p.tensors)
        assert all(g.dtype == torch.float32 for g in gradients)
    cast = problem(name, 33, 3, 17, dtype=torch.float32).to(dtype, device)
    cast.g = torch.ones_like(cast.g)
    oracle = expected(cast, 1, backend=backend)
    assert worst(y.cpu(), oracle["y"], dtype) <= 1
    for key, g in zip(("x", "weight", "bias"), gradients):
        assert worst(g.cpu(), oracle[key], dtype) <= 1, key


def test_autocast_leaves_float64_alone_and_can_be_switched_off(exact_backend):
    p = problem("sine", 5, 3, 4)
    single = problem("sine", 5, 3, 4, dtype=torch.float32)
    with using(exact_backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_act(*p.tensors, p.activation)
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, eager(*p.tensors, p.activation), **CLOSE)
        with torch.autocast("cpu", enabled=False):
            assert linear_act(*single.tensors, single.activation).dtype == torch.float32
        mixed = linear_act(single.x.bfloat16(), single.weight, single.bias, single.activation)
        assert mixed.dtype == torch.bfloat16
    with using(exact_backend), pytest.raises(TypeError, match=r"weight.*float32.*bfloat16"):
        linear_act(single.x.bfloat16(), single.weight, single.bias, single.activation)


def test_autocast_of_a_model_and_under_compile(exact_backend):
    net = fi.SIREN(3, 16, 1, 2, fusion="layers")  # a whole network does not round between its layers
    x = torch.rand(9, 3)
    with using(exact_backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = net(x), compiled(net)(x)
    assert y.dtype == z.dtype == torch.bfloat16
    assert torch.equal(y, z)
    loss = y.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


# -- modules, threads, memory


def test_a_deep_copy_stands_alone(exact_backend):
    net = fi.SIREN(2, 8, 1, 1, learnable=True)
    x = torch.rand(5, 2)
    with using(exact_backend):
        before = net(x)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        assert torch.equal(net(x), before)
        assert not torch.equal(twin(x), before)


def test_many_threads_at_once(exact_backend):
    """Forward and backward from eight threads give the bits of one."""
    nets = [fi.SIREN(3, 32, 1, 2), fi.MLP(3, 16, 1, 2, activation="split")]
    x = torch.rand(501, 3)

    def step(net):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        return torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])

    with using(exact_backend):
        alone = [step(net) for net in nets]
        results, errors = {}, []

        def work(i):
            try:
                with using(exact_backend):  # a thread is outside the blocks of the one that started it
                    for _ in range(5):
                        results[i] = step(nets[i % 2])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not errors
    for i, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, alone[i % 2]))


def test_no_grad_and_inference_mode(backend, device):
    layer = fi.SineLayer(3, 4).to(device)
    x = torch.rand(5, 3, device=device)
    with using(backend):
        y = layer(x)
        assert y.requires_grad
        with torch.no_grad():
            assert torch.equal(layer(x), y)
            assert not layer(x).requires_grad
        with torch.inference_mode():
            z = layer(x)
            assert torch.equal(z, y)
            assert z.is_inference()
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
            layer(z[:, :3])  # saved for a backward that could not be right


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, exact_backend):
    net = fi.SIREN(3, 16, 2, 2, dtype=torch.float64)
    x = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    with using(exact_backend):
        plain = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        y = checkpoint(net, x, use_reentrant=reentrant)
        y.square().sum().backward()
    for a, b in zip(plain, (t.grad for t in (x, *net.parameters()))):
        assert torch.equal(a, b)


def test_eager_graph_is_freed():
    """No reference cycle keeps the tensors of a step: memory goes when the loss goes."""
    import gc
    import weakref

    layer, x = fi.SineLayer(3, 4), torch.rand(5, 3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        y = layer(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        slope.square().sum().backward()
        gone = weakref.ref(y)
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        del y, slope
        assert gone() is None
    finally:
        gc.enable()


def test_optimizer_and_gradient_scaling_see_ordinary_parameters(exact_backend):
    torch.manual_seed(1)
    net = fi.SIREN(2, 16, 1, 1, learnable=True)
    theirs = [p.detach().clone().requires_grad_() for p in net.parameters()]
    x, target = torch.rand(64, 2), torch.rand(64, 1)
    with using(exact_backend):
        for optimizer in (torch.optim.SGD(net.parameters(), lr=1e-3), torch.optim.Adam(net.parameters(), lr=1e-4)):
            before = (net(x) - target).square().mean()
            before.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            assert norm.isfinite()
            optimizer.step()
            optimizer.zero_grad()
            assert (net(x) - target).square().mean() < before
    assert all(p.shape == q.shape for p, q in zip(net.parameters(), theirs))
