"""Every tolerance of the Python tests. docs/tolerances.md derives them; no environment variable loosens them."""

import torch
from torch import Tensor

from backend import BACKEND

FACTOR = 4.0

# Unit roundoff of the type that sums are kept in, and of the type that results are stored in.
ACCUMULATION_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float16: 2.0**-24,
}
STORAGE_ROUNDOFF = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
STORAGE_UNDERFLOW = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


# Largest violation of each property of docs/math.md, section 7, measured in float32.
PROPERTIES = {
    "1": 1.6e-6,
    "2": 1.6e-6,
    "3": 1.2e-6,
    "3-state": 1.9e-6,
    "4": 2.1e-6,
    "5": 2.4e-6,
    "6": 0.0,
    "7": 3.4e-6,
    "8": 2.4e-6,
    "8-first": 1.2e-7,
    "9": 1.2e-7,
    "10": 4.8e-6,
    "11-permutation": 1.7e-6,
    "11-twice": 5e-6,
    "11-last-row": 4e-7,
    "12": 7.2e-7,
    "13": 3.7e-7,
    "14-qk": 2.2e-7,
    "14-v": 1.2e-7,
    "15-constant": 3.3e-7,
    "15-shift": 1.5e-5,
    "16": 1.1e-9,
    "17": 1.9e-6,
    "17-gradient": 1e-6,
    "19-duplication": 1.4e-6,
    "19-deletion": 7e-7,
    "20": 4.8e-7,
    "21": 3e-7,
    "22": 1e-5,
    "S1": 1.0e-6,
    "S1-gradient": 6.4e-7,
    "S2": 1.8e-6,
    "S3-rotation": 9.5e-7,
    "S4-qk": 1.9e-7,
    "S4-euler": 3e-8,
    "S4-v": 1.5e-7,
    "S6": 3.8e-6,
    "E1": 8e-7,
}


# The same where the operands of matrix products are rounded to bfloat16: bfloat16 inputs on CUDA. The order of keys,
# and how many there are, change in which gauge a key is rounded, as the size of a chunk does, so two figures of row 11
# are that of row 5.
BFLOAT16_OPERANDS = {
    "1": 3.9e-3,
    "2": 8.7e-3,
    "3": 4.8e-3,
    "3-state": 8e-4,
    "4": 4.4e-3,
    "5": 8.4e-3,
    "8": 2.1e-5,
    "10": 3.1e-2,
    "11-permutation": 8.4e-3,
    "11-twice": 8.4e-3,
    "11-last-row": 3e-4,
    "12": 1.3e-3,
    "16": 1.3e-5,
    "17": 4.9e-3,
    "17-gradient": 3.7e-3,
    "19-duplication": 1.4e-6,
    "19-deletion": 2.4e-3,
    "20": 6.9e-4,
}


# In float64 the reference is no better than the operator: it rounds exponents of up to 64 once.
REFERENCE_ERROR = 64 * 2.0**-53


def limit(number: str, dtype: torch.dtype) -> float:
    """Tolerance of a property for inputs of `dtype`: 4x the float32 figure, scaled to the accumulation type."""
    figure = PROPERTIES[number] * ACCUMULATION_ROUNDOFF[dtype] / 2.0**-24
    if dtype == torch.bfloat16 and BACKEND != "cpu":
        figure = max(figure, BFLOAT16_OPERANDS.get(number, 0.0))
    return FACTOR * figure + REFERENCE_ERROR


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of storing `expected` in `dtype` when that is narrower than the accumulation type."""
    return STORAGE_ROUNDOFF[dtype] * expected.abs() + STORAGE_UNDERFLOW[dtype]


def check(
    actual: Tensor,
    expected: Tensor,
    number: str,
    *,
    dtype: torch.dtype | None = None,
    scale: float | Tensor = 1.0,
    roundings: int = 1,
    what: str = "",
) -> None:
    """Assert |actual - expected| <= limit * scale + roundings * (rounding of `expected` to its type), elementwise.

    `scale` is the unit of the property: 1 for outputs with v ~ N(0, 1), `relative(expected)` for gradients. `dtype` is
    that of the operator's inputs (default: that of `actual`); pass `roundings=2` where both sides are stored results.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    dtype = dtype or actual.dtype
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    bound = limit(number, dtype) * scale + roundings * rounding(expected, dtype)
    excess = ((actual - expected).abs() - bound).max().item()
    worst = (actual - expected).abs().max().item()
    assert excess <= 0, f"property {number} {what}: error {worst:.3g} exceeds the tolerance by {excess:.3g} ({dtype})"


def check_rms(actual: Tensor, expected: Tensor, number: str, *, scale: float = 1.0, what: str = "") -> None:
    """Assert that the root mean square error is within the limit, relative to that of `expected` (see `relative`)."""
    error = (actual.detach().double() - expected.detach().double()).square().mean().sqrt().item()
    bound = limit(number, actual.dtype) * scale * relative(expected.detach().double().square().mean().sqrt())
    assert error <= bound, f"property {number} {what}: rms error {error:.3g}, allowed {bound:.3g} ({actual.dtype})"


def relative(expected: Tensor, absolute_below: float = 1e-3) -> float:
    """Unit of a relative tolerance: the largest entry of `expected`, or 1, the operands' size, where all of it cancels.

    A single visible key, say, makes the gradient of q zero: what is left there is rounding of terms of size 1.
    """
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    return largest if largest > absolute_below else 1.0
