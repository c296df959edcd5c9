"""torch.autograd.gradcheck in float64 for each kernel and mode, eager and scripted: independent of the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from compare import ALL_KERNELS, KERNELS, SQUARED, attention
from elattn.testing import gauge_free
from inputs import decay_shapes, qkv

MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def small(**shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(1, 2, 6, 3, 2, kv_heads=1, dtype=torch.float64, requires_grad=True, **shape)


def away_from_zero(x: Tensor) -> Tensor:
    """Features are |x| here, which has no derivative at 0."""
    return (x.detach().sign() * (x.detach().abs() + 0.1)).requires_grad_()


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@MODES
def test_eager(kernel: str, is_causal: bool) -> None:
    q, k, v = small()
    q, k = away_from_zero(q), away_from_zero(k)
    _, state = attention(*qkv(1, 1, 5, 3, 2, dtype=torch.float64), kernel=kernel, return_state=True)
    # The gauge of a state is not differentiated, so only its other fields may be perturbed.
    gauge = {"hadamard_exp": 6, "features": 0, "elu": 0}.get(kernel, 0)
    sums = state[..., : state.size(-1) - gauge]
    if kernel in SQUARED:
        sums = state[..., 5:]
    sums = sums.detach().requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
        initial = torch.cat([state[..., :5], sums] if kernel in SQUARED else [sums, state[..., sums.size(-1) :]], -1)
        out, final = attention(
            q, k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True, state=initial, return_state=True
        )
        return out, *gauge_free(final, 3, 2, kernel=kernel).values()

    assert gradcheck(run, (q, k, v, sums), fast_mode=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_decay(kernel: str) -> None:
    q, k, v = small()
    q, k = away_from_zero(q), away_from_zero(k)
    for shape in decay_shapes(1, 1, 6, 3, kernel):
        decay = (0.1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()

        def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
            out, final = attention(
                q, k, v, kernel=kernel, is_causal=True, enable_gqa=True, decay=decay, return_state=True
            )
            return out, *gauge_free(final, 3, 2, kernel=kernel).values()

        assert gradcheck(run, (q, k, v, decay))


@pytest.mark.parametrize("kernel", SQUARED)
@MODES
def test_scale_and_eps(kernel: str, is_causal: bool) -> None:
    q, k, v = small()
    assert gradcheck(
        lambda *x: attention(*x, kernel=kernel, is_causal=is_causal, scale=0.7, eps=0.2, enable_gqa=True), (q, k, v)
    )


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@MODES
def test_padding_and_packing(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 1, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    q, k = away_from_zero(q), away_from_zero(k)
    mask = torch.tensor([[False, True, False, False, True], [True] * 5])
    assert gradcheck(lambda *x: attention(*x, kernel=kernel, is_causal=is_causal, key_padding_mask=mask), (q, k, v))
    ends = torch.tensor([0, 2, 2, 5])
    one = [x[:1].detach().requires_grad_() for x in (q, k, v)]
    assert gradcheck(lambda *x: attention(*x, kernel=kernel, is_causal=is_causal, cu_seqlens=ends), one)


def scripted(kernel: str, is_causal: bool) -> Callable[..., Tensor]:
    if kernel == "features":

        def features(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
            return torch.ops.elattn.feature_attention(q.abs(), k.abs(), v, is_causal=is_causal)

        compiled = torch.jit.script(features)
        return lambda q, k, v: compiled(q, k, v, is_causal)

    def built_in(q: Tensor, k: Tensor, v: Tensor, kernel: str, is_causal: bool) -> Tensor:
        return torch.ops.elattn.attention(q, k, v, kernel=kernel, is_causal=is_causal)

    compiled = torch.jit.script(built_in)
    return lambda q, k, v: compiled(q, k, v, kernel, is_causal)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@MODES
def test_scripted(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(1, 1, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(scripted(kernel, is_causal), (away_from_zero(q), away_from_zero(k), v))
