"""Boxes: left, top, right, bottom in pixels. Scriptable."""

import torch
from torch import Tensor

__all__ = ["box_iou", "decode_boxes", "encode_boxes", "suppress"]


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Coordinates x, y (height width, 2) of the centres of all cells, in pixels."""
    y = (torch.arange(height, device=device) + 0.5) * stride
    x = (torch.arange(width, device=device) + 0.5) * stride
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).view(-1, 2)


def decode_boxes(raw: Tensor, stride: int) -> Tensor:
    """Boxes (B, H W, 4) of the predictions (B, 4, H, W): logarithms of the distances from the cell's centre to the
    left, top, right and bottom side, in strides, of which none exceeds 4."""
    centres = cell_centres(raw.size(2), raw.size(3), stride, raw.device)
    distances = raw.float().clamp(-6.0, 4.0).exp().flatten(2).transpose(1, 2) * stride
    return torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), -1)


def encode_boxes(boxes: Tensor, centres: Tensor, stride: int) -> Tensor:
    """The predictions (..., 4) that `decode_boxes` turns into `boxes` (..., 4), at cells whose centres (..., 2) lie in
    them."""
    distances = torch.cat((centres - boxes[..., :2], boxes[..., 2:] - centres), -1)
    return (distances / stride).log().clamp(-6.0, 4.0)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (..., N, M) of boxes (..., N, 4) and (..., M, 4); 0 for two empty boxes."""
    left, top, right, bottom = a.split(1, -1)  # (..., N, 1)
    # (..., 1, M), in consecutive elements: strided ones take PyTorch several times as long.
    left_b, top_b, right_b, bottom_b = b.transpose(-1, -2).contiguous().split(1, -2)
    width = torch.minimum(right, right_b) - torch.maximum(left, left_b)
    height = torch.minimum(bottom, bottom_b) - torch.maximum(top, top_b)
    common = width.clamp_(min=0) * height.clamp_(min=0)
    areas = (right - left) * (bottom - top) + (right_b - left_b) * (bottom_b - top_b)
    # Where both are empty, 0 is divided by the smallest number.
    return common / (areas - common).clamp_(min=1e-12)


def suppress(
    boxes: Tensor, scores: Tensor, confidence: float, iou: float, limit: int, candidates: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy suppression of boxes that overlap a better one of their class.

    Args:
        boxes: (N, 4).
        scores: (N, C).
        confidence: smallest score of a candidate.
        iou: largest overlap.
        limit: largest number of boxes.
        candidates: number of the best ones that are looked at; all pairs of them are compared.

    Returns:
        boxes (n, 4), scores (n,) and labels (n,), best first.
    """
    classes = scores.size(1)
    flat = scores.flatten()
    enough = flat >= confidence
    if flat.numel() > candidates:
        enough &= flat >= flat.topk(candidates)[0][-1]  # leaves few to be sorted
    indices = enough.nonzero().squeeze(1)
    scores, order = flat[indices].sort(descending=True, stable=True)
    indices, scores = indices[order[:candidates]], scores[:candidates]
    labels = indices % classes
    boxes = boxes[torch.div(indices, classes, rounding_mode="floor")]
    # Pair (i, j): i is better than j, of the same class, and overlaps it.
    covers = ((box_iou(boxes, boxes) > iou) & (labels[:, None] == labels)).float().triu(1)
    # A box is kept if no kept box covers it. From the best box on, each round settles at least the next one, so the
    # rounds end, with what taking one box after the other would keep.
    keep = torch.ones_like(scores)
    while True:
        kept = (keep @ covers == 0).float()
        if torch.equal(kept, keep):
            break
        keep = kept
    chosen = keep.nonzero().squeeze(1)[:limit]
    return boxes[chosen], scores[chosen], labels[chosen]
