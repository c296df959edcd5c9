"""Loss on held-out documents."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from elattn.data import Documents
from elattn.models import ELATransformer
from elattn.train.processes import Processes

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of documents.

    Attributes:
        loss: mean cross entropy in nats per token.
        bits_per_byte: the same over the bytes of the text.
        aux: mean balance loss of the experts' layers, None without experts.
    """

    loss: float
    bits_per_byte: float
    aux: float | None


@torch.no_grad()
def evaluate(
    model: ELATransformer,
    documents: Documents,
    context: int,
    batch_size: int = 16,
    *,
    processes: Processes | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Cross entropy of every token but the first of each document, seen through windows of `context` tokens.

    Bits per byte compare models of different tokenizers: all bits, those of end tokens included, over the bytes that
    the predicted tokens cover.

    Args:
        processes: share the windows among them; each gets the result.
        autocast: makes the context of each forward pass.
    """
    device = next(model.parameters()).device
    starts = np.arange(0, documents.tokens.size - 1, context)
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    nats, aux, batches = 0.0, 0.0, 0.0
    for first in range(rank * batch_size, starts.size, size * batch_size):
        batch = documents.windows(starts[first : first + batch_size], context).to(device)
        with autocast():
            hidden, balance = model._hidden(batch.ids, batch.cu_seqlens)
            logits = model._logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
        nats += float(losses.double().sum())  # in float32 the sum would soon be coarser than a loss
        aux += float(torch.stack(balance).mean()) if balance else math.nan
        batches += 1
    if processes:
        nats, aux, batches = processes.sum(nats, aux, batches)
    return Evaluation(
        nats / documents.predicted_tokens,
        nats / math.log(2) / max(documents.predicted_bytes, 1),
        None if math.isnan(aux) else aux / batches,
    )
