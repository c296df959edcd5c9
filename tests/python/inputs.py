"""Random inputs for the tests."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def qkv(
    batch: int = 2, heads: int = 2, length: int = 65, head_dim: int = 16, value_dim: int | None = None, *,
    kv_heads: int | None = None, key_len: int | None = None, dtype: torch.dtype = torch.float32,
    std: float = 1.0, requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, H, L, D) and k (B, Hkv, Lk, D) ~ N(0, std^2), v (B, Hkv, Lk, Dv) ~ N(0, 1), rounded to `dtype`."""
    kv_heads, key_len = kv_heads or heads, length if key_len is None else key_len
    q = std * torch.randn(batch, heads, length, head_dim, dtype=torch.float64)
    k = std * torch.randn(batch, kv_heads, key_len, head_dim, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, key_len, value_dim or head_dim, dtype=torch.float64)
    return tuple(x.to(dtype).requires_grad_(requires_grad) for x in (q, k, v))


def three_scales(
    heads: int = 2, length: int = 200, head_dim: int = 16, value_dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of three: q and k with standard deviation 0.5, 2 and 8, as docs/math.md section 7 measures."""
    q, k, v = qkv(3, heads, length, head_dim, value_dim, dtype=torch.float64)
    std = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64).view(3, 1, 1, 1)
    return (std * q).to(dtype), (std * k).to(dtype), v.to(dtype)


def transposed(x: Tensor) -> Tensor:
    """The same values as a (B, L, H, D) projection seen as (B, H, L, D)."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def padding_mask(batch: int, length: int, fraction: float = 0.3) -> Tensor:
    """(B, L), True = padding, at random places; at least one key of each entry is kept."""
    mask = torch.rand(batch, length) < fraction
    if length:
        mask[:, length // 2] = False
    return mask


def decay_shapes(batch: int, kv_heads: int, length: int, head_dim: int, kernel: str) -> list[tuple[int, ...]]:
    shapes = [(kv_heads,), (batch, kv_heads, length)]
    if kernel == "hadamard_exp":
        shapes += [(kv_heads, head_dim), (batch, kv_heads, length, head_dim)]
    return shapes
