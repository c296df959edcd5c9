"""Times of both detectors in the same two regions, in turns: tensor to raw predictions, and image to boxes."""

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.detection import contestants, program
from benchmarks.detection.contestants import DETECTION, LAT, PEER, Found
from benchmarks.paper.checks import require_close
from benchmarks.paper.turns import take_turns
from elattn.detect import DetectConfig, letterbox, load_data
from elattn.models import YoloLat
from elattn.testing import reference_attention

Name = TypeVar("Name", bound=Hashable)

MODELS = ("lat_n", "lat_n softmax", "lat_n no neck", "lat_n position 3", "lat_dw", "lat_dw softmax", "lat_dw no neck")
NECKS = {"linear": "lat_n", "softmax": "lat_n softmax", "none": "lat_n no neck"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is timed."""

    models: Sequence[str] = MODELS
    sizes: Sequence[int] = (320, 640)
    batches: Sequence[int] = (1, 16)
    growth: Sequence[int] = (320, 640, 960, 1280)  # sides at which the necks are compared
    rounds: int = 11
    threads: int = 1


def measure(data: str, sizes: Sizes, weights: dict[str, Path], console: Console) -> dict[str, Any]:
    """All times. Raises AssertionError if a form of a model computes something else than the model.

    Args:
        data: whose test split has the images.
        weights: trained ones, by name of the model; the others are random.
    """
    peer, said = contestants.load_peer()
    console.print(f"{PEER}: {said}" + ("" if peer else "; the others are measured without it"), highlight=False)
    source = load_data(data, "test")
    images = contestants.read_images(source)
    inputs = contestants.as_inputs(images, min(sizes.sizes))
    models = {
        name: contestants.build(name, len(source.classes), inputs, weights.get(name))
        for name in (*sizes.models, *([PEER] if peer else []))
    }
    forms = {name: contestants.forms(model, inputs[:1]) for name, model in models.items()}
    result: dict[str, Any] = {
        "threads": sizes.threads,
        "peer": said,
        "peer_measured": peer is not None,
        "classes": len(source.classes),
        "trained": [name for name in models if name in weights],
        "models": [_describe(name, form, sizes.sizes) for name, form in forms.items()],
        "raw": [],
        "boxes": [],
        "stages": [],
        "growth": growth(images, len(source.classes), sizes, weights),
        "program": program.measure(models[sizes.models[0]], images[0], min(sizes.sizes), sizes.rounds, sizes.threads),
    }
    for size in sizes.sizes:
        result["stages"] += stages(forms[sizes.models[0]]["fused"], images[0], size, sizes)
        for batch in sizes.batches:
            console.print(f"{size} px, batch {batch}", highlight=False)
            result["raw"] += raw(forms, contestants.as_inputs(images[:batch], size), sizes)
            result["boxes"] += boxes(models, images[:batch], size, sizes)
    return result


def _describe(name: str, forms: dict[str, nn.Module], sizes: Sequence[int]) -> dict[str, Any]:
    """Parameters and operations."""
    row: dict[str, Any] = {"name": name, "parameters": {}, "flops": {}, "attention_flops": {}}
    for classes in (1, 10, 80):
        model = contestants.load_peer()[0].build(classes) if name == PEER else YoloLat(classes, **LAT[name])
        row["parameters"][classes] = sum(p.numel() for p in model.parameters())
    for size in sizes:
        images = torch.zeros(1, 3, size, size)
        row["flops"][size] = {form: contestants.count_flops(forms[form], images) for form in ("eager", "fused")}
        row["attention_flops"][size] = contestants.attention_flops(forms["fused"], images)
    return row


def default_parameters() -> int:
    """Of what `elattn detect train` trains, at one class."""
    config = DetectConfig()
    model = YoloLat(1, variant=config.variant, neck=config.neck, position=config.position)
    return sum(p.numel() for p in model.parameters())


def raw(forms: dict[str, dict[str, nn.Module]], images: Tensor, sizes: Sizes) -> list[dict[str, Any]]:
    """Tensor to raw predictions, every form of every model."""
    calls = {}
    for name, mine in forms.items():
        check_forms(name, mine, images)
        calls |= {(name, form): functools.partial(module, images) for form, module in mine.items()}
    return [
        {"name": name, "form": form, "size": images.size(2), "batch": len(images)} | _times(samples)
        for (name, form), samples in in_turns(calls, sizes).items()
    ]


@torch.inference_mode()
def check_forms(name: str, forms: dict[str, nn.Module], images: Tensor) -> None:
    """The model agrees with itself in float64, and its other forms with it, to 1e-4 of the largest value."""
    expected = _tensors(forms["eager"](images))
    exact = _tensors(copy.deepcopy(forms["eager"]).double()(images[:1].double()))
    for found, right in zip(expected, exact, strict=True):
        require_close(f"{name}, float32", found[:1], right)
    for form, module in forms.items():
        for _ in range(3):  # TorchScript compiles at its second call of a shape
            outputs = _tensors(module(images))
        for found, right in zip(outputs, expected, strict=True):
            require_close(f"{name}, {form}", found, right)


def boxes(models: dict[str, nn.Module], images: list[np.ndarray], size: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Image (H, W, 3) to boxes in its pixels, for all that have a neck. The peer chooses channels last by itself."""
    calls: dict[tuple[str, str], Callable[[], Found]] = {}
    for name, model in models.items():
        if name == PEER:
            # It takes BGR; turning the channels is not its work.
            turned = [np.ascontiguousarray(image[..., ::-1]) for image in images]
            peer = contestants.load_peer()[0]
            for head in peer.HEADS:
                detector = peer.Detector(model, size, head=head, **DETECTION)
                for (_, scores, _), (_, right, _) in zip(detector(turned), detector.predict(turned), strict=True):
                    require_close(f"{name}, {head}", scores, right)
                calls[name, head] = functools.partial(detector, turned)
                calls[name, f"{head}, by predict()"] = functools.partial(detector.predict, turned)
        elif "no neck" not in name:
            calls[name, "fused"] = functools.partial(contestants.find, model.fuse(), images, size)
    for (name, how), call in calls.items():
        check_boxes(f"{name}, {how}", call(), len(images))
    return [
        {"name": name, "how": how, "size": size, "batch": len(images)} | _times(samples)
        for (name, how), samples in in_turns(calls, sizes).items()
    ]


def check_boxes(what: str, found: Found, images: int) -> None:
    """Every image has its boxes, finite ones, the best first, none below the confidence or beyond the limit."""
    if len(found) != images:
        raise AssertionError(f"{what}: {len(found)} results of {images} images")
    for boxes, scores, labels in found:
        right = boxes.isfinite().all() and (scores >= DETECTION["confidence"]).all() and (scores.diff() <= 0).all()
        if not right or not len(boxes) == len(scores) == len(labels) <= DETECTION["limit"]:
            raise AssertionError(f"{what}: boxes that are not in order: {scores.tolist()}")


def stages(model: YoloLat, image: np.ndarray, size: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Image to boxes in its three steps, one image."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    with torch.inference_mode():
        inputs, fit = letterbox(pixels, size)
        outputs = model(inputs[None])
    confidence, iou, limit = DETECTION.values()
    calls = {
        "letterbox": lambda: letterbox(pixels, size),
        "forward": lambda: model(inputs[None]),
        "boxes": lambda: fit.to_image(model.select(outputs, confidence, iou, limit)[0][0]),
    }
    return [{"stage": stage, "size": size} | _times(samples) for stage, samples in in_turns(calls, sizes).items()]


def growth(images: list[np.ndarray], classes: int, sizes: Sizes, weights: dict[str, Path]) -> list[dict[str, Any]]:
    """Forward, neck with head, and attention of each kind of neck, by size, one image."""
    small = contestants.as_inputs(images, min(sizes.growth))
    models = {neck: contestants.build(name, classes, small, weights.get(name)) for neck, name in NECKS.items()}
    fused = {neck: model.fuse() for neck, model in models.items()}
    rows = []
    for size in sizes.growth:
        inputs = contestants.as_inputs(images[:1], size)
        calls: dict[tuple[str, str], Callable[[], Tensor]] = {
            ("forward, eager", "linear"): functools.partial(models["linear"], inputs)
        }
        for neck, model in fused.items():
            check_forms(f"{neck} neck", {"eager": models[neck], "fused": model}, inputs)
            with torch.inference_mode():
                features = model.backbone(inputs)
            calls["forward", neck] = functools.partial(model, inputs)
            calls["neck and head", neck] = functools.partial(_end, model, features)
            if neck != "none":
                with torch.inference_mode():
                    qkv = model.neck.qkv(features)
                calls["attention", neck] = functools.partial(model.neck.mix, qkv)
                if neck == "linear" and size == min(sizes.growth):
                    _check_attention(model.neck.mix, qkv)
        rows += [
            {"part": part, "neck": neck, "size": size} | _times(samples)
            for (part, neck), samples in in_turns(calls, sizes).items()
        ]
    return rows


def _end(model: YoloLat, features: Tensor) -> Tensor:
    return model.head(model.neck(features))


@torch.inference_mode()
def _check_attention(mix: nn.Module, qkv: Tensor) -> None:
    """The attention is the quadratic formula's."""
    q, k, v = mix.split(qkv)
    right = reference_attention(q, k, v, kernel="hadamard_exp", scale=q.size(3) ** -0.5)
    require_close("attention", mix(qkv).flatten(2), right.transpose(2, 3).flatten(1, 2))


def in_turns(calls: dict[Name, Callable[[], Any]], sizes: Sizes) -> dict[Name, list[float]]:
    """Seconds of each call in each round, with as many threads as asked for: the peer sets its own number."""
    torch.set_num_threads(sizes.threads)
    with torch.inference_mode():
        samples = take_turns(calls, sizes.rounds)
    if torch.get_num_threads() != sizes.threads:
        raise AssertionError(f"timed with {torch.get_num_threads()} threads, not {sizes.threads}")
    return samples


def _times(samples: list[float]) -> dict[str, Any]:
    return {"seconds": min(samples), "samples": samples}


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
