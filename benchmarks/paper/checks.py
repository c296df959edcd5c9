"""What a model has to satisfy before it is timed. Each raises AssertionError with what it found."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elattn.models import ELATransformer
from elattn.nn import MoE
from elattn.testing import assert_causal, assert_mixes_tokens

TOLERANCE = 1e-4  # of the largest value, in float32


@torch.no_grad()
def assert_decodes(model: ELATransformer, tokens: int = 24) -> None:
    """The model is causal, mixes tokens, and its prefill and steps give the logits of its forward."""
    ids = torch.randint(model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    assert_causal(model, ids)
    assert_mixes_tokens(model, ids)
    expected = model(ids)
    begin, state = model.prefill(ids[:, : tokens // 2], model.new_state(2, tokens))
    steps = [model.step(ids[:, t], state) for t in range(tokens // 2, tokens)]
    require_close("prefill and steps", torch.cat([begin, torch.stack(steps, 1)], 1), expected)


@torch.no_grad()
def assert_mixes_experts(moe: MoE, x: Tensor) -> None:
    """The output is that of every expert computed for every token, weighted as `explain` says. x (1, L, d_model).

    For experts with outer bias.
    """
    report = moe.explain(x)
    every = torch.stack([_expert(moe, index, x) for index in range(moe.num_experts)], 2)  # (1, L, E, d_model)
    chosen = every.gather(2, report.experts[..., None].expand(*report.experts.shape, x.size(-1)))
    expected = (report.weights[..., None] * chosen + moe.labels[report.experts]).sum(2)
    require_close("the mixture of experts", moe(x)[0], expected)


def require_close(what: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: off by {error:.2g} of the largest value, more than {TOLERANCE:g}")


def _expert(moe: MoE, index: int, x: Tensor) -> Tensor:
    gate, up = F.linear(x, moe.gate_up[index]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, moe.down[index])
