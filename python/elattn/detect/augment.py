"""Random changes to images that move their boxes with them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from elattn.detect.letterbox import PADDING, Letterbox

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
        self, image: Tensor, boxes: Tensor, labels: Tensor, size: int, random: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One image and its objects as an input.

        Args:
            image: uint8, (3, H, W).
            boxes: float32, (N, 4), in pixels of the image.
            labels: int64, (N,).
            size: side of the input.
            random: where chance comes from.

        Returns:
            The input, float32 in 0..1, (3, size, size); the boxes left, in pixels of the input; and their labels.
        """
        height, width = image.shape[1:]
        low, high = self.zoom
        zoom = low * (high / low) ** random.random()
        fit = Letterbox.fit(width, height, size)
        # Of the image the columns from `x` on, `crop_width` of them, go to the columns from `left` on of the input,
        # `inner_width` of them; likewise rows.
        x, crop_width, left, inner_width = _interval(width, round(fit.inner[0] * zoom), size, random)
        y, crop_height, top, inner_height = _interval(height, round(fit.inner[1] * zoom), size, random)
        inner: Tensor = tv_tensors.Image(image)
        inner_boxes: Tensor = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        if self.mirror and random.random() < 0.5:
            inner, inner_boxes = F.horizontal_flip(inner), F.horizontal_flip(inner_boxes)
        window = (y, x, crop_height, crop_width), [inner_height, inner_width]
        inner = F.resized_crop(inner, *window[0], window[1])
        inner_boxes = F.resized_crop(inner_boxes, *window[0], window[1])
        inner_boxes, labels = self._clip(inner_boxes, labels)
        out = torch.full((3, size, size), PADDING)
        place = out[:, top : top + inner_height, left : left + inner_width]
        matrix, shift = self._colours(random)
        pixels = inner.as_subclass(Tensor).flatten(1).float()
        place.copy_(torch.addmm(shift, matrix / 255, pixels).clamp_(0, 1).view_as(place))
        return out, inner_boxes + torch.tensor((left, top, left, top)), labels

    def _clip(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        clipped = F.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        sides, before = (x[:, 2:] - x[:, :2] for x in (clipped, boxes.as_subclass(Tensor)))
        keep = (sides.amin(1) >= self.smallest) & (sides.prod(1) >= self.visible * before.prod(1))
        return clipped[keep], labels[keep]

    def _colours(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Matrix (3, 3) and shift (3, 1) of all changes of colour: each is linear in RGB, contrast about mid-grey."""
        brightness, contrast, saturation = (
            1 + most * random.uniform(-1, 1) for most in (self.brightness, self.contrast, self.saturation)
        )
        turn = 2 * math.pi * self.hue * random.uniform(-1, 1)
        c, s = saturation * math.cos(turn), saturation * math.sin(turn)
        chroma = torch.tensor(((1, 0, 0), (0, c, -s), (0, s, c)), dtype=torch.float32)
        matrix = brightness * contrast * (_FROM_YIQ @ chroma @ _TO_YIQ)
        return matrix, torch.full((3, 1), 0.5 - 0.5 * contrast)


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
_TO_YIQ = torch.tensor(((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)
