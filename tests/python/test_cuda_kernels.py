"""The edges of the CUDA kernels: lengths around a chunk, dimensions around a tile, every option at once.

Small enough for the builds of the emulation that see every access to memory; on the CPU they are ordinary tests.
"""

import pytest
import torch
from torch import Tensor

import elattn
from backend import BACKEND
from compare import (
    ACCUMULATION,
    ALL_KERNELS,
    SQUARED,
    attention,
    attention_step,
    check_backward,
    check_forward,
    check_state,
    number,
    reference,
)
from groups import ends, loop, strided
from inputs import DTYPES as ALL_DTYPES
from inputs import decay_shapes, padding_mask, qkv
from tolerances import check

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def later_state(kernel: str, head_dim: int, value_dim: int, kv_heads: int, batch: int = 1) -> torch.Tensor:
    """float32, after 20 tokens."""
    q, k, v = qkv(batch, kv_heads, 20, head_dim, value_dim)
    return reference(q, k, v, kernel=kernel, is_causal=True, return_state=True)[1].float()


@EVERY_KERNEL
@MODES
@DTYPES
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 65])
def test_lengths_around_a_chunk(kernel: str, is_causal: bool, dtype: torch.dtype, length: int) -> None:
    q, k, v = qkv(1, 2, length, 16, 24, dtype=dtype)
    state = later_state(kernel, 16, 24, 2)
    check_forward(q, k, v, kernel=kernel, is_causal=is_causal, state=state)
    check_backward(q, k, v, kernel=kernel, is_causal=is_causal, state=state, final=True)


@EVERY_KERNEL
@DTYPES
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (31, 33), (64, 64), (80, 96), (128, 40), (130, 130)])
def test_dimensions_around_a_tile(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    q, k, v = qkv(1, 1, 18, head_dim, value_dim, dtype=dtype)
    check_forward(q, k, v, kernel=kernel, is_causal=True)
    check_backward(q, k, v, kernel=kernel, is_causal=True)


@pytest.mark.parametrize("length", [63, 64, 129])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (64, 128), (80, 80), (128, 128)])
def test_chunks_on_tensor_cores(head_dim: int, value_dim: int, length: int) -> None:
    q, k, v = qkv(1, 1, length, head_dim, value_dim, dtype=torch.bfloat16)
    check_forward(q, k, v, is_causal=True)
    check_backward(q, k, v, is_causal=True)


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("drift", [-5.0, 0.5, 5.0, 50.0])
def test_gradients_where_keys_drift(drift: float, shift: float) -> None:
    """Chunks are divided, and gradients are small differences: of values that share an offset, of rows that one key
    dominates."""
    q, k, v = qkv(1, 2, 100, 16, 24, kv_heads=1, dtype=torch.float64)
    k = k + drift * torch.arange(100, dtype=k.dtype)[:, None]
    q, k, v = (x.bfloat16() for x in (q, k, v + shift))
    check_backward(q, k, v, is_causal=True, enable_gqa=True, cancels=True)


@MODES
@pytest.mark.parametrize(("q_offset", "k_offset"), [(252.0, 0.0), (0.0, 252.0), (-252.0, 0.0)])
def test_exponents_beside_where_one_float_is_enough(is_causal: bool, q_offset: float, k_offset: float) -> None:
    """Some warps have rows beyond 256, and all theirs take the way of two floats, forward and backward."""
    q, k, v = qkv(1, 2, 100, 16, 24, kv_heads=1, dtype=torch.float64)
    q, k, v = (x.bfloat16() for x in (q + q_offset, k + k_offset, v))
    state = later_state("hadamard_exp", 16, 24, 1)
    options = {"is_causal": is_causal, "enable_gqa": True}
    check_forward(q, k, v, **options)
    check_backward(q, k, v, cancels=True, **options)
    check_forward(q, k, v, state=state, **options)


@MODES
def test_long_sequences_in_pieces(is_causal: bool) -> None:
    """Few heads: a GPU shares the chunks of a sequence out, here 5, 5 and 3, and merges states and their gradients.
    A channel of the keys rises by more than a chunk can bear in the first and in the last chunk of the second piece."""
    length = 13 * 64 - 59
    q, k, v = qkv(1, 2, length, 16, 24, kv_heads=1, dtype=torch.bfloat16)
    for begin in (330, 639):
        k[:, :, begin:, 3] += 60
        q[:, :, begin:, 3] -= 60
    mask = padding_mask(1, length)
    state = later_state("hadamard_exp", 16, 24, 1)
    options = {"is_causal": is_causal, "enable_gqa": True, "key_padding_mask": mask, "state": state}
    check_forward(q, k, v, **options)
    check_backward(q, k, v, final=True, cancels=True, **options)


@pytest.mark.parametrize(("query_len", "key_len"), [(773, 130), (70, 773), (773, 0)])
def test_long_sequences_in_pieces_beside_short_ones(query_len: int, key_len: int) -> None:
    q, k, v = qkv(1, 1, query_len, 16, 24, key_len=key_len, dtype=torch.bfloat16)
    state = later_state("hadamard_exp", 16, 24, 1)
    check_forward(q, k, v, state=state)
    check_backward(q, k, v, state=state, final=True)


@EVERY_KERNEL
@MODES
@pytest.mark.parametrize("heads", [2, 6, 40])
def test_groups_smaller_and_larger_than_a_chunk(kernel: str, is_causal: bool, heads: int) -> None:
    q, k, v = qkv(1, heads, 9, 16, 16, kv_heads=2)
    check_forward(q, k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True)
    check_backward(q, k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True)


@EVERY_KERNEL
@MODES
def test_padding_and_packing(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 35, 16, 16, kv_heads=1)
    options = {"kernel": kernel, "is_causal": is_causal, "enable_gqa": True}
    mask = padding_mask(2, 35)
    check_forward(q, k, v, key_padding_mask=mask, **options)
    check_backward(q, k, v, key_padding_mask=mask, **options)
    q, k, v = qkv(1, 2, 60, 16, 16, kv_heads=1)
    ends = torch.tensor([0, 0, 3, 41, 41, 60])
    state = later_state(kernel, 16, 16, 1, batch=5)
    check_forward(q, k, v, cu_seqlens=ends, state=state, **options)
    check_backward(q, k, v, cu_seqlens=ends, state=state, final=True, **options)


@pytest.mark.parametrize("kernel", [kernel for kernel in ALL_KERNELS if kernel != "features"])
def test_decay_of_every_shape(kernel: str) -> None:
    q, k, v = qkv(2, 4, 35, 16, 24, kv_heads=2)
    state = later_state(kernel, 16, 24, 2, batch=2)
    for shape in decay_shapes(2, 2, 35, 16, kernel):
        options = {"kernel": kernel, "is_causal": True, "enable_gqa": True, "decay": 0.3 * torch.rand(shape)}
        check_forward(q, k, v, state=state, what=str(shape), **options)
        check_backward(q, k, v, state=state, final=True, what=str(shape), **options)


@EVERY_KERNEL
@pytest.mark.parametrize("std", [30.0, 1e4])
def test_gauges_that_move_with_every_token(kernel: str, std: float) -> None:
    q, k, v = qkv(1, 2, 50, 16, 16, std=std)
    k = k + 50 * torch.arange(50, dtype=k.dtype)[:, None]
    scale = 2.0 if kernel in SQUARED else 1.0
    check_forward(q, k, v, kernel=kernel, is_causal=True, scale_tolerance=scale)


@EVERY_KERNEL
@DTYPES
def test_steps_go_on_where_a_call_ended(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(3, 4, 21, 24, 40, kv_heads=2, dtype=dtype)
    expected, _ = reference(q, k, v, kernel=kernel, is_causal=True, enable_gqa=True, return_state=True)
    _, state = reference(
        *(x[:, :, :18] for x in (q, k, v)), kernel=kernel, is_causal=True, enable_gqa=True, return_state=True
    )
    pool = torch.cat([torch.full_like(state[:1], torch.nan), state]).float()
    for integer in (torch.int64, torch.int32):
        states, slots = pool.clone(), torch.tensor([1, -1, 3], dtype=integer)
        for t in (18, 19, 20):
            out = attention_step(*(x[:, :, t] for x in (q, k, v)), states, kernel=kernel, enable_gqa=True, slots=slots)
            assert not out[1].any()
            for row in (0, 2):
                check(out[row], expected[row, :, t], number(kernel), what=f"token {t}")
        assert torch.equal(states[2], pool[2])
        assert states[0].isnan().all()


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "heads"), [(1, 1, 1), (31, 33, 2), (64, 64, 8), (72, 264, 1), (140, 80, 20)]
)
def test_steps_around_a_tile(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int, heads: int) -> None:
    """From the empty state, where every gauge moves, in memory that is aligned and in memory that is not."""
    q, k, v = qkv(1, heads, 5, head_dim, value_dim, kv_heads=1, dtype=dtype)
    if kernel == "hadamard_exp":
        k = k + 8 * torch.arange(5, dtype=dtype)[:, None]
    options = {"kernel": kernel, "enable_gqa": True}
    expected, expected_state = reference(q, k, v, is_causal=True, return_state=True, **options)
    empty = elattn.new_state(1, 1, head_dim, value_dim, kernel=kernel, dtype=ACCUMULATION[dtype])
    shifted = torch.empty(empty.numel() + 1, dtype=empty.dtype)[1:].view_as(empty).copy_(empty)
    for state in (empty, shifted):
        for t in range(5):
            out = attention_step(*(x[:, :, t] for x in (q, k, v)), state, **options)
            check(out, expected[:, :, t], number(kernel), what=f"token {t}")
        check_state(state, expected_state, head_dim, value_dim, kernel=kernel, dtype=dtype)


@EVERY_KERNEL
def test_keys_count_without_query_heads(kernel: str) -> None:
    q, k, v = qkv(1, 2, 18, 16, 24)
    _, expected = reference(q, k, v, kernel=kernel, return_state=True)
    options = {"kernel": kernel, "enable_gqa": True}
    _, state = attention(q[:, :0, :17], k[:, :, :17], v[:, :, :17], is_causal=True, return_state=True, **options)
    attention_step(q[:, :0, 17], k[:, :, 17], v[:, :, 17], state, **options)
    check_state(state, expected, 16, 24, kernel=kernel)


@pytest.mark.skipif(BACKEND == "cpu", reason="equal calls on the CPU are compared in test_bitwise.py")
@EVERY_KERNEL
@DTYPES
def test_equal_calls_give_equal_bits(kernel: str, dtype: torch.dtype) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        x = qkv(2, 2, 70, 32, 32, dtype=dtype, requires_grad=True)
        out, state = attention(*x, kernel=kernel, is_causal=True, return_state=True)
        found.append((out, state, *torch.autograd.grad(out.sum() + state.sum(), x)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


# grouped_linear. Tensor cores multiply bfloat16 and float16 where every row is made of whole, aligned 16 bytes.

GROUPED_DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


def signs(*shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1: a sum of up to 256 products is exact in every dtype, so a term lost or from elsewhere shows."""
    return torch.randint(-1, 2, shape).to(dtype)


def grouped_products(x: Tensor, weight: Tensor, g: Tensor, offsets: Tensor) -> list[Tensor]:
    """y and the gradients of x and weight, as autograd computes them."""
    return [
        elattn.grouped_linear(x, weight, offsets),
        elattn.grouped_linear(g, weight.mT, offsets),
        torch.ops.elattn._grouped_outer(g, x, offsets),
    ]


def check_grouped_products(x: Tensor, weight: Tensor, g: Tensor, offsets: Tensor, what: str) -> None:
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y = loop(*exact, offsets)
    expected = [y.detach(), *torch.autograd.grad(y, exact, g.double())]
    for actual, wanted in zip(grouped_products(x, weight, g, offsets), expected, strict=True):
        assert actual.dtype == x.dtype
        assert torch.equal(actual.double(), wanted), what


@GROUPED_DTYPES
@pytest.mark.parametrize("rows", [[0], [1], [65], [63, 1, 64], [0, 129, 0, 0, 2, 0]], ids=str)
def test_groups_and_dimensions_around_a_tile(dtype: torch.dtype, rows: list[int]) -> None:
    # Full tiles, tiles that end early in every dimension, and sizes for which no rows, or only some, are whole.
    for size_in, size_out in [(64, 128), (8, 8), (104, 136), (40, 129), (63, 64), (1, 65), (0, 8), (8, 0)]:
        x, weight = signs(sum(rows), size_in, dtype=dtype), signs(len(rows), size_out, size_in, dtype=dtype)
        g = signs(sum(rows), size_out, dtype=dtype)
        check_grouped_products(x, weight, g, ends(rows), f"{size_in} to {size_out}")


def shifted(x: Tensor) -> list[Tensor]:
    """The same values with whole 16 bytes between rows, and beginning beside a multiple of 16 bytes."""
    gap = torch.full((*x.shape[:-1], x.size(-1) + 8), torch.nan, dtype=x.dtype)
    gap[..., : x.size(-1)] = x
    flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    flat[1:] = x.flatten()
    return [gap[..., : x.size(-1)], flat[1:].view_as(x)]


@GROUPED_DTYPES
def test_strides_and_alignment_of_groups(dtype: torch.dtype) -> None:
    offsets = ends([3, 0, 64, 5])
    inputs = [signs(72, 40, dtype=dtype), signs(4, 72, 40, dtype=dtype), signs(72, 72, dtype=dtype)]
    for i, name in enumerate(["x", "weight", "g"]):
        for n, other in enumerate([*strided(inputs[i]), *shifted(inputs[i])]):
            check_grouped_products(*inputs[:i], other, *inputs[i + 1 :], offsets, f"{name} {n}")
    x, weight, g = inputs
    apart = torch.full((4, 72 * 40 + 1), torch.nan, dtype=dtype)[:, 1:].view_as(weight).copy_(weight)
    check_grouped_products(x, apart, g, offsets, "groups that are no multiple of 16 bytes apart")
    check_grouped_products(x, weight[:1].expand(4, -1, -1), g, offsets, "one weight")
    check_grouped_products(x[:1].expand(72, -1), weight, g[:1].expand(72, -1), offsets, "one row")


@GROUPED_DTYPES
def test_a_group_reads_no_other_rows(dtype: torch.dtype) -> None:
    offsets = ends([5, 64, 3])
    x, weight, g = signs(72, 40, dtype=dtype), signs(3, 72, 40, dtype=dtype), signs(72, 72, dtype=dtype)
    expected = grouped_products(x, weight, g, offsets)
    for first in (x[:5], weight[:1], g[:5]):
        first.fill_(torch.nan)
    for actual, wanted, first in zip(grouped_products(x, weight, g, offsets), expected, [5, 5, 1], strict=True):
        assert actual[:first].isnan().all()
        assert torch.equal(actual[first:], wanted[first:])
