"""Continuing prompts with a model that has `new_state`, `prefill` and `step` (docs/generation.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elattn.models.transformer import ELATransformer

__all__ = ["Sampling", "generate", "sample", "stream"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits; the fields are arguments of `ELATransformer.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature must not be negative (got {self.temperature})")
        _require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1 (got {self.top_k})")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1] (got {self.top_p})")
        _require(self.repetition_penalty > 0, f"repetition_penalty must be positive (got {self.repetition_penalty})")


def sample(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature), logits (B, V), after penalty and filters.

    seen: (B, V) bool, the tokens that the repetition penalty is for.
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # Logits relative to the largest: a small temperature then makes no infinity of it.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        least = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        # A token stays if those before it do not reach top_p yet, so one always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0)
    return torch.multinomial(probabilities, 1, generator=sampling.generator).squeeze(-1)


def generate(
    model: ELATransformer,
    ids: Tensor,
    max_new_tokens: int,
    *,
    eos_id: int | list[int] | None = None,
    key_padding_mask: Tensor | None = None,
    **sampling: object,
) -> Tensor:
    """See `ELATransformer.generate`."""
    tokens = stream(model, ids, max_new_tokens, eos_id=eos_id, key_padding_mask=key_padding_mask, **sampling)
    return torch.cat([ids, *(token[:, None] for token in tokens)], 1)


def stream(
    model: ELATransformer,
    ids: Tensor,
    max_new_tokens: int,
    *,
    eos_id: int | list[int] | None = None,
    key_padding_mask: Tensor | None = None,
    **sampling: object,
) -> Iterator[Tensor]:
    """See `ELATransformer.stream`. The arguments are checked before the first token is asked for."""
    _require(
        ids.dim() == 2 and ids.size(1) > 0,
        f"ids must be (B, L) with at least one token (got shape {tuple(ids.shape)})",
    )
    _require(max_new_tokens >= 0, f"max_new_tokens must not be negative (got {max_new_tokens})")
    stop_ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    _require(eos_id is None or len(stop_ids) > 0, "eos_id must be a token, a list of at least one, or None (got [])")
    prompt, lengths = (ids, None) if key_padding_mask is None else _right_padded(ids, key_padding_mask)
    # The last token of a continuation is never fed back, so it needs no room.
    longest = ids.size(1) if lengths is None else int(lengths.max()) if len(lengths) else 0
    most = model.max_seq_len
    _require(
        most is None or longest + max_new_tokens - 1 <= most,
        f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit max_seq_len = {most}",
    )
    return _tokens(model, prompt, lengths, max_new_tokens, stop_ids, Sampling(**sampling))


@torch.no_grad()
def _tokens(
    model: ELATransformer,
    ids: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    stop_ids: list[int],
    sampling: Sampling,
) -> Iterator[Tensor]:
    if max_new_tokens == 0:
        return
    batch, length = ids.shape
    capacity = length + max_new_tokens - 1
    if model.max_seq_len is not None:
        capacity = min(capacity, model.max_seq_len)
    hidden, state = model._prefill_hidden(ids, model.new_state(batch, capacity), lengths)
    # The output layer for the last token alone: logits of a whole long prompt would be far larger than its state.
    last = hidden[:, -1] if lengths is None else hidden[torch.arange(batch, device=ids.device), lengths - 1]
    logits = model._logits(last)
    seen: Tensor | None = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        # Padding repeats the row's first token, so it adds none.
        real = ids if lengths is None else torch.where(_columns(ids) < lengths[:, None], ids, ids[:, :1])
        seen.scatter_(1, real, True)
    stops = torch.tensor(stop_ids, dtype=ids.dtype, device=ids.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    for remaining in range(max_new_tokens - 1, -1, -1):
        token = sample(logits, sampling, seen)
        if stop_ids:
            token = token.masked_fill(ended, stop_ids[0])
            ended = ended | torch.isin(token, stops)
        yield token
        if remaining == 0 or (stop_ids and bool(ended.all())):
            return
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        logits = model.step(token, state)


def _right_padded(ids: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts moved to the left end of their rows, and their lengths (B,)."""
    _require(
        padding.dtype == torch.bool and padding.shape == ids.shape,
        f"key_padding_mask must be bool of the shape of ids, {tuple(ids.shape)} "
        f"(got {padding.dtype} {tuple(padding.shape)})",
    )
    lengths = (~padding).sum(1)
    changes = (padding[:, 1:] != padding[:, :-1]).sum(1)
    for row, (count, parts) in enumerate(zip(lengths.tolist(), changes.tolist(), strict=True)):
        _require(count > 0, f"every prompt must have at least one token (row {row} of key_padding_mask is all padding)")
        _require(
            parts <= 1,
            f"the padding of a row must be all before or all after its prompt (row {row} of key_padding_mask has it "
            "on both sides or inside)",
        )
    first = padding.long().argmin(1)  # the column of the first token
    return ids.gather(1, (_columns(ids) + first[:, None]) % ids.size(1)), lengths


def _columns(ids: Tensor) -> Tensor:
    return torch.arange(ids.size(1), device=ids.device)[None]


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"generate: {rule}")
