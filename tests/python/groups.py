"""Groups of rows for the tests of grouped_linear, and what it computes of them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ends(rows: list[int]) -> Tensor:
    """Where groups of so many rows end."""
    return torch.tensor(rows, dtype=torch.int64).cumsum(0).int()


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """grouped_linear, one group after the other."""
    bounds = [0, *offsets.tolist()]
    return torch.cat([F.linear(x[bounds[e] : bounds[e + 1]], weight[e]) for e in range(weight.size(0))])


def strided(x: Tensor) -> list[Tensor]:
    """The same values with other strides: transposed, every second element, with a gap between rows."""
    wide = torch.full((*x.shape[:-1], 2 * x.size(-1) + 1), float("nan"), dtype=x.dtype)
    wide[..., 1::2] = x
    gap = torch.full((*x.shape[:-1], x.size(-1) + 3), float("nan"), dtype=x.dtype)
    gap[..., : x.size(-1)] = x
    return [x.mT.contiguous().mT, wide[..., 1::2], gap[..., : x.size(-1)]]
