"""Byte models that count: fitted on one text, measured in bits per byte on another."""

from collections.abc import Iterable

import numpy as np

__all__ = ["ByteCounts", "bigram_bits_per_byte", "unigram_bits_per_byte"]


class ByteCounts:
    """How often each byte occurs, and each pair of bytes inside a document.

    Attributes:
        bytes: (256,) int64.
        pairs: (256, 256) int64, by the first and the second byte.
    """

    def __init__(self, documents: Iterable[bytes] = ()) -> None:
        self.bytes = np.zeros(256, np.int64)
        self.pairs = np.zeros((256, 256), np.int64)
        self.add(documents)

    def add(self, documents: Iterable[bytes]) -> None:
        """Counts more documents."""
        documents = list(documents)
        data = np.frombuffer(b"".join(documents), np.uint8).astype(np.int64)
        self.bytes += np.bincount(data, minlength=256)
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        inside = np.ones(data.size, bool)
        inside[ends[ends > 0] - 1] = False  # the byte after it belongs to another document
        pairs = data[:-1] * 256 + data[1:]
        self.pairs += np.bincount(pairs[inside[:-1]], minlength=256 * 256).reshape(256, 256)


def unigram_bits_per_byte(train: ByteCounts, held_out: ByteCounts) -> float:
    """Bits per byte of the bytes held out, each document's first aside, under the byte frequencies of `train`.

    One is added to each count.
    """
    return _mean(held_out, np.broadcast_to(-np.log2(_unigram(train)), (256, 256)))


def bigram_bits_per_byte(train: ByteCounts, held_out: ByteCounts) -> float:
    """Bits per byte of the bytes held out, each document's first aside, predicted from the byte before.

    Counts of pairs are interpolated with the unigram model by Witten and Bell's rule: after a byte seen n times with t
    different successors, the unigram model has the weight t / (n + t).
    """
    seen = train.pairs.sum(1, keepdims=True)
    kinds = np.maximum((train.pairs > 0).sum(1, keepdims=True), 1)
    return _mean(held_out, -np.log2((train.pairs + kinds * _unigram(train)) / (seen + kinds)))


def _unigram(train: ByteCounts) -> np.ndarray:
    return (train.bytes + 1) / (train.bytes.sum() + 256)


def _mean(held_out: ByteCounts, bits: np.ndarray) -> float:
    return float((held_out.pairs * bits).sum() / max(held_out.pairs.sum(), 1))
