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
from elattn.detect.letterbox import letterbox
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
        size: side of the input.
        seed: of orders and augmentations.
        augment: changes to the images; None for letterboxing alone.

    Attributes:
        skipped: the images that could not be read; each is reported once by a warning and passed over.
    """

    def __init__(
        self, data: DetectionData, batch_size: int, size: int, seed: int = 0, augment: Augment | None = None
    ) -> None:
        self.data, self.batch_size, self.size, self.seed, self.augment = data, batch_size, size, seed, augment
        self._bad: dict[int, BadImage] = {}

    @property
    def skipped(self) -> list[BadImage]:
        return list(self._bad.values())

    def __len__(self) -> int:
        """Batches in an epoch, but for images that will turn out to be unreadable."""
        return -(-(len(self.data) - len(self._bad)) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch.

        Raises:
            UserError: no image can be read.
        """
        order = np.random.default_rng((self.seed, number)).permutation(len(self.data)).tolist()
        batch: list[tuple[Tensor, Tensor, Tensor]] = []
        for index in order:
            try:
                batch.append(self._example(number, index))
            except BadImage as error:
                self._skip(index, error)
            if len(batch) == self.batch_size:
                yield _collate(batch)
                batch = []
        if batch:
            yield _collate(batch)

    def _example(self, epoch: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index in self._bad:
            raise self._bad[index]
        sample = self.data[index]
        boxes, labels = sample.boxes[~sample.crowd], sample.labels[~sample.crowd]
        if self.augment is None:
            image, placed = letterbox(sample.image, self.size)
            return image, placed.to_input(boxes), labels
        # A stream of its own for each image, so that one that is skipped changes no other.
        random = np.random.default_rng((self.seed, epoch, index))
        return self.augment(sample.image, boxes, labels, self.size, random)

    def _skip(self, index: int, error: BadImage) -> None:
        if index not in self._bad:
            self._bad[index] = error
            warnings.warn(f"skipped {error}", stacklevel=3)
        if len(self._bad) == len(self.data):
            raise UserError(f"none of the {len(self.data)} images can be read; the last: {error}")


def _collate(examples: list[tuple[Tensor, Tensor, Tensor]]) -> Batch:
    most = max(1, *(labels.numel() for _, _, labels in examples))
    boxes = torch.zeros(len(examples), most, 4)
    labels = torch.full((len(examples), most), -1)
    for i, (_, own_boxes, own_labels) in enumerate(examples):
        boxes[i, : own_labels.numel()] = own_boxes
        labels[i, : own_labels.numel()] = own_labels
    return Batch(torch.stack([image for image, _, _ in examples]), boxes, labels)
