"""Gradients against float64 autograd through the quadratic form (docs/math.md, 7: rows 2 and S1)."""

import pytest
import torch

from compare import ACCUMULATION, ALL_KERNELS, KERNELS, SQUARED, attention, check_backward, reference
from inputs import DTYPES, decay_shapes, padding_mask, qkv, transposed

MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)


def state_of(kernel: str, dtype: torch.dtype, kv_heads: int, head_dim: int, value_dim: int) -> torch.Tensor:
    """The state after 12 other tokens, batch 2."""
    q, k, v = qkv(2, kv_heads, 12, head_dim, value_dim)
    return reference(q, k, v, kernel=kernel, return_state=True)[1].to(ACCUMULATION[dtype])


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_lengths(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    for length in (1, 63, 64, 65, 129):
        q, k, v = qkv(1, 2, length, dtype=dtype)
        check_backward(q, k, v, kernel=kernel, is_causal=is_causal, what=f"L={length}")


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_state_in_and_gradient_at_the_final_state(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 37, 16, 24, kv_heads=2, dtype=dtype)
    state = state_of(kernel, dtype, 2, 16, 24)
    for initial in (None, state):
        for final in (False, True):
            what = f"initial state: {initial is not None}, gradient at the final state: {final}"
            check_backward(
                q, k, v, state=initial, final=final, kernel=kernel, is_causal=is_causal, enable_gqa=True, what=what
            )


@pytest.mark.parametrize("kernel", KERNELS)
@EVERY_DTYPE
def test_decay(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 37, 16, 24, kv_heads=2, dtype=dtype)
    state = state_of(kernel, dtype, 2, 16, 24)
    for shape in decay_shapes(2, 2, 37, 16, kernel):
        decay = 0.2 * torch.rand(shape, dtype=ACCUMULATION[dtype])
        for initial, final in ((None, False), (state, True)):
            what = f"decay {shape}, states: {final}"
            check_backward(
                q,
                k,
                v,
                decay=decay,
                state=initial,
                final=final,
                kernel=kernel,
                is_causal=True,
                enable_gqa=True,
                what=what,
            )


@EVERY_KERNEL
@MODES
def test_head_and_value_dimensions(kernel: str, is_causal: bool) -> None:
    for head_dim, value_dim in [
        (1, 1),
        (1, 16),
        (16, 1),
        (16, 5),
        (64, 64),
        (80, 80),
        (128, 40),
        (33, 128),
        (256, 256),
        (8, 300),
    ]:
        q, k, v = qkv(1, 1, 13, head_dim, value_dim)
        check_backward(q, k, v, kernel=kernel, is_causal=is_causal, what=f"D={head_dim} Dv={value_dim}")


@EVERY_KERNEL
@MODES
def test_strides_and_scale(kernel: str, is_causal: bool) -> None:
    q, k, v = map(transposed, qkv(2, 2, 33))
    check_backward(q, k, v, kernel=kernel, is_causal=is_causal, what="transposed")
    if kernel != "features":
        check_backward(q, k, v, kernel=kernel, is_causal=is_causal, scale=0.25, what="scale")
        check_backward(q, k, v, kernel=kernel, is_causal=is_causal, scale=-1.5, what="negative scale")
    if kernel in SQUARED:
        check_backward(q, k, v, kernel=kernel, is_causal=is_causal, eps=0.3, what="eps")


@EVERY_KERNEL
def test_cross_attention(kernel: str) -> None:
    for query_len, key_len in [(1, 65), (65, 1), (31, 64)]:
        q, k, v = qkv(2, 2, query_len, key_len=key_len)
        check_backward(q, k, v, kernel=kernel, final=True, what=f"Lq={query_len} Lk={key_len}")


@EVERY_KERNEL
@MODES
def test_padding_and_packing(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 4, 37, kv_heads=2)
    options = {"kernel": kernel, "is_causal": is_causal, "enable_gqa": True}
    check_backward(q, k, v, key_padding_mask=padding_mask(2, 37), what="padding", **options)
    q, k, v = qkv(1, 4, 60, kv_heads=2)
    ends = torch.tensor([0, 7, 7, 40, 60])
    check_backward(q, k, v, cu_seqlens=ends, what="packed", **options)


@EVERY_KERNEL
def test_only_the_gradients_asked_for(kernel: str) -> None:
    """Inputs that need no gradient get none, and the gradients of the others do not depend on that."""
    q, k, v = qkv(length=20)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    every = torch.autograd.grad(attention(*leaves, kernel=kernel, is_causal=True).square().sum(), leaves)
    for index in range(3):
        mixed = [x.clone().requires_grad_(i == index) for i, x in enumerate((q, k, v))]
        (one,) = torch.autograd.grad(attention(*mixed, kernel=kernel, is_causal=True).square().sum(), mixed[index])
        assert torch.equal(one, every[index])


def test_gradients_of_gauge_entries_are_zero() -> None:
    """The entries m, r, c, e of a state are not differentiated: their gradient is exactly 0."""
    from elattn import attention as op
    from elattn import unpack_state

    for kernel, gauge in [("hadamard_exp", "mr"), ("sum_sq", "ce"), ("sub_sq", "ce"), ("directional", "ce")]:
        q, k, v = qkv(2, 2, 9, 16, 8)
        state = state_of(kernel, torch.float32, 2, 16, 8).requires_grad_()
        op(q, k, v, kernel=kernel, is_causal=True, state=state).square().sum().backward()
        fields = unpack_state(state.grad, 16, 8, kernel=kernel)
        for name, part in fields.items():
            assert bool(part.any()) == (name not in gauge), f"{kernel}: {name}"


@pytest.mark.parametrize("kernel", SQUARED)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_value_gauge_follows_the_mean(kernel: str, is_causal: bool) -> None:
    """With the values left relative to the first one, the error of dq grows to 4e-6 (rms) at this length."""
    q, k, v = qkv(1, 2, 513)
    check_backward(q, k, v, kernel=kernel, is_causal=is_causal, what="L=513")
