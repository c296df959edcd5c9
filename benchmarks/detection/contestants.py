"""What is compared: forms of YoloLat, and the peer if it is installed."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from elattn.detect import DetectionData, letterbox, load_detector
from elattn.models import YoloLat

PEER = "YOLO26n"
# Names and options of YoloLat. Where the name does not say "position", values have no convolution, as published.
LAT: dict[str, dict[str, Any]] = {
    "lat_n": {"variant": "lat_n", "position": 0},
    "lat_n softmax": {"variant": "lat_n", "position": 0, "neck": "softmax"},
    "lat_n no neck": {"variant": "lat_n", "position": 0, "neck": "none"},
    "lat_n position 3": {"variant": "lat_n", "position": 3},
    "lat_n position 5": {"variant": "lat_n", "position": 5},
    "lat_dw": {"variant": "lat_dw", "position": 0},
    "lat_dw softmax": {"variant": "lat_dw", "position": 0, "neck": "softmax"},
    "lat_dw no neck": {"variant": "lat_dw", "position": 0, "neck": "none"},
}
# Detection for average precision, the same for all.
DETECTION = {"confidence": 0.001, "iou": 0.5, "limit": 100}
IMAGES = 16  # that are timed

Found = list[tuple[Tensor, Tensor, Tensor]]


def load_peer() -> tuple[types.ModuleType | None, str]:
    """The module of the peer, or None and why."""
    try:
        from benchmarks.detection import peer
    except ImportError as error:
        return None, f"not installed ({error})"
    return peer, f"Ultralytics {peer.VERSION}"


def build(name: str, classes: int, images: Tensor, weights: Path | None) -> nn.Module:
    """A model in evaluation, trained or with random weights whose normalisations fit `images`."""
    peer = load_peer()[0] if name == PEER else None
    if weights is not None:
        return peer.load(weights, classes) if peer else load_detector(weights).model
    torch.manual_seed(0)
    model = peer.build(classes) if peer else YoloLat(classes, **LAT[name])
    settle(model, images)
    return model


def settle(model: nn.Module, images: Tensor) -> None:
    """Gives the normalisations the statistics of `images`: without them a deep random network computes constants."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain mean
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def forms(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """The forms of a model that are timed, tensor to raw predictions."""
    if not isinstance(model, YoloLat):
        return load_peer()[0].forms(model, images)
    fused = model.fuse()  # channels last
    return {"eager": model, "fused": fused, "TorchScript": torch.jit.freeze(torch.jit.script(fused))}


def count_flops(form: nn.Module, images: Tensor) -> int:
    """Operations of a forward, a multiplication and an addition counting as two."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        form(images)
    return counter.get_total_flops() + attention_flops(form, images)


def attention_flops(form: nn.Module, images: Tensor) -> int:
    """Operations of the linear attention, which PyTorch's counter does not know: 4 D Dv for a cell and head."""
    mix = getattr(getattr(form, "neck", None), "mix", None)
    if mix is None or mix.softmax:
        return 0
    cells = images.size(0) * images.size(2) * images.size(3) // form.stride**2
    width = form.neck.qkv.out_channels // 3
    return 4 * cells * width * width // mix.heads


def read_images(data: DetectionData) -> list[np.ndarray]:
    """The first images, uint8 (H, W, 3), RGB; again from the first where there are too few."""
    return [data[i % len(data)].image.permute(1, 2, 0).contiguous().numpy() for i in range(IMAGES)]


def as_inputs(images: list[np.ndarray], size: int) -> Tensor:
    """Images as an input (B, 3, size, size)."""
    return torch.stack([letterbox(torch.from_numpy(image).permute(2, 0, 1), size)[0] for image in images])


def find(model: YoloLat, images: list[np.ndarray], size: int) -> Found:
    """Boxes, scores and labels of images uint8 (H, W, 3), RGB."""
    inputs, fits = zip(*(letterbox(torch.from_numpy(image).permute(2, 0, 1), size) for image in images), strict=True)
    found = model.detect(torch.stack(inputs), **DETECTION)
    return [(fit.to_image(boxes), scores, labels) for fit, (boxes, scores, labels) in zip(fits, found, strict=True)]
