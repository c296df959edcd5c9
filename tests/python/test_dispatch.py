"""Registrations: schemas, Autograd, Autocast, Meta, and what is built on them (compile, export, TorchScript)."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import elattn
from backend import CPU_CONTRACT
from compare import ACCUMULATION, ALL_KERNELS, KERNELS, attention, check_same
from inputs import padding_mask, qkv

ops = torch.ops.elattn

COMMON = (
    'str kernel="hadamard_exp", *, bool is_causal=False, float scale=1., float eps=0., bool enable_gqa=False, '
    "Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, Tensor? decay=None, Tensor? state=None"
)
FEATURES = (
    "bool is_causal=False, bool enable_gqa=False, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, "
    "Tensor? state=None"
)
SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {COMMON}) -> Tensor",
    "attention_with_state": f"(Tensor q, Tensor k, Tensor v, {COMMON}) -> (Tensor, Tensor)",
    "_attention_backward": f"(Tensor grad_out, Tensor? grad_state, Tensor q, Tensor k, Tensor v, {COMMON}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_decay, Tensor grad_state_in)",
    "attention_step": '(Tensor q, Tensor k, Tensor v, Tensor(a!) state, str kernel="hadamard_exp", *, float scale=1., '
    "float eps=0., bool enable_gqa=False, Tensor? decay=None, Tensor? slots=None) -> Tensor",
    "feature_attention": f"(Tensor phi, Tensor psi, Tensor v, *, {FEATURES}) -> Tensor",
    "feature_attention_with_state": f"(Tensor phi, Tensor psi, Tensor v, *, {FEATURES}) -> (Tensor, Tensor)",
    "feature_attention_step": "(Tensor phi, Tensor psi, Tensor v, Tensor(a!) state, *, bool enable_gqa=False, "
    "Tensor? slots=None) -> Tensor",
    "merge_states": '(Tensor a, Tensor b, SymInt head_dim, SymInt value_dim, *, str kernel="hadamard_exp", '
    "Tensor? decay=None) -> Tensor",
    "new_state": "(SymInt batch, SymInt heads, SymInt head_dim, SymInt value_dim, *, "
    'str kernel="hadamard_exp", ScalarType? dtype=None, Device? device=None) -> Tensor',
    "state_size": "(str kernel, SymInt head_dim, SymInt value_dim) -> SymInt",
    "unpack_state": '(Tensor(a) state, SymInt head_dim, SymInt value_dim, *, str kernel="hadamard_exp") -> Tensor(a)[]',
    "kernels": "() -> str[]",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    assert str(getattr(ops, name).default._schema) == f"elattn::{name}{SCHEMAS[name]}"


def samples(kernel: str, grad: bool) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Arguments of attention that reach every branch of its wiring."""
    q, k, v = qkv(2, 4, 9, 6, 5, kv_heads=2, requires_grad=grad)
    state = attention(*qkv(2, 2, 3, 6, 5), kernel=kernel, return_state=True)[1].requires_grad_(grad)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    one = tuple(x[:1].detach().requires_grad_(grad) for x in (q, k, v))
    base = {"enable_gqa": True} if kernel == "features" else {"enable_gqa": True, "kernel": kernel}
    found = [
        ((q, k, v), base),
        ((q, k, v), base | {"is_causal": True, "state": state}),
        ((q, k, v), base | {"key_padding_mask": padding_mask(2, 9)}),
        (one, base | {"is_causal": True, "cu_seqlens": ends}),
    ]
    if kernel != "features":
        found.append(
            ((q, k, v), base | {"is_causal": True, "decay": torch.rand(2, 2, 9).requires_grad_(grad), "scale": 0.5})
        )
    return [
        (tuple(x.detach().abs().requires_grad_(grad) for x in t) if kernel == "features" else t, o) for t, o in found
    ]


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_attention(kernel: str, grad: bool) -> None:
    prefix = "feature_attention" if kernel == "features" else "attention"
    for tensors, options in samples(kernel, grad):
        opcheck(getattr(ops, prefix).default, tensors, options)
        opcheck(getattr(ops, f"{prefix}_with_state").default, tensors, options)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_opcheck_backward(kernel: str) -> None:
    for tensors, options in samples(kernel, False):
        q, _, v = tensors
        sequences = options["cu_seqlens"].numel() - 1 if "cu_seqlens" in options else q.size(0)
        grad_state = torch.randn(sequences, 2, elattn.state_size(kernel, 6, 5))
        op = ops._feature_attention_backward if kernel == "features" else ops._attention_backward
        for at_state in (None, grad_state):
            opcheck(op.default, (torch.randn(*q.shape[:3], v.size(3)), at_state, *tensors), options)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_opcheck_step(kernel: str) -> None:
    q, k, v = (x[:, :, 0].abs() for x in qkv(2, 4, 1, 6, 5, kv_heads=2))
    for slots in (None, torch.tensor([1, -1]), torch.tensor([2, 0], dtype=torch.int32)):
        state = elattn.new_state(3, 2, 6, 5, kernel=kernel)
        if kernel == "features":
            opcheck(ops.feature_attention_step.default, (q, k, v, state), {"enable_gqa": True, "slots": slots})
        else:
            options = {"kernel": kernel, "enable_gqa": True, "slots": slots, "decay": torch.rand(2)}
            opcheck(ops.attention_step.default, (q, k, v, state), options)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_opcheck_states(kernel: str) -> None:
    a, b = (attention(*qkv(2, 2, 5, 6, 4), kernel=kernel, return_state=True)[1].requires_grad_() for _ in range(2))
    opcheck(ops.merge_states.default, (a, b, 6, 4), {"kernel": kernel})
    opcheck(ops.merge_states.default, (a, b, 6, 4), {"kernel": kernel, "decay": torch.rand(2)})


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_meta_gives_the_shapes_types_and_strides_of_the_cpu(kernel: str, dtype: torch.dtype) -> None:
    for transposed in (False, True):
        q, k, v = qkv(2, 4, 9, 6, 5, kv_heads=2, dtype=dtype)
        if transposed:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        results = []
        for device in ("cpu", "meta"):
            x = [y.to(device) for y in (q, k, v)]
            results.append(attention(*x, kernel=kernel, enable_gqa=True, return_state=True))
        for cpu, meta in zip(*results, strict=True):
            assert meta.is_meta
            assert (cpu.shape, cpu.dtype, cpu.stride()) == (meta.shape, meta.dtype, meta.stride())


def test_gradients_have_the_strides_of_their_inputs() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(2, 4, 9, 6, 6))
    elattn.attention(q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad.stride() == x.stride()


def test_boxed_call_equals_the_typed_call() -> None:
    """The path of interpreters: arguments by position and keyword through the schema."""
    q, k, v = qkv(2, 4, 9, 6, 5, kv_heads=2)
    expected = elattn.attention(q, k, v, kernel="sum_sq", is_causal=True, enable_gqa=True, eps=0.1)
    found = torch._C._jit_get_operation("elattn::attention")[0](
        q, k, v, kernel="sum_sq", is_causal=True, enable_gqa=True, eps=0.1
    )
    check_same(found, expected)


# torch.compile and torch.export


def model(q: Tensor, k: Tensor, v: Tensor, state: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Something before and after the operators, so that there is a graph to compile."""
    out, state = ops.attention_with_state(
        2 * q, k.relu(), v, kernel=kernel, is_causal=True, enable_gqa=True, state=state
    )
    return out.sin(), state + 0.0


@pytest.mark.parametrize("kernel", ["hadamard_exp", "sub_sq", "elu"])
def test_compile_with_dynamic_shapes(kernel: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, length in [(2, 9), (3, 20), (1, 33)]:
        results = []
        for fn in (model, compiled):
            torch.manual_seed(0)
            leaves = qkv(batch, 4, length, 6, 5, kv_heads=2, requires_grad=True)
            state = attention(*qkv(batch, 2, 3, 6, 5), kernel=kernel, return_state=True)[1].requires_grad_()
            out, after = fn(*leaves, state, kernel)
            results.append((out, after, *torch.autograd.grad(out.square().sum(), (*leaves, state))))
        for name, eager, other in zip(["output", "state", "dq", "dk", "dv", "dstate"], *results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_compile_the_python_functions() -> None:
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, state = elattn.attention(q, k, v, kernel="sum_sq", is_causal=True, return_state=True)
        phi, psi = q.abs(), k.abs()
        other = elattn.feature_attention(phi, psi, v, is_causal=True)
        custom = elattn.attention(q, k, v, kernel=elattn.FeatureKernel(torch.exp, torch.exp))
        fields = elattn.unpack_state(elattn.merge_states(state, state, 6, 6, kernel="sum_sq"), 6, 6, kernel="sum_sq")
        return out + other + custom + fields["n"][..., None, None]

    q, k, v = qkv(2, 2, 9, 6, 6)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v))


def test_compiled_steps_update_the_state() -> None:
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        first = ops.attention_step(q, k, v, state, enable_gqa=True)
        return first + ops.attention_step(q + 1, k, v, state, enable_gqa=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = [y[:, :, 0] for y in qkv(batch, 4, 1, 6, 5, kv_heads=2)]
        states = [elattn.new_state(batch, 2, 6, 5) for _ in range(2)]
        with torch.no_grad():
            outs = [fn(*x, state) for fn, state in zip((run, compiled), states, strict=True)]
        torch.testing.assert_close(outs[1], outs[0])
        check_same(states[1], states[0])


class Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return ops.attention(q, k, v, is_causal=True, decay=decay, scale=0.5)


def test_export_with_dynamic_shapes() -> None:
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shape = {0: batch, 2: length}
    arguments = (*qkv(2, 2, 9, 6, 5), torch.rand(2, 6))
    exported = torch.export.export(Module(), arguments, dynamic_shapes=(shape, shape, shape, None))
    assert any("elattn.attention" in str(node.target) for node in exported.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    other = (*qkv(3, 2, 20, 6, 5), torch.rand(2, 6))
    check_same(torch.export.load(buffer).module()(*other), Module()(*other))


@pytest.mark.parametrize("kernel", KERNELS)
def test_torchscript_saved_and_loaded_gives_outputs_and_gradients(kernel: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        out, state = torch.ops.elattn.attention_with_state(q, k, v, kernel=kernel, is_causal=True)
        empty = torch.ops.elattn.new_state(q.size(0), k.size(1), k.size(3), v.size(3), kernel=kernel)
        return out, torch.ops.elattn.merge_states(empty, state, k.size(3), v.size(3), kernel=kernel)

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(run), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    q, k, v = qkv(2, 2, 9, 6, 5, requires_grad=True)
    g = torch.randn(2, 2, 9, 5)
    for _ in range(3):  # the interpreter specialises after its first runs
        found, state = loaded(q, k, v, kernel)
        expected, expected_state = elattn.attention(q, k, v, kernel=kernel, is_causal=True, return_state=True)
        check_same(found, expected)
        check_same(state, expected_state)
        for one, two in zip(
            torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True
        ):
            check_same(one, two)


# Autocast


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_autocast(kernel: str, autocast_dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 9, 6, 5, requires_grad=True)
    decay = {} if kernel == "features" else {"decay": torch.rand(2)}
    _, before = attention(*qkv(2, 2, 5, 6, 5), kernel=kernel, return_state=True)
    with torch.autocast("cpu", dtype=autocast_dtype):
        out, state = attention(q, k, v, kernel=kernel, is_causal=True, state=before, return_state=True, **decay)
        step_state = before.clone()
        with torch.no_grad():
            x = [y[:, :, 0] for y in (q, k, v)]
            if kernel == "features":
                stepped = elattn.feature_attention_step(x[0].abs(), x[1].abs(), x[2], step_state)
            else:
                stepped = elattn.attention_step(*x, step_state, kernel=kernel, **decay)
    assert out.dtype == autocast_dtype and stepped.dtype == autocast_dtype
    assert state.dtype == torch.float32 and step_state.dtype == torch.float32
    low = [x.detach().to(autocast_dtype) for x in (q, k, v)]
    expected, expected_state = attention(*low, kernel=kernel, is_causal=True, state=before, return_state=True, **decay)
    check_same(out.detach(), expected)
    check_same(state.detach(), expected_state)
    check_same(stepped, expected[:, :, 0])
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = qkv(2, 2, 9, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert elattn.attention(q, k, v).dtype == torch.float64


@CPU_CONTRACT
def test_cuda_is_refused_by_a_build_without_it() -> None:
    """The kernel registered for CUDA tensors, called directly: no machine with a GPU is needed."""
    q, k, v = qkv(1, 1, 3)
    with pytest.raises(RuntimeError, match=r"^elattn::attention: this build of elattn has no CUDA kernels"):
        ops.attention.default._op_dk(torch._C.DispatchKey.CUDA, q, k, v)
    state = elattn.new_state(1, 1, 16, 16)
    with pytest.raises(RuntimeError, match=r"^elattn::attention_step: this build of elattn has no CUDA kernels"):
        ops.attention_step.default._op_dk(torch._C.DispatchKey.CUDA, *(x[:, :, 0] for x in (q, k, v)), state)


# What autograd refuses


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_a_second_derivative_is_refused(kernel: str) -> None:
    q, k, v = qkv(1, 1, 5, 4, 4, requires_grad=True)
    out = attention(q, k, v, kernel=kernel)
    # With create_graph the backward would have to be differentiable itself.
    with pytest.raises(RuntimeError, match="second derivative is not supported"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_a_step_with_an_input_that_requires_grad_is_refused(kernel: str) -> None:
    x = [y[:, :, 0] for y in qkv(2, 2, 1, 6, 5)]
    for which in range(4):
        arguments = [*x, elattn.new_state(2, 2, 6, 5, kernel=kernel)]
        arguments[which] = arguments[which].clone().requires_grad_()
        before = arguments[3].detach().clone()

        def step(arguments: list[Tensor] = arguments) -> Tensor:
            if kernel == "features":
                return elattn.feature_attention_step(*arguments)
            return elattn.attention_step(*arguments, kernel=kernel)

        with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
            step()
        check_same(arguments[3].detach(), before)
        if which < 3:
            with torch.no_grad():
                step()


def test_forward_mode_is_refused() -> None:
    import torch.autograd.forward_ad as fwad

    q, k, v = qkv(1, 1, 5, 4, 4)
    with fwad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        elattn.attention(fwad.make_dual(q, torch.ones_like(q)), k, v)


def test_a_step_invalidates_what_a_backward_has_saved() -> None:
    q, k, v = qkv(1, 2, 5, 6, 5, requires_grad=True)
    state = elattn.new_state(1, 2, 6, 5).requires_grad_()
    out = elattn.attention(q, k, v, is_causal=True, state=state)
    with torch.no_grad():
        elattn.attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = qkv(2, 2, 9, 6, 5)
        out, state = elattn.attention(q, k, v, is_causal=True, return_state=True)
        stepped = elattn.new_state(2, 2, 6, 5)
        outs = [elattn.attention_step(q[:, :, t], k[:, :, t], v[:, :, t], stepped) for t in range(9)]
    check_same(torch.stack(outs, 2), out)
    check_same(stepped, state)


def test_outputs_do_not_require_grad_without_need() -> None:
    q, k, v = qkv(1, 1, 5)
    assert not elattn.attention(q, k, v).requires_grad
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        assert not elattn.attention(leaf, k, v).requires_grad
    out, state = elattn.attention(leaf, k, v, return_state=True)
    assert out.requires_grad and state.requires_grad
    integer_mask = torch.zeros(1, 5, dtype=torch.bool)
    assert elattn.attention(leaf, k, v, key_padding_mask=integer_mask).requires_grad


def test_checkpointing_and_vmap_free_functions() -> None:
    """torch.utils.checkpoint recomputes the forward: equal gradients, bit for bit."""
    from torch.utils.checkpoint import checkpoint

    q, k, v = qkv(1, 2, 40, requires_grad=True)
    run: Callable[..., Tensor] = lambda *x: elattn.attention(*x, is_causal=True).sin()  # noqa: E731
    g = torch.randn_like(v)
    found = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False), (q, k, v), g)
    for one, two in zip(found, torch.autograd.grad(run(q, k, v), (q, k, v), g), strict=True):
        check_same(one, two)


def test_uninitialised_memory_is_visible() -> None:
    """What the whole suite relies on: an element that an operator leaves unwritten is NaN, in C++ too."""
    assert torch.empty(4).isnan().all() and torch.empty(4, dtype=torch.float64).isnan().all()
    assert ACCUMULATION[torch.bfloat16] == torch.float32
