"""Detection data sets: the demo data, COCO folders and YOLO folders."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from elattn.detect.coco import find_coco, read_coco
from elattn.detect.demo_data import demo_data
from elattn.detect.images import BadImage, read_image
from elattn.detect.samples import Annotations, Sample
from elattn.detect.yolo import find_yolo, read_yolo
from elattn.errors import UserError

__all__ = ["DetectionData", "load_data"]

_KEPT_BYTES = 1 << 30  # of decoded images, which a training run reads again in every epoch


class DetectionData:
    """Images with their objects. What is stored is read-only; `data[i]` is a copy.

    Args:
        annotations: of each image.
        classes: names.
        category_ids: COCO's number of each class.
        left_out: a line about each object that was left out because its box holds nothing.

    Attributes:
        annotations, classes, category_ids, left_out: as given.
    """

    def __init__(
        self,
        annotations: Sequence[Annotations],
        classes: Sequence[str],
        category_ids: Sequence[int],
        left_out: Sequence[str] = (),
    ) -> None:
        self.annotations = tuple(annotations)
        self.classes, self.category_ids, self.left_out = list(classes), list(category_ids), list(left_out)
        self._kept: dict[int, np.ndarray] = {}
        self._room = _KEPT_BYTES

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        """One image and its objects.

        Raises:
            BadImage: the image cannot be read, or is of another size than its annotations say.
        """
        known = self.annotations[index]
        image = self._image(index % len(self))
        height, width = image.shape[:2]
        boxes = known.boxes.copy()
        if known.size is None:
            boxes *= (width, height, width, height)
        elif known.size != (width, height):
            given = " x ".join(map(str, known.size))
            raise BadImage(known.path, f"{width} x {height} pixels, but its annotations are for {given}")
        return Sample(
            torch.from_numpy(image.copy()).permute(2, 0, 1),
            torch.from_numpy(boxes),
            torch.from_numpy(known.labels.copy()),
            torch.from_numpy(known.crowd.copy()),
            known.image_id,
            str(known.path),
        )

    def _image(self, index: int) -> np.ndarray:
        if index in self._kept:
            return self._kept[index]
        image = read_image(self.annotations[index].path)
        # The first images are kept, not the latest: an epoch reads every one, so the oldest is the next to come.
        if image.nbytes <= self._room:
            self._room -= image.nbytes
            image.flags.writeable = False
            self._kept[index] = image
        return image


def load_data(path: str | Path, split: str, *, classes: Sequence[str] | None = None) -> DetectionData:
    """Reads a data set.

    Args:
        path: "demo" for the demo data, which the first use makes; or a folder. A COCO folder has
            annotations/instances_<split>.json, and the images in images/<split>, <split>, images or the folder itself;
            a YOLO folder has data.yaml, images/<split> and labels/<split>.
        split: "train", "val", "test" or another name that the folder has.
        classes: names that labels shall be indices into, such as those of a model; by default those of the folder.

    Raises:
        UserError: there is no such data, or something in it is wrong (the message names the file and the place).
    """
    folder = demo_data() if path == "demo" else Path(path)
    if (file := find_coco(folder, split)) is not None:
        annotations, names, ids, left_out = read_coco(file, folder)
    elif (file := find_yolo(folder)) is not None:
        annotations, names, ids, left_out = read_yolo(file, split)
    else:
        raise UserError(
            f"{folder} has neither annotations/instances_{split}.json (COCO) nor data.yaml (YOLO)"
            if folder.is_dir()
            else f"{folder} is not a folder"
        )
    if classes is not None and list(classes) != names:
        annotations, ids = _relabel(annotations, names, ids, list(classes), file)
        names = list(classes)
    return DetectionData(annotations, names, ids, left_out)


def _relabel(
    annotations: list[Annotations], names: list[str], ids: list[int], classes: list[str], file: Path
) -> tuple[list[Annotations], list[int]]:
    """The same annotations with labels that are indices into `classes`, and the category ids of these."""
    places = np.array([classes.index(name) if name in classes else -1 for name in names], np.int64)
    changed = []
    for known in annotations:
        labels = places[known.labels]
        if (labels < 0).any():
            unknown = names[known.labels[labels < 0][0]]
            raise UserError(f"{file}: {known.path} has a {unknown!r}, but the classes are {', '.join(classes)}")
        changed.append(Annotations(known.path, known.image_id, known.size, known.boxes, labels, known.crowd))
    unused = max(ids, default=0) + 1
    new = [ids[names.index(name)] if name in names else unused + i for i, name in enumerate(classes)]
    return changed, new
