"""Average precision as COCO defines it, and the time of each stage."""

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from elattn.detect.data import DetectionData
from elattn.detect.images import BadImage
from elattn.detect.letterbox import letterbox
from elattn.detect.samples import Sample
from elattn.models import YoloLat

__all__ = ["Evaluation", "Prediction", "average_precision", "evaluate"]

# What average precision is defined for.
_CONFIDENCE = 0.001
_LIMIT = 100


@dataclass(frozen=True)
class Prediction:
    """What was found in a image: boxes (n, 4) in its pixels, scores (n,) and labels (n,), best first."""

    image_id: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evaluation:
    """COCO's figures, each from 0 to 1, NaN where no object is of that kind.

    Attributes:
        ap: mean over classes and overlaps .50:.05:.95 of the precision at 101 recalls.
        ap50, ap75: at one overlap.
        small, medium, large: of objects below 32 x 32, up to 96 x 96, and above.
        of_class: ap by class.
        precision: (101, C), at overlap .50, by recall.
        milliseconds: mean per image of reading and fitting it, of the model, and of boxes and suppression.
        predictions: of every image.
        skipped: images that could not be read, with the reason.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    of_class: list[float]
    precision: np.ndarray
    milliseconds: dict[str, float] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def evaluate(
    model: YoloLat,
    data: DetectionData,
    size: int,
    *,
    batch_size: int = 16,
    iou: float = 0.5,
    report: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Detects on every image and compares with its objects.

    Args:
        size: side of the square that images are fitted into.
        iou: largest overlap of two boxes of a class.
        report: called with the number of images done.
    """
    device = next(model.parameters()).device
    fused = model.fuse()
    clock = {"read": 0.0, "model": 0.0, "boxes": 0.0}
    predictions: list[Prediction] = []
    samples, skipped = [], []
    with torch.inference_mode():
        for first in range(0, len(data), batch_size):
            began = time.perf_counter()
            batch, images, fits = [], [], []
            for i in range(first, min(first + batch_size, len(data))):
                try:
                    sample = data[i]
                except BadImage as error:
                    skipped.append(str(error))
                    continue
                image, fit = letterbox(sample.image, size)
                batch.append(sample)
                images.append(image)
                fits.append(fit)
            if not batch:
                continue
            images = torch.stack(images).to(device)
            read = time.perf_counter()
            raw = fused(images)
            modelled = time.perf_counter()
            for sample, fit, found in zip(batch, fits, fused.select(raw, _CONFIDENCE, iou, _LIMIT), strict=True):
                boxes, scores, labels = (x.cpu() for x in found)
                predictions.append(Prediction(sample.image_id, fit.to_image(boxes), scores, labels))
            samples += [replace(sample, image=torch.empty(0)) for sample in batch]
            for name, seconds in zip(clock, np.diff([began, read, modelled, time.perf_counter()]), strict=True):
                clock[name] += float(seconds)
            report(len(samples) + len(skipped))
    result = average_precision(samples, predictions, data.classes)
    milliseconds = {name: 1e3 * seconds / max(len(samples), 1) for name, seconds in clock.items()}
    return Evaluation(**result, milliseconds=milliseconds, predictions=predictions, skipped=skipped)


def average_precision(
    samples: Sequence[Sample], predictions: Sequence[Prediction], classes: Sequence[str]
) -> dict[str, Any]:
    """The figures of `Evaluation`, by pycocotools."""
    objects = [
        (sample.image_id, *each)
        for sample in samples
        for each in zip(sample.boxes.tolist(), sample.labels.tolist(), sample.crowd.tolist(), strict=True)
    ]
    annotations = [
        {
            "id": i,
            "image_id": image,
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": int(crowd),
        }
        for i, (image, (left, top, right, bottom), label, crowd) in enumerate(objects, 1)  # 0 would mean "no object"
    ]
    rows = [
        np.column_stack(
            (np.full(len(p.scores), p.image_id), p.boxes[:, :2], p.boxes[:, 2:] - p.boxes[:, :2], p.scores, p.labels)
        )
        for p in predictions
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": sample.image_id} for sample in samples],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth.createIndex()
        found = np.concatenate([np.empty((0, 7)), *rows])
        results = truth.loadRes(found) if len(found) else _nothing(truth)
        coco = COCOeval(truth, results, "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    # (overlaps, recalls, classes, sizes, limits); -1 where there is no object
    precision = np.where(coco.eval["precision"] < 0, np.nan, coco.eval["precision"])[..., 0, -1]
    figures = dict(zip(("ap", "ap50", "ap75", "small", "medium", "large"), map(float, coco.stats[:6]), strict=True))
    figures = {name: value if value >= 0 else float("nan") for name, value in figures.items()}
    of_class = [float(values.mean()) if (values := p[~np.isnan(p)]).size else float("nan") for p in precision.T]
    return figures | {"of_class": of_class, "precision": precision[0]}


def _nothing(truth: COCO) -> COCO:
    """No result at all, which `loadRes` does not take."""
    results = COCO()
    results.dataset = truth.dataset | {"annotations": []}
    results.createIndex()
    return results
