"""An image with its objects: what is stored about it, and what is handed out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = ["Annotations", "Sample", "fit_box"]

_SLACK = 0.01  # of the side of an image, by which rounding may put a box outside


@dataclass(frozen=True)
class Sample:
    """An image and its objects.

    Attributes:
        image: uint8, (3, H, W), RGB.
        boxes: float32, (N, 4), left, top, right, bottom in pixels of the image; edges are continuous, so that a box
            over the whole image is (0, 0, W, H).
        labels: int64, (N,), indices into the names of the classes.
        crowd: bool, (N,), whether a box is around a group of objects (COCO's iscrowd).
        image_id: number of the image in the data set.
        path: of its file.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    image_id: int
    path: str


@dataclass(frozen=True)
class Annotations:
    """What a data set says about one image. The arrays become read-only.

    Attributes:
        path, image_id: as in `Sample`.
        size: width and height of the image; None if `boxes` are in shares of them.
        boxes: float32, (N, 4), left, top, right, bottom.
        labels: int64, (N,).
        crowd: bool, (N,).
    """

    path: Path
    image_id: int
    size: tuple[int, int] | None
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.boxes, self.labels, self.crowd):
            array.flags.writeable = False


def fit_box(edges: Sequence[float], size: tuple[float, float]) -> tuple[float, ...] | None:
    """A box as a data set has it, clipped to an image of `size` (width, height); None if it holds nothing.

    Args:
        edges: left, top, right, bottom.

    Raises:
        ValueError: a side is negative, or an edge lies further outside than by rounding. The message goes on from
            "the box ...".
    """
    left, top, right, bottom = edges
    if not all(map(math.isfinite, edges)):
        raise ValueError("is not finite")
    if right < left or bottom < top:
        raise ValueError("has a negative size")
    width, height = size
    outside = max(-left / width, -top / height, right / width - 1, bottom / height - 1)
    if outside > _SLACK:
        raise ValueError(f"reaches outside the image of {width:g} x {height:g}")
    left, right = max(left, 0.0), min(right, width)
    top, bottom = max(top, 0.0), min(bottom, height)
    return (left, top, right, bottom) if right > left and bottom > top else None
