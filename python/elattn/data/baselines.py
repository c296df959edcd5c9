"""Byte models that count: fitted on one text, measured in bits per byte on another."""

import torch
from torch import Tensor

__all__ = ["bigram_bits_per_byte", "unigram_bits_per_byte"]


def unigram_bits_per_byte(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte of `held_out` (N,) uint8 under the byte frequencies of `train`, one added to each count."""
    return float(-_unigram(train).log2()[held_out.long()].mean())


def bigram_bits_per_byte(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte of `held_out`, from its second on, when each byte is predicted from the one before it.

    Counts of pairs are interpolated with the unigram model by Witten and Bell's rule: after a byte seen n times with t
    different successors, the unigram model has the weight t / (n + t).
    """
    first, second = train[:-1].long(), train[1:].long()
    counts = torch.bincount(first * 256 + second, minlength=256 * 256).reshape(256, 256).double()
    seen = counts.sum(1, keepdim=True)
    kinds = (counts > 0).sum(1, keepdim=True).clamp(min=1)
    probabilities = (counts + kinds * _unigram(train)) / (seen + kinds)
    return float(-probabilities.log2()[held_out[:-1].long(), held_out[1:].long()].mean())


def _unigram(train: Tensor) -> Tensor:
    counts = torch.bincount(train.long(), minlength=256).double() + 1
    return counts / counts.sum()
