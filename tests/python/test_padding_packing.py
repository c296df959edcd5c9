"""key_padding_mask and cu_seqlens. That packing equals separate calls bit for bit is in test_bitwise.py."""

import pytest
import torch

import elattn
from compare import (
    ALL_KERNELS,
    KERNELS,
    attention,
    check_forward,
    check_promise,
    check_same,
    check_state_promise,
    number,
)
from inputs import DTYPES, padding_mask, qkv
from tolerances import check, relative

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_against_the_reference(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    options = {"kernel": kernel, "is_causal": is_causal, "enable_gqa": True}
    for length in (1, 64, 65):
        q, k, v = qkv(3, 4, length, kv_heads=2, dtype=dtype)
        check_forward(q, k, v, key_padding_mask=padding_mask(3, length), what=f"L={length}", **options)
    q, k, v = qkv(1, 4, 100, kv_heads=2, dtype=dtype)
    for integer in (torch.int32, torch.int64):
        ends = torch.tensor([0, 0, 33, 97, 97, 100], dtype=integer)
        check_forward(q, k, v, cu_seqlens=ends, what="packed", **options)


@EVERY_KERNEL
@MODES
def test_a_mask_deletes_tokens(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(1, 2, 60, requires_grad=True)
    mask = padding_mask(1, 60)
    keep = ~mask[0]
    g = torch.randn_like(v)
    out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, key_padding_mask=mask, return_state=True)
    short = [x[:, :, keep].detach().requires_grad_() for x in (q, k, v)]
    deleted, deleted_state = attention(*short, kernel=kernel, is_causal=is_causal, return_state=True)
    check_promise(out[:, :, keep], deleted, number(kernel))
    check_state_promise(state, deleted_state, 16, 16, kernel, q.dtype)
    found = torch.autograd.grad(out[:, :, keep], (q, k, v), g[:, :, keep])
    expected = torch.autograd.grad(deleted, short, g[:, :, keep])
    for name, actual, want in zip("qkv", found, expected, strict=True):
        check(actual[:, :, keep], want, "2", scale=relative(want), what=f"d{name}")
        assert not actual[:, :, ~keep].any(), f"d{name} of deleted tokens"


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_padded_keys_are_never_read(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 40, dtype=dtype)
    mask = padding_mask(2, 40)
    g = torch.randn_like(v)

    def run(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, state = attention(*leaves, kernel=kernel, is_causal=is_causal, key_padding_mask=mask, return_state=True)
        return out, state, *torch.autograd.grad(out, leaves, g)

    expected = run(k, v)
    for poison in (torch.nan, torch.inf):
        padding = mask[:, None, :, None]
        found = run(k.masked_fill(padding, poison), v.masked_fill(padding, poison))
        for name, actual, want in zip(["output", "state", "dq", "dk", "dv"], found, expected, strict=True):
            assert not actual.isnan().any(), f"{name} with {poison} in the padding"
            if not (kernel == "features" and name == "dk"):  # there |k| itself makes 0 * nan
                check_same(actual, want, f"{name} with {poison} in the padding")
    for name, gradient in zip("kv", expected[3:], strict=True):
        assert not gradient.transpose(1, 2)[mask].any(), f"d{name} at padded keys"


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_rows_that_see_no_key(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 20, dtype=dtype, requires_grad=True)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0] = True
    mask[1, :7] = True
    out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, key_padding_mask=mask, return_state=True)
    assert not out[0].any() and out[1, :, 7:].any()
    check_same(state[0].detach(), elattn.new_state(1, 2, 16, 16, kernel=kernel, dtype=state.dtype)[0])
    if is_causal:
        assert not out[1, :, :7].any()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    for name, gradient in {"q": dq, "k": dk, "v": dv}.items():
        assert torch.isfinite(gradient).all() and not gradient[0].any(), f"d{name}"
    if is_causal:
        assert not dq[1, :, :7].any()


@EVERY_KERNEL
@MODES
def test_a_mask_without_padding_changes_no_bit(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 40)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    check_same(
        attention(q, k, v, kernel=kernel, is_causal=is_causal, key_padding_mask=mask),
        attention(q, k, v, kernel=kernel, is_causal=is_causal),
    )
    wide = torch.zeros(2, 80, dtype=torch.bool)
    wide[:, 1::2] = True
    strided = wide[:, ::2]  # every second byte of a row
    check_same(
        attention(q, k, v, kernel=kernel, is_causal=is_causal, key_padding_mask=strided),
        attention(q, k, v, kernel=kernel, is_causal=is_causal),
    )


@EVERY_KERNEL
def test_padding_of_other_keys_than_queries(kernel: str) -> None:
    q, k, v = qkv(2, 2, 7, key_len=40)
    check_forward(q, k, v, kernel=kernel, key_padding_mask=padding_mask(2, 40))


@EVERY_KERNEL
@MODES
def test_only_empty_sequences(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(1, 2, 0, requires_grad=True)
    ends = torch.tensor([0, 0, 0, 0])
    out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, cu_seqlens=ends, return_state=True)
    assert out.shape == (1, 2, 0, 16)
    check_same(state.detach(), elattn.new_state(3, 2, 16, 16, kernel=kernel))
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_states_go_on(kernel: str) -> None:
    """Packed prefill with a state per sequence, twice, equals one packed prefill of the joined sequences."""
    first, second = [5, 0, 9], [3, 4, 0]
    pieces = [[qkv(1, 2, n) for n in lengths] for lengths in (first, second)]

    def pack(rows: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        lengths = torch.tensor([row[0].size(2) for row in rows])
        return [torch.cat(x, 2) for x in zip(*rows, strict=True)], torch.cat(
            [torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]
        )

    common = {"kernel": kernel, "is_causal": True, "return_state": True}
    x, ends = pack(pieces[0])
    _, state = elattn.attention(*x, cu_seqlens=ends, **common)
    x, ends = pack(pieces[1])
    out, state = elattn.attention(*x, cu_seqlens=ends, state=state, **common)
    joined = [[torch.cat([a, b], 2) for a, b in zip(one, two, strict=True)] for one, two in zip(*pieces, strict=True)]
    x, ends = pack(joined)
    whole, whole_state = elattn.attention(*x, cu_seqlens=ends, **common)
    check_state_promise(state, whole_state, 16, 16, kernel, torch.float32)
    tails = [whole[:, :, end - n : end] for n, end in zip(second, ends[1:].tolist(), strict=True)]
    check_promise(out, torch.cat(tails, 2), number(kernel))
