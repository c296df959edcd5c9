"""Images of any size in a square input, and boxes there and back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PADDING", "Letterbox", "letterbox", "letterbox_into"]

PADDING = 114 / 255  # grey around the image


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in its input.

    Attributes:
        image: width and height of the image.
        inner: width and height that it has in the input.
        left, top: its corner in the input.
    """

    image: tuple[int, int]
    inner: tuple[int, int]
    left: int
    top: int

    @classmethod
    def fit(cls, width: int, height: int, size: int) -> "Letterbox":
        """In the middle of `size` x `size`, as large as fits with its aspect kept."""
        longest = max(width, height)
        inner_width, inner_height = (max(1, round(side * size / longest)) for side in (width, height))
        left, top = (size - inner_width) // 2, (size - inner_height) // 2
        return cls((width, height), (inner_width, inner_height), left, top)

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) in pixels of the image as pixels of the input."""
        return boxes * self._scale(boxes) + self._corner(boxes)

    def to_image(self, boxes: Tensor) -> Tensor:
        """The inverse of `to_input`."""
        return (boxes - self._corner(boxes)) / self._scale(boxes)

    def _scale(self, like: Tensor) -> Tensor:
        x, y = self.inner[0] / self.image[0], self.inner[1] / self.image[1]
        return like.new_tensor((x, y, x, y))

    def _corner(self, like: Tensor) -> Tensor:
        return like.new_tensor((self.left, self.top, self.left, self.top))


def letterbox(image: Tensor, size: int) -> tuple[Tensor, Letterbox]:
    """An image as the input of a detector.

    Args:
        image: uint8, (3, H, W).
        size: side of the input.

    Returns:
        The input, float32 in 0..1, (3, size, size), with `PADDING` around the image; and where the image lies in it.
    """
    out = torch.full((3, size, size), PADDING)
    return out, letterbox_into(out, image)


def letterbox_into(out: Tensor, image: Tensor) -> Letterbox:
    """Does `letterbox` in a tensor that is filled with `PADDING`."""
    box = Letterbox.fit(image.shape[2], image.shape[1], out.shape[1])
    width, height = box.inner
    # The filter that `augment` has; called directly, because torchvision would calculate in floats and round on a
    # processor without AVX2. The C++ program calls the same operator (examples/cpp/detect.cpp).
    inner = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)
    torch.div(inner[0], 255, out=out[:, box.top : box.top + height, box.left : box.left + width])
    return box
