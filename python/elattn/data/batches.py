"""Windows of tokens as batches in which no document sees another."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elattn.errors import UserError

__all__ = ["Batch", "Batches", "Documents"]

_IGNORED = -100  # the target that `ELATransformer.loss` does not count


@dataclass(frozen=True)
class Batch:
    """Arguments of `ELATransformer.loss`.

    Attributes:
        ids, targets: int64, (rows, context), or (1, rows * context) if packed; -100 where nothing is predicted.
        cu_seqlens: (N + 1,) int32, where sequences begin, if packed; else None. The last ones may be empty.
        count: number of targets that are not -100.
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    count: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        move = (
            None if x is None else x.to(device, non_blocking=True) for x in (self.ids, self.targets, self.cu_seqlens)
        )
        return Batch(*move, self.count)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Documents:
    """Documents of at least two tokens each, one after the other.

    Attributes:
        tokens: (N,) unsigned ids.
        offsets: (documents + 1,) where each begins, and N.
        predicted_bytes: number of bytes that all tokens but the first of each document cover.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    predicted_bytes: int

    @property
    def predicted_tokens(self) -> int:
        """All tokens but the first of each document."""
        return self.tokens.size - (self.offsets.size - 1)

    def most_starts(self, context: int) -> int:
        """The largest number of documents that begin inside a window of `context` tokens, after its first."""
        starts = self.offsets[1:-1]
        return int((np.searchsorted(starts, starts + context - 1) - np.arange(starts.size)).max(initial=0))

    def count_targets(self, starts: np.ndarray, context: int) -> int:
        """The number of targets in the windows from `starts` (rows,) on, which end before the last token."""
        ends = np.searchsorted(self.offsets, starts + context, "right") - np.searchsorted(self.offsets, starts, "right")
        return starts.size * context - int(ends.sum())

    def windows(self, starts: np.ndarray, context: int, sequences: int | None = None) -> Batch:
        """The windows of `context` tokens from `starts` (rows,) on, each token's target being the one after it.

        The last token of a document has no target, so that none is predicted across a border. With more documents than
        one the rows are packed into one sequence with `cu_seqlens`, where each row and each document inside a row
        begins, so that no token sees another document; empty sequences at the end make its length `sequences` + 1.
        A window may reach beyond the last token: zeros without targets fill it.
        """
        rows, end = starts.size, self.tokens.size
        positions = starts[:, None] + np.arange(context + 1)
        windows = np.asarray(self.tokens[np.minimum(positions, end - 1)]).astype(np.int64)
        windows[positions >= end] = 0
        ids, targets = windows[:, :-1], windows[:, 1:].copy()
        targets[positions[:, 1:] >= end] = _IGNORED
        begins = [np.arange(rows) * context]
        if self.offsets.size > 2:
            first = np.searchsorted(self.offsets, starts, "right")
            last = np.searchsorted(self.offsets, np.minimum(starts + context, end - 1), "right")
            for row, (low, high) in enumerate(zip(first, last, strict=True)):
                inside = self.offsets[low:high] - starts[row]  # in 1..context
                targets[row, inside - 1] = _IGNORED
                begins.append(row * context + inside[inside < context])
        count = int((targets != _IGNORED).sum())
        ids, targets = torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(targets)
        if self.offsets.size <= 2:
            return Batch(ids, targets, None, count)
        found = np.sort(np.concatenate(begins))
        cu_seqlens = np.full((found.size if sequences is None else sequences) + 1, rows * context, np.int32)
        cu_seqlens[: found.size] = found
        return Batch(ids.reshape(1, -1), targets.reshape(1, -1), torch.from_numpy(cu_seqlens), count)


class Batches:
    """Random windows of documents, the same shape each time. Batch i depends on the seed and i alone.

    Args:
        documents: to take windows from; more tokens than `context`.
        rows, context: windows in a batch, and tokens in a window (at least 2, so that every row has a target).
        seed: of the positions.

    Raises:
        UserError: the documents are too short for a window.
    """

    def __init__(self, documents: Documents, rows: int, context: int, seed: int = 0) -> None:
        if documents.tokens.size <= context:
            raise UserError(
                f"the text has {documents.tokens.size} tokens to train on, but one window needs {context + 1}: "
                "give a longer text or a shorter context"
            )
        self.documents, self.rows, self.context, self.seed = documents, rows, context, seed
        self._row_sequences = 1 + documents.most_starts(context)

    def starts(self, step: int) -> np.ndarray:
        """Where the windows of a batch begin, (rows,) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randint(self.documents.tokens.size - self.context, (self.rows,), generator=generator).numpy()

    def __getitem__(self, step: int) -> Batch:
        """All rows of a batch."""
        return self.take(self.starts(step))

    def take(self, starts: np.ndarray) -> Batch:
        """The windows from `starts`, with as many sequences as ever are in so many windows."""
        return self.documents.windows(starts, self.context, starts.size * self._row_sequences)
