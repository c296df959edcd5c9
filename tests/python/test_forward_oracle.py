"""The forward of every kernel against the quadratic form in float64 (docs/math.md, 7: rows 1 and S1)."""

import pytest
import torch

import elattn
from compare import ALL_KERNELS, KERNELS, SQUARED, check_forward, check_same, reference
from inputs import DTYPES, qkv, transposed
from tolerances import check

LENGTHS = (0, 1, 63, 64, 65, 129)
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)


def test_kernels_are_the_documented_ones() -> None:
    assert tuple(elattn.kernels()) == KERNELS


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_lengths(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        check_forward(*qkv(2, 2, length, dtype=dtype), kernel=kernel, is_causal=is_causal, what=f"L={length}")


@EVERY_KERNEL
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_head_and_value_dimensions(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
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
        q, k, v = qkv(1, 2, 19, head_dim, value_dim, dtype=dtype)
        check_forward(q, k, v, kernel=kernel, is_causal=is_causal, what=f"D={head_dim} Dv={value_dim}")


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_grouped_heads(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    for heads, kv_heads in [(4, 1), (4, 2), (6, 2), (3, 3)]:
        q, k, v = qkv(2, heads, 35, 16, 24, kv_heads=kv_heads, dtype=dtype)
        check_forward(q, k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True, what=f"H={heads} Hkv={kv_heads}")


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_strides_do_not_change_a_bit(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 3, 21, 16, 24, dtype=dtype)
    if kernel == "features":
        q, k = q.abs(), k.abs()

    def run(*x: torch.Tensor) -> torch.Tensor:
        if kernel == "features":
            return elattn.feature_attention(*x, is_causal=is_causal)
        return elattn.attention(*x, kernel=kernel, is_causal=is_causal)

    expected = run(q, k, v)
    check(expected, reference(q, k, v, kernel=kernel, is_causal=is_causal), "S1" if kernel in SQUARED else "1")
    check_same(run(*map(transposed, (q, k, v))), expected)
    last_dim_strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    check_same(run(*last_dim_strided), expected)
    sliced = [torch.cat([x, x], -1)[..., : x.size(-1)] for x in (q, k, v)]
    check_same(run(*sliced), expected)
    shared = k[:, :1].expand(-1, 3, -1, -1)  # a head stride of 0
    check_same(run(q, shared, v), run(q, shared.contiguous(), v))


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_cross_attention(kernel: str, dtype: torch.dtype) -> None:
    for query_len, key_len in [(1, 65), (65, 1), (7, 0), (0, 7), (64, 129)]:
        q, k, v = qkv(2, 2, query_len, key_len=key_len, dtype=dtype)
        check_forward(q, k, v, kernel=kernel, what=f"Lq={query_len} Lk={key_len}")
    q, k, v = qkv(2, 2, 7, key_len=0, dtype=dtype)
    assert torch.equal(elattn.attention(q, k, v), torch.zeros_like(q))


@pytest.mark.parametrize("kernel", KERNELS)
@MODES
def test_scale(kernel: str, is_causal: bool) -> None:
    for scale in (0.125, 3.0, -1.5, 0.0):
        if scale == 0.0 and kernel in SQUARED:
            continue  # q = k = 0: every weight is 0, see test_properties.py
        check_forward(*qkv(length=33), kernel=kernel, is_causal=is_causal, scale=scale, what=f"scale={scale}")


@pytest.mark.parametrize("kernel", SQUARED)
@MODES
@EVERY_DTYPE
def test_eps_of_squared_kernels(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    for eps in (1e-6, 0.5, 100.0):
        check_forward(*qkv(length=33, dtype=dtype), kernel=kernel, is_causal=is_causal, eps=eps, what=f"eps={eps}")


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_state_stands_for_earlier_keys(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 50, 16, 24, kv_heads=2, dtype=dtype)
    options = {"kernel": kernel, "enable_gqa": True}
    for before in (0, 1, 20, 50):
        past, now = (slice(None), slice(None), slice(before)), (slice(None), slice(None), slice(before, None))
        _, state = reference(q[past], k[past], v[past], is_causal=True, return_state=True, **options)
        state = state.to(torch.float64 if dtype == torch.float64 else torch.float32)
        check_forward(
            q[now], k[now], v[now], state=state, is_causal=is_causal, what=f"after {before} tokens", **options
        )


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)], ids=["batch", "heads", "length"])
@EVERY_KERNEL
@MODES
def test_empty_dimensions(shape: tuple[int, ...], kernel: str, is_causal: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    if kernel == "features":
        out, state = elattn.feature_attention(x.abs(), x.abs(), x, is_causal=is_causal, return_state=True)
    else:
        out, state = elattn.attention(x, x, x, kernel=kernel, is_causal=is_causal, return_state=True)
    assert out.shape == shape
    check_same(state.detach(), elattn.new_state(shape[0], shape[1], 4, 4, kernel=kernel))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(shape))


def test_feature_kernel_object() -> None:
    q, k, v = qkv(length=33)
    kernel = elattn.FeatureKernel(lambda x: x.square(), lambda x: x.abs())
    for is_causal in (True, False):
        out, state = elattn.attention(q, k, v, kernel=kernel, is_causal=is_causal, return_state=True)
        expected, expected_state = elattn.feature_attention(
            q.square(), k.abs(), v, is_causal=is_causal, return_state=True
        )
        check_same(out, expected)
        check_same(state, expected_state)
