"""Forgetting rates: every shape, rates and magnitudes that break naive forms (docs/math.md, 9)."""

import pytest
import torch
from torch import Tensor

import elattn
from compare import KERNELS, attention, check_forward, check_same, check_state, reference
from inputs import DTYPES, decay_shapes, padding_mask, qkv
from tolerances import check

EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@EVERY_KERNEL
@EVERY_DTYPE
def test_every_shape(kernel: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for length in (0, 1, 64, 130):
        q, k, v = qkv(2, 4, length, 16, 24, kv_heads=2, dtype=dtype)
        _, state = reference(*qkv(2, 2, 9, 16, 24), kernel=kernel, return_state=True)
        for shape in decay_shapes(2, 2, length, 16, kernel):
            for size in (1e-3, 0.3):
                decay = size * torch.rand(shape, dtype=wide)
                options = {"kernel": kernel, "is_causal": True, "enable_gqa": True, "decay": decay}
                check_forward(q, k, v, what=f"L={length} decay {shape}", **options)
                check_forward(q, k, v, state=state.to(wide), what=f"L={length} decay {shape} after a state", **options)


@EVERY_KERNEL
def test_decay_in_the_dtype_of_the_inputs(kernel: str) -> None:
    q, k, v = qkv(2, 2, 40, dtype=torch.bfloat16)
    decay = torch.rand(2, 2, 40).bfloat16()
    options = {"kernel": kernel, "is_causal": True}
    leaf = decay.clone().requires_grad_()
    out = elattn.attention(q, k, v, decay=leaf, **options)
    check_same(out, elattn.attention(q, k, v, decay=decay.float(), **options))
    (gradient,) = torch.autograd.grad(out.float().sum(), leaf)
    assert gradient.dtype == torch.bfloat16 and gradient.shape == decay.shape and gradient.any()


@EVERY_KERNEL
def test_no_decay_is_a_rate_of_zero(kernel: str) -> None:
    q, k, v = qkv(2, 2, 70)
    for shape in decay_shapes(2, 2, 70, 16, kernel):
        out, state = attention(q, k, v, kernel=kernel, is_causal=True, decay=torch.zeros(shape), return_state=True)
        expected, expected_state = attention(q, k, v, kernel=kernel, is_causal=True, return_state=True)
        check(out, expected, "1", what=f"{shape}")
        check_state(state, expected_state, 16, 16, kernel=kernel, what=f"{shape}")


@pytest.mark.parametrize("magnitude", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("rate", [1e-7, 1e-4, 1e-2])
def test_small_rates_act_on_large_keys(magnitude: float, rate: float) -> None:
    """One float32 for the gauge m - lambda would lose 2^-24 |m| per token; the two floats m + r lose nothing."""
    q, k, v = qkv(1, 2, 400, 8, 8)
    k = (k + magnitude).requires_grad_()
    decay = torch.full((2, 8), rate)
    check_forward(q, k, v, is_causal=True, decay=decay, what=f"k ~ {magnitude}, rate {rate}")


def test_a_tiny_rate_over_many_tokens() -> None:
    """65,536 tokens at a rate of 1e-5: a factor e^-0.66 that vanishes entirely if m - 1e-5 rounds to m = 300."""
    length = 65536
    q, k, v = torch.zeros(1, 1, length, 1), torch.full((1, 1, length, 1), 300.0), torch.zeros(1, 1, length, 1)
    v[:, :, 0] = 1000.0
    out = elattn.attention(q, k, v, is_causal=True, decay=torch.tensor([1e-5]))
    age = torch.arange(length, dtype=torch.float64)
    rate = torch.tensor(1e-5).double()
    expected = 1000.0 * torch.exp(-rate * age) / torch.exp(-rate * age).cumsum(0)
    # Sums of 65,536 terms, token by token (math.md, 1.4: 5e-5 relative after a million tokens).
    assert ((out.flatten() - expected).abs() <= 5e-5 * expected).all()


@EVERY_KERNEL
def test_large_rates_forget_everything(kernel: str) -> None:
    """With an enormous rate each row sees its own token only."""
    q, k, v = qkv(2, 2, 50)
    for rate in (90.0, 1e4, 1e30):
        decay = torch.full((2,), rate)
        out = elattn.attention(q, k, v, kernel=kernel, is_causal=True, decay=decay)
        check(out, v, "8-first" if kernel == "hadamard_exp" else "S1", scale=v.abs().max(), what=f"rate {rate}")
        leaves = [x.clone().requires_grad_() for x in (q, k, v, decay)]
        out = elattn.attention(*leaves[:3], kernel=kernel, is_causal=True, decay=leaves[3])
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.square().sum(), leaves))


def test_silence_does_not_underflow() -> None:
    """Weights are relative: what 3,000 decayed tokens leave of one key is still all there is to see."""
    q, k, v = qkv(1, 1, 3000, 8, 8)
    k[:, :, 1:] = -1e4  # too far below the first key to count before 20,000 tokens
    out = elattn.attention(q, k, v, is_causal=True, decay=torch.full((1,), 0.5))
    check(out, v[:, :, :1].expand_as(out), "8")


@EVERY_KERNEL
def test_padded_tokens_do_not_decay(kernel: str) -> None:
    q, k, v = qkv(2, 2, 60)
    mask = padding_mask(2, 60)
    for shape in decay_shapes(2, 2, 60, 16, kernel):
        decay = torch.rand(shape)
        check_forward(q, k, v, kernel=kernel, is_causal=True, decay=decay, key_padding_mask=mask, what=f"{shape}")


@EVERY_KERNEL
def test_merge_with_decay(kernel: str) -> None:
    """The state of a then b is the merge of both, that of a decayed by the total over b."""
    q, k, v = qkv(2, 2, 50)
    first, second = slice(0, 20), slice(20, 50)
    for shape in decay_shapes(2, 2, 50, 16, kernel):
        decay = 0.1 * torch.rand(shape)
        pieces = []
        for tokens in (first, second):
            rates = decay if decay.dim() <= 2 else decay[:, :, tokens]
            pieces.append(
                attention(
                    *(x[:, :, tokens] for x in (q, k, v)), kernel=kernel, is_causal=True, decay=rates, return_state=True
                )[1]
            )
        total = 30 * decay if decay.dim() <= 2 else decay[:, :, second].sum(2)
        if decay.dim() == 3:
            total = total[..., None].expand(2, 2, 16) if kernel == "hadamard_exp" else total
        merged = merge(pieces, total, kernel)
        _, expected = reference(q, k, v, kernel=kernel, is_causal=True, decay=decay, return_state=True)
        check_state(merged, expected, 16, 16, kernel=kernel, what=f"{shape}")


def merge(pieces: list[Tensor], total: Tensor, kernel: str) -> Tensor:
    if total.dim() == 2 and kernel != "hadamard_exp":
        # (B, Hkv) is no shape of decay: one entry of the batch at a time.
        rows = [
            elattn.merge_states(pieces[0][b : b + 1], pieces[1][b : b + 1], 16, 16, kernel=kernel, decay=total[b])
            for b in range(total.size(0))
        ]
        return torch.cat(rows)
    return elattn.merge_states(*pieces, 16, 16, kernel=kernel, decay=total)


def test_bidirectional_calls_refuse_decay() -> None:
    q, k, v = qkv(length=5)
    with pytest.raises(RuntimeError, match="decay"):
        elattn.attention(q, k, v, decay=torch.ones(2))
