"""Which cell answers for which object, and what its predictions cost (docs/detection.md)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss

from elattn.models.boxes import box_iou, cell_centres, decode_boxes

__all__ = ["Losses", "assign", "detection_loss"]

# Cells whose centres are so far from an object's centre, in strides, do not answer for it.
_RADIUS = 1.5
_BOX_WEIGHT = 5.0


class Losses(NamedTuple):
    """Means over the cells that answer for an object; `total` is weighted."""

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor


def assign(boxes: Tensor, labels: Tensor, centres: Tensor, stride: int) -> Tensor:
    """The index of the object that each cell answers for (B, N), -1 for none.

    Cells inside the box and near its centre answer for an object, and in any case the cell nearest to its centre.
    Where several objects claim a cell, the smallest has it.

    Args:
        boxes: (B, M, 4).
        labels: (B, M), -1 where there is no object.
        centres: of the cells, (N, 2).
    """
    from_centre = (centres - (boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2).abs()  # (B, M, N, 2)
    half = (boxes[..., 2:] - boxes[..., :2])[:, :, None] / 2
    claims = (from_centre < half.clamp(max=_RADIUS * stride)).all(-1)
    nearest = from_centre.square().sum(-1).argmin(-1, keepdim=True)
    claims.scatter_(2, nearest, True)
    claims &= (labels >= 0)[..., None]
    areas = (4 * half.prod(-1)).masked_fill(~claims, torch.inf)
    smallest, owner = areas.min(1)
    return owner.masked_fill(smallest == torch.inf, -1)


def detection_loss(raw: Tensor, boxes: Tensor, labels: Tensor, stride: int) -> Losses:
    """5 (1 - CIoU) of the boxes, cross entropy of objectness over all cells, and of the classes, whose target is the
    overlap of box and object; each summed and divided by the number of cells that answer for an object.

    Args:
        raw: predictions (B, 5 + C, H, W) of `YoloLat`.
        boxes: (B, M, 4) in pixels of the input.
        labels: (B, M), -1 where there is no object.
    """
    centres = cell_centres(raw.size(2), raw.size(3), stride, raw.device)
    if labels.size(1) == 0:  # nothing in any picture: one object that is none, so that shapes are as ever
        boxes, labels = boxes.new_zeros(boxes.size(0), 1, 4), labels.new_full((labels.size(0), 1), -1)
    owner = assign(boxes, labels, centres, stride)
    image, cell = (owner >= 0).nonzero(as_tuple=True)
    mine = owner[image, cell]
    count = max(len(cell), 1)

    logits = raw.float().flatten(2).transpose(1, 2)  # (B, N, 5 + C)
    predicted, wanted = decode_boxes(raw[:, :4], stride)[image, cell], boxes[image, mine]
    box = complete_box_iou_loss(predicted, wanted, reduction="sum") / count
    with torch.no_grad():
        overlap = box_iou(predicted[:, None], wanted[:, None]).flatten()
        classes = torch.zeros_like(logits[image, cell, 5:])
        classes[torch.arange(len(cell), device=raw.device), labels[image, mine]] = overlap
        exists = (owner >= 0).float()
    objectness = F.binary_cross_entropy_with_logits(logits[..., 4], exists, reduction="sum") / count
    of_classes = F.binary_cross_entropy_with_logits(logits[image, cell, 5:], classes, reduction="sum") / count
    return Losses(_BOX_WEIGHT * box + objectness + of_classes, box, objectness, of_classes)
