"""What only a GPU can show: agreement with the CPU, graphs, streams, waiting, devices, addresses and memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import elattn
from backend import DEVICE
from compare import ALL_KERNELS, KERNELS, attention, attention_step, check_same, check_state, number
from inputs import DTYPES, decay_shapes, padding_mask, qkv
from tolerances import check, relative

pytestmark = pytest.mark.gpu

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])

TWO_ERRORS = 2.0  # of two results, each within a tolerance of the truth


def forward_and_backward(
    inputs: dict[str, Tensor], grad_out: Tensor, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, final state, and the gradient of each input by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, state = attention(**leaves, **options, return_state=True)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return out.detach(), state.detach(), dict(zip(leaves, found, strict=True))


def on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def check_agreement(inputs: dict[str, Tensor], kernel: str, **options: Any) -> None:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    grad_out = torch.randn(*q.shape[:-1], v.size(-1), dtype=torch.float64).to(q.dtype)
    out, state, grads = forward_and_backward(inputs, grad_out, kernel=kernel, **options)
    want, want_state, want_grads = forward_and_backward(
        on_cpu(inputs), grad_out.cpu(), kernel=kernel, **on_cpu(options)
    )
    check_outputs(out, want, kernel)
    check_states(state, want_state, k.size(-1), v.size(-1), kernel, q.dtype)
    for name, gradient in grads.items():
        expected = want_grads[name].to(DEVICE)
        # That of a state is never stored in the inputs' dtype, but it is computed from them.
        stored = {"dtype": q.dtype, "roundings": 0} if name == "state" else {"roundings": 2}
        scale = TWO_ERRORS * relative(expected)
        check(gradient, expected, "2", scale=scale, what=f"{kernel}: gradient of {name}", **stored)


def check_outputs(out: Tensor, of_cpu: Tensor, kernel: str, what: str = "output") -> None:
    check(out, of_cpu.to(DEVICE), number(kernel), scale=TWO_ERRORS, roundings=2, what=f"{kernel}: {what}")


def check_states(state: Tensor, of_cpu: Tensor, head_dim: int, value_dim: int, kernel: str, dtype: torch.dtype) -> None:
    check_state(state, of_cpu.to(DEVICE), head_dim, value_dim, kernel=kernel, scale_tolerance=TWO_ERRORS, dtype=dtype)


@EVERY_KERNEL
@EVERY_DTYPE
@MODES
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 40), (128, 128)])
def test_agrees_with_the_cpu(kernel: str, dtype: torch.dtype, is_causal: bool, head_dim: int, value_dim: int) -> None:
    q, k, v = qkv(2, 4, 200, head_dim, value_dim, kv_heads=2, dtype=dtype)
    check_agreement({"q": q, "k": k, "v": v}, kernel, is_causal=is_causal, enable_gqa=True)


@EVERY_KERNEL
@EVERY_DTYPE
def test_options_agree_with_the_cpu(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 130, 32, 48, dtype=dtype)
    _, state = attention(*qkv(2, 2, 20, 32, 48, dtype=dtype), kernel=kernel, return_state=True)
    inputs = {"q": q, "k": k, "v": v, "state": state}
    check_agreement(inputs, kernel, is_causal=True, key_padding_mask=padding_mask(2, 130))
    packed = {name: x[:1] for name, x in inputs.items() if name != "state"}
    check_agreement(packed, kernel, is_causal=True, cu_seqlens=torch.tensor([0, 1, 1, 70, 130]))
    if kernel != "features":
        # Gradients of rates that tokens share are sums over them: test_decay.py knows what their rounding refers to.
        for shape in (s for s in decay_shapes(2, 2, 130, 32, kernel) if len(s) > 2):
            check_agreement(inputs | {"decay": 0.1 * torch.rand(shape)}, kernel, is_causal=True)


@EVERY_KERNEL
@EVERY_DTYPE
def test_steps_agree_with_the_cpu(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(3, 4, 30, 64, 64, kv_heads=2, dtype=dtype)
    _, state = attention(
        *(x[:, :, :20] for x in (q, k, v)), kernel=kernel, is_causal=True, enable_gqa=True, return_state=True
    )
    pools, slots = (state.clone(), state.cpu()), torch.tensor([2, -1, 0])
    for t in range(20, 30):
        token = [x[:, :, t] for x in (q, k, v)]
        out = attention_step(*token, pools[0], kernel=kernel, enable_gqa=True, slots=slots)
        expected = attention_step(
            *(x.cpu() for x in token), pools[1], kernel=kernel, enable_gqa=True, slots=slots.cpu()
        )
        check_outputs(out, expected, kernel, f"token {t}")
    check_states(*pools, 64, 64, kernel, dtype)


@EVERY_DTYPE
def test_grouped_linear_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    x = torch.randn(300, 96, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(4, 80, 96, dtype=torch.float64)).to(dtype).requires_grad_()
    ends = torch.tensor([130, 130, 131, 300], dtype=torch.int32)
    results = []
    for device in (DEVICE, "cpu"):
        leaves = [y.detach().to(device).requires_grad_() for y in (x, weight)]
        out = elattn.grouped_linear(*leaves, ends.to(device))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        expected = expected.to(DEVICE)
        check(actual, expected, "2", scale=TWO_ERRORS * relative(expected), roundings=2, dtype=dtype)


@EVERY_KERNEL
def test_autocast(kernel: str) -> None:
    q, k, v = qkv(1, 2, 40, 64)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(q, k, v, kernel=kernel, is_causal=True)
    expected = attention(*(x.bfloat16() for x in (q, k, v)), kernel=kernel, is_causal=True)
    check_same(out, expected, kernel)


# Graphs and streams.


def warm(call: Callable[[], Any]) -> None:
    """What a capture wants to have happened before it: on a stream that is not the default."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a call, and the tensors that its replay fills."""
    warm(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_in_a_graph(kernel: str, dtype: torch.dtype) -> None:
    """One graph decodes: tokens and slots change between replays, as in a server."""
    q, k, v = qkv(3, 4, 12, 64, kv_heads=2, dtype=dtype)
    _, start = attention(
        *(x[:, :, :4] for x in (q, k, v)), kernel=kernel, is_causal=True, enable_gqa=True, return_state=True
    )
    token, slots, pool = [x[:, :, 0].clone() for x in (q, k, v)], torch.tensor([2, 0, 1]), start.clone()

    def step() -> Tensor:
        return attention_step(*token, pool, kernel=kernel, enable_gqa=True, slots=slots)

    graph, out = capture(step)
    pool.copy_(start)
    expected_pool = start.clone()
    for t in range(4, 12):
        for place, x in zip(token, (q, k, v), strict=True):
            place.copy_(x[:, :, t])
        slots.copy_(slots.roll(1) if t != 8 else torch.tensor([1, -1, 2]))
        graph.replay()
        check_same(
            out, attention_step(*token, expected_pool, kernel=kernel, enable_gqa=True, slots=slots), f"token {t}"
        )
        check_same(pool, expected_pool, f"pool after token {t}")


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_backward_in_a_graph(kernel: str, dtype: torch.dtype) -> None:
    """Long and with few heads, so that the chunked forward has its three launches."""
    x = [y.requires_grad_() for y in qkv(1, 2, 1500, 64, dtype=dtype)]
    grad_out = torch.randn_like(x[2])

    def call() -> tuple[Tensor, ...]:
        out, state = attention(*x, kernel=kernel, is_causal=True, return_state=True)
        return out, state, *torch.autograd.grad(out, x, grad_out)

    graph, found = capture(call)
    with torch.no_grad():
        for leaf, other in zip(x, qkv(1, 2, 1500, 64, dtype=dtype), strict=True):
            leaf.copy_(other)
    graph.replay()
    for actual, expected in zip(found, call(), strict=True):
        check_same(actual.detach(), expected.detach(), kernel)


@EVERY_KERNEL
def test_two_streams_give_the_same_bits(kernel: str) -> None:
    x = [y.requires_grad_() for y in qkv(2, 8, 1500, 64, dtype=torch.bfloat16)]
    grad_out = torch.randn_like(x[2])

    def call() -> tuple[Tensor, ...]:
        out = attention(*x, kernel=kernel, is_causal=True)
        return out.detach(), *torch.autograd.grad(out, x, grad_out)

    expected = call()
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    for results in found:
        for actual, want in zip(results, expected, strict=True):
            check_same(actual, want, kernel)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where PyTorch waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_KERNEL
@EVERY_DTYPE
def test_nothing_waits_for_the_gpu(kernel: str, dtype: torch.dtype) -> None:
    x = [y.requires_grad_() for y in qkv(1, 4, 300, 64, kv_heads=2, dtype=dtype)]
    _, state = attention(*(y.detach() for y in x), kernel=kernel, enable_gqa=True, return_state=True)
    decay = None if kernel == "features" else torch.rand(2)
    variants = [
        {},
        {"is_causal": True, "state": state} | ({} if decay is None else {"decay": decay}),
        {"is_causal": True, "key_padding_mask": padding_mask(1, 300)},
        {"is_causal": True, "cu_seqlens": torch.tensor([0, 100, 300])},
    ]
    token, slots, pool = [y[:, :, 0].detach() for y in x], torch.tensor([0]), state.clone()
    grad_out = torch.randn_like(attention(*x, kernel=kernel, enable_gqa=True))
    with no_waiting():
        for options in variants:
            out, _ = attention(*x, kernel=kernel, enable_gqa=True, return_state=True, **options)
            torch.autograd.grad(out, x, grad_out)
        attention_step(*token, pool, kernel=kernel, enable_gqa=True, slots=slots)
        elattn.merge_states(state, state, 64, 64, kernel=kernel)


# Devices, addresses and memory.


def test_the_device_is_that_of_the_tensors() -> None:
    """On every GPU of the machine, while another, or the only one, is current."""
    count = torch.cuda.device_count()
    x = qkv(1, 2, 100, 64, dtype=torch.bfloat16)
    expected, state = attention(*x, is_causal=True, return_state=True)
    for index in range(count):
        with torch.cuda.device((index + 1) % count):
            leaves = [y.to(f"cuda:{index}").requires_grad_() for y in x]
            out, last = attention(*leaves, is_causal=True, return_state=True)
            grads = torch.autograd.grad(out.sum(), leaves)
            with torch.no_grad():
                stepped = attention_step(*(y[:, :, 0] for y in leaves), last.detach().clone())
            assert {y.device.index for y in (out, last, *grads, stepped)} == {index}
            assert torch.cuda.current_device() == (index + 1) % count
            check_outputs(out.to(DEVICE), expected, "hadamard_exp")
            check_states(last.to(DEVICE), state, 64, 64, "hadamard_exp", torch.bfloat16)


@EVERY_KERNEL
def test_tensors_of_several_devices_are_refused(kernel: str) -> None:
    q, k, v = qkv(1, 2, 10, 8)
    with pytest.raises(RuntimeError, match="k is on cpu but q is on cuda:"):
        attention(q, k.cpu(), v, kernel=kernel)
    with pytest.raises(RuntimeError, match=r"v is on cuda:\d+ but . is on cpu"):
        attention(q.cpu(), k.cpu(), v, kernel=kernel)
    with pytest.raises(RuntimeError, match="key_padding_mask is on cpu but"):
        attention(q, k, v, kernel=kernel, key_padding_mask=padding_mask(1, 10).cpu())
    token = [x[:, :, 0] for x in (q, k, v)]
    state = elattn.new_state(1, 2, 8, 8, kernel=kernel, device="cpu")
    with pytest.raises(RuntimeError, match="state is on cpu but"):
        attention_step(*token, state, kernel=kernel)
    with pytest.raises(RuntimeError, match="slots is on cpu but"):
        attention_step(*token, state.to(DEVICE), kernel=kernel, slots=torch.zeros(1, dtype=torch.int64, device="cpu"))


@contextmanager
def large_memory(gigabytes: int) -> Iterator[None]:
    """Skips where the GPU has less free memory; gives back what the test used."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free / 2**30:.1f} are free")
    try:
        yield
    finally:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_beyond_2_31_elements(kernel: str) -> None:
    """Heads so far apart that offsets do not fit 32 bits, in a tensor that is not contiguous."""
    with large_memory(6):
        apart, length, dim = 2**30 + 8, 100, 64
        everything = torch.empty(2 * apart + 4 * length * dim, dtype=torch.bfloat16).fill_(torch.nan)
        shape, strides = (1, 3, length, dim), (0, apart, 3 * dim, 1)
        wide = [everything.as_strided(shape, strides, offset) for offset in (0, dim, 2 * dim)]
        for place, values in zip(wide, qkv(1, 3, length, dim, dtype=torch.bfloat16), strict=True):
            place.copy_(values)
        narrow = [x.contiguous() for x in wide]
        grad_out = torch.randn_like(narrow[2])
        results = []
        for given in (wide, narrow):
            leaves = dict(zip("qkv", given, strict=True))
            out, state, grads = forward_and_backward(leaves, grad_out, kernel=kernel, is_causal=True)
            results.append((out, state, *grads.values()))
        del everything, wide
        for actual, expected in zip(*results, strict=True):
            check_same(actual, expected, kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_output_of_more_than_2_31_elements(dtype: torch.dtype) -> None:
    """Of 65,537 equal entries, more than a 16-bit grid dimension holds."""
    with large_memory(12):
        batch, length, dim = 65_537, 512, 64
        x = [y.expand(batch, 1, length, dim) for y in qkv(1, 1, length, dim, dtype=dtype)]
        out = elattn.attention(*x, is_causal=True)
        assert out.numel() > 2**31
        for entry in (0, 1, 32_768, 65_535, 65_536):
            check_same(out[entry], out[0], f"entry {entry}")
        check_outputs(out[:1], elattn.attention(*(y[:1].cpu() for y in x), is_causal=True), "hadamard_exp")
        del out


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_peak_memory(kernel: str, dtype: torch.dtype, dim: int) -> None:
    """A tenth above inputs, outputs and gradients; features of the kernel "features" are made by the test."""
    x = [y.requires_grad_() for y in qkv(2, 8, 8192, dim, dtype=dtype)]
    if kernel == "features":
        x = [x[0].detach().abs().requires_grad_(), x[1].detach().abs().requires_grad_(), x[2]]
    grad_out = torch.randn_like(x[2])
    given = sum(y.numel() * y.element_size() for y in (*x, grad_out))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if kernel == "features":
        out = elattn.feature_attention(*x, is_causal=True)
    else:
        out = elattn.attention(*x, kernel=kernel, is_causal=True)
    grads = torch.autograd.grad(out, x, grad_out)
    grown = torch.cuda.max_memory_allocated() - before
    results = sum(y.numel() * y.element_size() for y in (out, *grads))
    assert given + grown <= 1.1 * (given + results), f"{(given + grown) / (given + results):.3f} of the ideal"
