"""No option lets a token see a later one or keeps it from the others, and the known faults are caught.

The faults are those of the public code of arXiv 2605.18848: each is written down again here, and the check or figure
that it must fail is shown to fail, and to pass without it.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elattn
from compare import KERNELS
from elattn.models import ELAConfig, ELATransformer
from elattn.nn import MemoryLobe, MoE
from elattn.testing import assert_causal, assert_mixes_tokens
from tiny_models import OPTIONS, config, model, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

MORE: dict[str, dict[str, Any]] = {
    **{f"kernel-{kernel}": {"kernel": kernel} for kernel in KERNELS},
    **{f"decay-{decay}": {"decay": decay} for decay in ("head", "channel", "token")},
    **{f"link-{mode}-{scope}": {"hyper_link": mode, "memory_lobe": scope}
       for mode in ("residual", "sum", "dense", "gated") for scope in (None, "depth", "causal")},
    **{f"experts-{bias}-{top_k}": {"num_experts": 3, "top_k": top_k, "moe_bias": bias}
       for bias in ("none", "inner", "outer") for top_k in (1, 3)},
    "rotary": {"rotary": True}, "conv": {"short_conv": 4}, "gate": {"gate": True}, "gqa": {"num_kv_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("options", (OPTIONS | MORE).values(), ids=OPTIONS | MORE)
def test_every_option_is_causal_and_mixes_tokens(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids()
    assert_causal(net, ids)
    assert_mixes_tokens(net, ids)


@pytest.mark.parametrize("preset", [ELAConfig.paper, ELAConfig.recommended])
def test_presets_are_causal_and_mix_tokens(preset: Any) -> None:
    """As they begin, without larger weights."""
    net = ELATransformer(preset(vocab_size=23, d_model=32, num_layers=2, d_hidden=32)).double()
    assert_causal(net, some_ids())
    assert_mixes_tokens(net, some_ids(), tolerance=1e-7)


# Causal sums over the wrong dimension


class SumsOverDimensionOne(nn.Module):
    """Causal linear attention by cumulative sums over dimension 1: right for q, k, v of (B, L, H, D)."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.heads_first = heads_first
        self.embedding = nn.Embedding(23, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).unflatten(-1, [4, 4])  # (B, L, H, D)
        if self.heads_first:
            x = x.transpose(1, 2)  # the fault: the sums then run over the heads of one token
        features = F.softmax(x, -1)
        sums = (features[..., None] * x[..., None, :]).cumsum(1)  # (B, L, H, D, D)
        y = torch.einsum("...d,...de->...e", features, sums)
        y = y / (features * features.cumsum(1)).sum(-1, keepdim=True)
        return (y.transpose(1, 2) if self.heads_first else y).flatten(2)


def test_sums_over_heads_instead_of_tokens_are_caught() -> None:
    ids = some_ids()
    assert_causal(SumsOverDimensionOne(heads_first=False), ids)
    assert_mixes_tokens(SumsOverDimensionOne(heads_first=False), ids)
    faulty = SumsOverDimensionOne(heads_first=True)
    assert_causal(faulty, ids)  # a test of causality alone does not see it
    with pytest.raises(AssertionError, match="no later output notices token 0"):
        assert_mixes_tokens(faulty, ids)


def test_our_operator_sums_over_tokens_in_either_layout_of_memory() -> None:
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in "qkv")  # (B, H, L, D)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = elattn.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(elattn.attention(*strided, is_causal=True), out)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])  # the first token sees itself alone


# A bidirectional memory lobe in a causal model


def test_a_bidirectional_lobe_in_a_causal_model_is_caught() -> None:
    """Nobody gets one by the configuration; forced in, the last token changes all outputs before it."""
    with pytest.raises(ValueError, match="memory_lobe must be one of None, depth, causal"):
        config(memory_lobe="bidirectional")
    for mode in ("residual", "sum"):
        net, ids = model(hyper_link=mode), some_ids()
        lobe = MemoryLobe(32, 4, scope="bidirectional").double()
        lobe.attach(net, allow_future=True)
        with pytest.raises(AssertionError, match="sees the future"):
            assert_causal(net, ids)
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % 23
        assert ((net(other) - net(ids))[:, :-1].abs().amax(-1) > 1e-6).all()
        with pytest.raises(ValueError, match="later tokens"):  # and there is no such thing as its decode
            net.generate(ids, 1)
        lobe.detach(net)
        assert_causal(net, ids)


def test_the_leak_makes_the_loss_fall_and_the_safe_scopes_do_not() -> None:
    """On random tokens nothing can be learned: a training loss clearly below log(V) is one that sees the label."""
    lowest = {}
    for scope in ("bidirectional", "causal", "depth"):
        torch.manual_seed(0)
        net = ELATransformer(config(hyper_link="sum", short_conv=3))
        lobe = MemoryLobe(32, 4, scope=scope)
        lobe.attach(net, allow_future=True)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(60):
            ids = torch.randint(23, (32, 4))
            loss = net.loss(ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lowest[scope] = loss.item()
    assert lowest["bidirectional"] < 2.95 < 3.05 < min(lowest["causal"], lowest["depth"])


# The load-balance loss


def test_the_balance_loss_does_not_grow_with_top_k() -> None:
    """The fault counted every one of the k assignments as a whole token, which doubles the loss at top-2."""
    x = torch.randn(4, 64, 16, dtype=torch.float64)
    for top_k in (1, 2, 3, 4):
        moe = MoE(16, 8, 4, top_k=top_k).double()
        with torch.no_grad():
            moe.labels.zero_()  # even probabilities
        _, aux = moe(x)
        assert aux.item() == pytest.approx(1.0)
        report = moe.explain(x)
        shares = F.one_hot(report.experts, 4).double().sum(-2).flatten(0, 1).mean(0)  # k in all: the fault
        assert (4 * shares * report.scores.flatten(0, 1).mean(0)).sum().item() == pytest.approx(top_k)


def test_aux_coef_counts() -> None:
    """The fault added the loss of the experts without its coefficient, or not at all."""
    ids, targets = some_ids(), some_ids()
    losses = []
    for aux_coef in (0.0, 0.01, 0.02):
        torch.manual_seed(0)
        losses.append(float(model(num_experts=4, aux_coef=aux_coef).loss(ids, targets).detach()))
    plain, once, twice = losses
    assert 0.005 < once - plain < 0.05
    assert twice - plain == pytest.approx(2 * (once - plain))
    torch.manual_seed(0)
    net = model(num_experts=4, aux_coef=0.5)
    net.loss(ids, targets).backward()
    gradient = net.layers[0].ffn.router_bias.grad.clone()
    torch.manual_seed(0)
    other = model(num_experts=4, aux_coef=0.0)
    other.loss(ids, targets).backward()
    assert not torch.allclose(gradient, other.layers[0].ffn.router_bias.grad)
