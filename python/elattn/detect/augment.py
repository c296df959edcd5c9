"""Random changes to images that move their boxes with them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from elattn.detect.letterbox import Letterbox

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """Zoom, shift, crop, and colours, with one resampling; nothing given is changed in place.

    Attributes:
        zoom: smallest and largest scale, relative to the letterboxed image; what does not fit is cropped.
        visible: share of a box that must be left by a crop, or the box is dropped.
        smallest: side in pixels of the input under which a box is dropped.
        brightness, contrast, saturation: largest relative change of each.
        hue: largest turn of the colour circle, in turns.
        mirror: whether half of the images are mirrored; not for objects that have a direction, such as digits.
    """

    zoom: tuple[float, float] = (0.6, 1.5)
    visible: float = 0.4
    smallest: float = 4.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.4
    hue: float = 0.05
    mirror: bool = False

    def __call__(
        self, out: Tensor, image: Tensor, boxes: Tensor, labels: Tensor, random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Makes an input of an image.

        Args:
            out: float32, (3, size, size), filled with `PADDING`; receives the input, in 0..1.
            image: uint8, (3, H, W).
            boxes: float32, (N, 4), in pixels of the image.
            labels: int64, (N,).
            random: where chance comes from.

        Returns:
            The boxes left, in pixels of the input; and their labels.
        """
        size, (height, width) = out.shape[1], image.shape[1:]
        low, high = self.zoom
        zoom = low * (high / low) ** random.random()
        fit = Letterbox.fit(width, height, size)
        # `seen_width` columns of the image, from `x` on, become `inner_width` columns of the input, from `left` on;
        # likewise rows.
        x, seen_width, left, inner_width = _interval(width, round(fit.inner[0] * zoom), size, random)
        y, seen_height, top, inner_height = _interval(height, round(fit.inner[1] * zoom), size, random)
        pixels: Tensor = tv_tensors.Image(image)
        moved: Tensor = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        if self.mirror and random.random() < 0.5:
            pixels, moved = F.horizontal_flip(pixels), F.horizontal_flip(moved)
        window = y, x, seen_height, seen_width, [inner_height, inner_width]
        pixels, moved = F.resized_crop(pixels, *window), F.resized_crop(moved, *window)  # clips boxes
        matrix, shift = self._colours(random)
        pixels = torch.addmm(shift, matrix, pixels.as_subclass(Tensor).flatten(1).float())
        inner = out[:, top : top + inner_height, left : left + inner_width]
        torch.clamp(pixels.view_as(inner), 0, 1, out=inner)
        clipped, known = (x.as_subclass(Tensor).numpy() for x in (moved, boxes))
        sides = clipped[:, 2:] - clipped[:, :2]
        whole = (known[:, 2:] - known[:, :2]) * (inner_width / seen_width, inner_height / seen_height)
        keep = (sides.min(1) >= self.smallest) & (sides.prod(1) >= self.visible * whole.prod(1))
        clipped = clipped[keep] + np.array((left, top, left, top), np.float32)
        return torch.from_numpy(clipped), labels[torch.from_numpy(keep)]

    def _colours(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """All changes of colour as a matrix (3, 3) and a shift (3, 1): RGB in 0..255 to RGB in 0..1.

        Each is linear: brightness and contrast (about mid-grey) scale all, saturation and hue stretch and turn the two
        axes of colour.
        """
        brightness, contrast, saturation = (
            1 + most * random.uniform(-1, 1) for most in (self.brightness, self.contrast, self.saturation)
        )
        turn = 2 * math.pi * self.hue * random.uniform(-1, 1)
        c, s = saturation * math.cos(turn), saturation * math.sin(turn)
        matrix = brightness * contrast / 255 * (_FROM_YIQ @ np.array(((1, 0, 0), (0, c, -s), (0, s, c))) @ _TO_YIQ)
        return torch.from_numpy(matrix.astype(np.float32)), torch.full((3, 1), 0.5 - 0.5 * contrast)


def _interval(length: int, scaled: int, size: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """One axis of an image of `length` that becomes `scaled` pixels long and lies anywhere in, or over, `size` pixels.

    Returns:
        Start and length of what is seen of the image; start and length of it in the input.
    """
    scaled = max(1, scaled)
    if scaled <= size:
        return 0, length, int(random.integers(size - scaled + 1)), scaled
    seen = max(1, round(length * size / scaled))
    return int(random.integers(length - seen + 1)), seen, 0, size


# Luminance and two axes of colour, in which saturation is a length and hue an angle.
_TO_YIQ = np.array(((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
