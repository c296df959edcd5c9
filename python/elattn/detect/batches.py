"""Batches to train a detector on, as a function of seed and epoch alone."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elattn.detect.augment import Augment
from elattn.detect.data import DetectionData
from elattn.detect.images import BadImage
from elattn.detect.letterbox import PADDING, letterbox_into
from elattn.errors import UserError

__all__ = ["Batch", "DetectionBatches"]


@dataclass(frozen=True)
class Batch:
    """Images and their objects.

    Attributes:
        images: float32 in 0..1, (B, 3, S, S).
        boxes: float32, (B, M, 4), left, top, right, bottom in pixels of the input; M is the largest number of objects,
            and at least 1.
        labels: int64, (B, M); -1 where an image has no further object.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(x.to(device, non_blocking=True) for x in (self.images, self.boxes, self.labels)))


class DetectionBatches:
    """Every image once per epoch, in an order of its own, without the boxes of crowds.

    Args:
        data: images and objects.
        batch_size: images in a batch; the last one of an epoch may have fewer.
        seed: of orders and augmentations.
        augment: changes to the images; None for letterboxing alone.

    Attributes:
        skipped: the images that could not be read; each is reported once by a warning and passed over.
    """

    def __init__(self, data: DetectionData, batch_size: int, seed: int = 0, augment: Augment | None = None) -> None:
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        self._bad: dict[int, BadImage] = {}

    @property
    def skipped(self) -> list[BadImage]:
        return list(self._bad.values())

    def __len__(self) -> int:
        """Batches in an epoch, but for images that will turn out to be unreadable."""
        return -(-(len(self.data) - len(self._bad)) // self.batch_size)

    def epoch(self, number: int, size: int) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            number: of the epoch, from 0.
            size: side of the input.

        Raises:
            UserError: no image can be read.
        """
        order = np.random.default_rng((self.seed, number)).permutation(len(self.data)).tolist()
        images, objects = self._empty(size), []
        for index in order:
            if index in self._bad:
                continue
            try:
                objects.append(self._load(images[len(objects)], number, index))
            except BadImage as error:
                self._bad[index] = error.with_traceback(None)  # which would keep the batch
                warnings.warn(f"skipped {error}", stacklevel=2)
            if len(objects) == self.batch_size:
                yield _collate(images, objects)
                images, objects = self._empty(size), []
        if objects:
            yield _collate(images, objects)
        if len(self._bad) == len(self.data):
            raise UserError(f"none of the {len(self.data)} images can be read; one is {self.skipped[0]}")

    def _empty(self, size: int) -> Tensor:
        return torch.full((self.batch_size, 3, size, size), PADDING)

    def _load(self, out: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Writes an image into its place in the batch; returns boxes and labels."""
        sample = self.data[index]
        boxes, labels = sample.boxes[~sample.crowd], sample.labels[~sample.crowd]
        if self.augment is None:
            return letterbox_into(out, sample.image).to_input(boxes), labels
        # A stream of its own for each image, so that one that is skipped changes no other.
        random = np.random.default_rng((self.seed, epoch, index))
        return self.augment(out, sample.image, boxes, labels, random)


def _collate(images: Tensor, objects: list[tuple[Tensor, Tensor]]) -> Batch:
    most = max(1, *(labels.numel() for _, labels in objects))
    boxes = torch.zeros(len(objects), most, 4)
    labels = torch.full((len(objects), most), -1)
    for i, (own_boxes, own_labels) in enumerate(objects):
        boxes[i, : own_labels.numel()] = own_boxes
        labels[i, : own_labels.numel()] = own_labels
    return Batch(images[: len(objects)], boxes, labels)
