"""elattn.testing: its reference against loops written from the definition, and its checks against planted faults."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elattn
from compare import KERNELS
from elattn.testing import (
    assert_causal,
    assert_mixes_tokens,
    assert_padding_invariant,
    check_kernel,
    gauge_free,
    reference_attention,
)
from inputs import decay_shapes, qkv


def unit(x: Tensor) -> Tensor:
    return x / x.norm() if x.norm() > 0 else x


def kappa(kernel: str, q: Tensor, k: Tensor, eps: float) -> Tensor:
    """Weights of one pair, per channel (D,) for hadamard_exp and (1,) for the others: paper.md, section 1."""
    if kernel == "hadamard_exp":
        return q.exp() * k.exp()
    if kernel == "sum_sq":
        return ((q + k) ** 2).sum(0, keepdim=True) + eps
    if kernel == "sub_sq":
        return ((q - k) ** 2).sum(0, keepdim=True) + eps
    if kernel == "directional":
        # Half the squared length of the sum of two unit vectors is 1 + their cosine; the query's factor cancels.
        return (k.square().sum() + 1) * (((unit(q) + unit(k)) ** 2).sum(0, keepdim=True) + eps)
    return ((F.elu(q) + 1) * (F.elu(k) + 1)).sum(0, keepdim=True)


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, is_causal: bool, scale: float, eps: float,
    mask: Tensor | None, decay: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, heads, query_len = q.shape[:3]
    group = heads // k.size(1)
    out = torch.zeros(batch, heads, query_len, v.size(3), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // group
            for i in range(query_len):
                num, den = torch.zeros(v.size(3), dtype=torch.float64), 0.0
                for j in range(i + 1 if is_causal else k.size(2)):
                    if mask is not None and mask[b, j]:
                        continue
                    weight = kappa(kernel, scale * q[b, h, i], scale * k[b, kv, j], eps)
                    if decay is not None:
                        for t in range(j + 1, i + 1):
                            if mask is None or not mask[b, t]:
                                rate = decay[kv] if decay.dim() <= 2 else decay[b, kv, t]
                                weight = weight * torch.exp(-rate)
                    num, den = num + weight.sum() * v[b, kv, j], den + weight.sum()
                if den != 0:
                    out[b, h, i] = num / den
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_the_reference_is_the_definition(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 5, 3, 4, kv_heads=1, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False, True], [True, True, False, False, False]])
    decays = [None, *(torch.rand(shape, dtype=torch.float64) for shape in decay_shapes(2, 1, 5, 3, kernel))]
    for decay in decays if is_causal else [None]:
        for padding in (None, mask):
            for scale, eps in ((1.0, 0.0), (-0.5, 0.0 if kernel in ("hadamard_exp", "elu") else 0.3)):
                found = reference_attention(
                    q, k, v, kernel=kernel, is_causal=is_causal, scale=scale, eps=eps, enable_gqa=True, decay=decay,
                    key_padding_mask=padding,
                )  # fmt: skip
                expected = by_loops(q, k, v, kernel, is_causal, scale, eps, padding, decay)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [*KERNELS, "features"])
def test_the_reference_goes_on_from_its_state(kernel: str) -> None:
    q, k, v = (x.abs() if kernel == "features" else x for x in qkv(2, 2, 12, 4, 3, dtype=torch.float64))
    for decay in [None] if kernel == "features" else [None, torch.rand(2, dtype=torch.float64)]:
        options = {"kernel": kernel, "is_causal": True, "decay": decay, "return_state": True}
        whole, last = reference_attention(q, k, v, **options)
        for cut in (0, 1, 5, 12):
            first, state = reference_attention(*(x[:, :, :cut] for x in (q, k, v)), **options)
            second, state = reference_attention(*(x[:, :, cut:] for x in (q, k, v)), state=state, **options)
            torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-11, atol=1e-12)
            for name, part in gauge_free(state, 4, 3, kernel=kernel).items():
                torch.testing.assert_close(part, gauge_free(last, 4, 3, kernel=kernel)[name], rtol=1e-9, atol=1e-10)


def test_the_reference_of_packed_sequences() -> None:
    q, k, v = qkv(1, 2, 9, 4, 3, dtype=torch.float64)
    found = reference_attention(q, k, v, is_causal=True, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    parts = [reference_attention(*(x[:, :, s] for x in (q, k, v)), is_causal=True) for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(found, torch.cat(parts, 2))


def test_the_reference_survives_extremes() -> None:
    """In log-space: keys of 1e4 neither overflow nor lose a row, where sums of exp(k) would."""
    q, k, v = qkv(1, 1, 6, 4, 3, dtype=torch.float64)
    k = k + 1e4 * torch.arange(-3, 3)[:, None]
    out = reference_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, v)  # each token outweighs all before it


# Models with and without the faults that the checks are for


class Mixer(nn.Module):
    """A language model of one layer; `mix` maps (B, L, C) to (B, L, C)."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 16)
        self.mix = mix

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return (x + self.mix(x)) @ self.embedding.weight.T


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 4)).transpose(1, 2)


def causal(x: Tensor) -> Tensor:
    return elattn.attention(heads(x), heads(x), heads(x), is_causal=True).transpose(1, 2).flatten(2)


def bidirectional(x: Tensor) -> Tensor:
    return elattn.attention(heads(x), heads(x), heads(x)).transpose(1, 2).flatten(2)


def over_heads(x: Tensor) -> Tensor:
    """A scan over dimension 1 of (B, H, L, D), as the author's code does: it sums over heads, not tokens."""
    q = heads(x)
    sums = torch.cumsum(q.exp()[..., None] * q[..., None, :], 1)
    z = torch.cumsum(q.exp(), 1)
    return (
        (q.exp()[..., None, :] @ sums).squeeze(-2).div((q.exp() * z).sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    )


def one_token_ahead(x: Tensor) -> Tensor:
    return causal(torch.cat([x[:, 1:], x[:, -1:]], 1))


def causal_with_bidirectional_lobe(x: Tensor) -> Tensor:
    """The author's Memory Lobe: a bidirectional lobe in a causal model, weakly coupled."""
    return causal(x) + 1e-2 * bidirectional(x)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(17, (2, 12))


def test_a_causal_model_passes(ids: Tensor) -> None:
    model = Mixer(causal)
    assert_causal(model, ids)
    assert_mixes_tokens(model, ids)
    assert_causal(lambda x: causal(x), torch.randn(2, 12, 16))


@pytest.mark.parametrize("mix", [bidirectional, one_token_ahead, causal_with_bidirectional_lobe])
def test_models_that_see_the_future_are_caught(mix: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    with pytest.raises(AssertionError, match="sees the future"):
        assert_causal(Mixer(mix), ids)


@pytest.mark.parametrize("mix", [over_heads, lambda x: torch.zeros_like(x), torch.tanh])
def test_models_that_mix_no_tokens_are_caught(mix: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    assert_causal(Mixer(mix), ids)
    with pytest.raises(AssertionError, match="no later output notices"):
        assert_mixes_tokens(Mixer(mix), ids)


def test_a_leak_in_one_position_is_caught(ids: Tensor) -> None:
    def leak(x: Tensor) -> Tensor:
        y = causal(x)
        return torch.cat([y[:, :6], y[:, 6:7] + 1e-3 * x[:, 7:8], y[:, 7:]], 1)

    with pytest.raises(AssertionError, match="output 6 sees the future"):
        assert_causal(Mixer(leak), ids)


def test_a_model_that_ignores_one_token_is_caught(ids: Tensor) -> None:
    def deaf(x: Tensor) -> Tensor:
        return causal(torch.cat([x[:, :4], 0 * x[:, 4:5], x[:, 5:]], 1))

    with pytest.raises(AssertionError, match="token 4"):
        assert_mixes_tokens(Mixer(deaf), ids)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return elattn.attention(heads(x), heads(x), heads(x), key_padding_mask=mask).transpose(1, 2).flatten(2)


def test_padding_invariance() -> None:
    x, lengths = torch.randn(3, 10, 16), [10, 4, 0]
    assert_padding_invariant(masked, x, lengths)
    with pytest.raises(AssertionError, match="padding"):
        assert_padding_invariant(lambda x, mask: bidirectional(x), x, lengths)
    with pytest.raises(AssertionError, match="padding"):  # padding is ignored by its values, but counted
        assert_padding_invariant(lambda x, mask: masked(x, mask) + mask.sum(1)[:, None, None] * 0.1, x, lengths)
    with pytest.raises(ValueError, match="lengths"):
        assert_padding_invariant(masked, x, [1, 2])


def outer(x: Tensor) -> Tensor:
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


def parts(x: Tensor) -> Tensor:
    return torch.cat([x.relu(), (-x).relu()], -1)


def test_kernels_of_ones_own() -> None:
    check_kernel(torch.exp, torch.exp, lambda q, k: (q + k).exp().sum(-1))
    agreement = lambda q, k: (parts(q) * parts(k)).sum(-1).square()  # noqa: E731
    check_kernel(lambda x: outer(parts(x)), lambda x: outer(parts(x)), agreement, head_dim=3)


def test_kernels_with_faults_are_caught() -> None:
    with pytest.raises(AssertionError, match="negative"):
        check_kernel(outer, outer, lambda q, k: (q * k).sum(-1).square())
    with pytest.raises(AssertionError, match="differs from kappa"):
        check_kernel(torch.exp, torch.exp, lambda q, k: (q + k).exp().sum(-1) + math.e)
    with pytest.raises(AssertionError, match="gradient"):
        # Right values, but a gradient that does not flow.
        check_kernel(lambda x: x.exp().detach(), torch.exp, lambda q, k: (q + k).exp().sum(-1))
