"""Pictures of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from elattn._files import write_file
from elattn.detect.data import DetectionData
from elattn.detect.detector import Detector
from elattn.detect.evaluate import Evaluation, Prediction
from elattn.detect.images import BadImage
from elattn.detect.letterbox import letterbox
from elattn.ops import attention, kernels

__all__ = ["attention_weights", "plot_attention", "plot_losses", "plot_precision", "plot_predictions", "plot_run"]

_SHOWN = 0.5  # smallest score of a box that is drawn
_COLOURS = [f"C{i}" for i in range(10)]


def plot_run(
    log: list[dict[str, Any]], evaluation: Evaluation, data: DetectionData, detector: Detector, out: Path
) -> None:
    """Writes all pictures of a run into a folder: loss.png, precision.png, predictions.png and attention.png."""
    plot_losses(log, out / "loss.png")
    plot_precision(evaluation, data.classes, out / "precision.png")
    plot_predictions(evaluation.predictions, data, out / "predictions.png")
    if detector.model.neck_kind != "none":
        plot_attention(detector, data, out / "attention.png")


def plot_losses(log: list[dict[str, Any]], path: Path) -> None:
    """The losses of the epochs, and the average precision on the validation split."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in log]
    for name, label in (("box", "1 - CIoU"), ("objectness", "objectness"), ("classes", "classes")):
        axes.plot(epochs, [entry[name] for entry in log], label=label)
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    judged = [entry for entry in log if "ap" in entry]
    for name, label in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75")):
        right.plot([entry["epoch"] for entry in judged], [entry[name] for entry in judged], marker="o", label=label)
    right.set(xlabel="epoch", ylabel="on the validation split", ylim=(0, 1))
    for each in (axes, right):
        each.grid(alpha=0.2)
        each.legend()
    _write(figure, path)


def plot_precision(evaluation: Evaluation, classes: Sequence[str], path: Path) -> None:
    """Precision by recall at an overlap of 0.5, for up to ten classes and for their mean."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    recall = np.linspace(0, 1, 101)
    for i, name in enumerate(classes[:10]):
        axes.plot(recall, evaluation.precision[:, i], linewidth=1, alpha=0.6, label=name)
    mean = torch.from_numpy(evaluation.precision).nanmean(1).numpy()
    axes.plot(recall, mean, color="black", linewidth=2, label=f"mean of {len(classes)}: {evaluation.ap50:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small")
    _write(figure, path)


def plot_predictions(predictions: Sequence[Prediction], data: DetectionData, path: Path, *, count: int = 6) -> None:
    """The first images: their objects above, what was found below."""
    found = {prediction.image_id: prediction for prediction in predictions}
    samples = []
    for i in range(len(data)):
        try:
            samples.append(data[i])
        except BadImage:
            continue
        if len(samples) == count:
            break
    figure = Figure(figsize=(2.6 * len(samples), 5.6), layout="constrained")
    axes = figure.subplots(2, len(samples), squeeze=False)
    for column, sample in enumerate(samples):
        prediction = found[sample.image_id]
        shown = prediction.scores >= _SHOWN
        texts = [data.classes[label] for label in sample.labels]
        _draw(axes[0, column], sample.image, sample.boxes, sample.labels, texts)
        texts = [
            f"{data.classes[label]} {score:.2f}"
            for label, score in zip(prediction.labels[shown], prediction.scores[shown], strict=True)
        ]
        _draw(axes[1, column], sample.image, prediction.boxes[shown], prediction.labels[shown], texts)
    axes[0, 0].set_ylabel("objects")
    axes[1, 0].set_ylabel(f"found, score at least {_SHOWN}")
    _write(figure, path)


def plot_attention(detector: Detector, data: DetectionData, path: Path) -> None:
    """Where the cell in the middle of the first object looks: each head, and their mean under every kernel."""
    sample = next(sample for sample in map(data.__getitem__, range(len(data))) if len(sample.boxes))
    image, fit = letterbox(sample.image, detector.size)
    box = fit.to_input(sample.boxes)[0]
    stride = detector.model.stride
    column, row = ((box[:2] + box[2:]) / 2 / stride).long().tolist()
    names = ["softmax"] if detector.model.neck_kind == "softmax" else kernels()
    maps = {name: attention_weights(detector, image, (row, column), name) for name in names}
    own = names[0] if len(names) == 1 else "hadamard_exp"
    panels = {f"{own}, head {i}": weights for i, weights in enumerate(maps[own])}
    panels |= {f"{name}, all heads": weights.mean(0) for name, weights in maps.items()}
    figure = Figure(figsize=(2.4 * len(panels), 2.8), layout="constrained")
    extent = (0, detector.size, detector.size, 0)
    for axes, (title, weights) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy(), extent=extent)
        axes.imshow(weights.numpy(), extent=extent, alpha=0.6, cmap="inferno", interpolation="bilinear")
        axes.plot((column + 0.5) * stride, (row + 0.5) * stride, "w+", markersize=12)
        axes.set(title=title, xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    _write(figure, path)


def attention_weights(detector: Detector, image: Tensor, cell: tuple[int, int], kernel: str) -> Tensor:
    """How much of every cell's value the cell (row, column) takes: (heads, H, W), a sum of 1 for each head.

    Args:
        image: an input, (3, size, size).
        kernel: of `elattn.kernels()`, put on the queries and keys as they were trained; or "softmax".
    """
    model = detector.model
    with torch.inference_mode():
        images = image[None].to(model.neck.qkv.weight.device)
        q, k, _ = model.neck.mix.split(model.neck.qkv(model.neck.reduce(model.backbone(images))))
        q = q[:, :, cell[0] * (image.size(2) // model.stride) + cell[1], None]
        if kernel == "softmax":
            weights = (q @ k.transpose(2, 3) * q.size(3) ** -0.5).softmax(-1)
        else:
            # Values that are the cells' own unit vectors come out as the weights.
            v = torch.eye(k.size(2), device=k.device).expand(1, k.size(1), -1, -1)
            weights = attention(q, k, v, kernel=kernel, scale=q.size(3) ** -0.5)
    return weights[0, :, 0].unflatten(-1, (image.size(1) // model.stride, -1)).cpu()


def _draw(axes: Axes, image: Tensor, boxes: Tensor, labels: Tensor, texts: Sequence[str]) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    for (left, top, right, bottom), label, text in zip(boxes.tolist(), labels.tolist(), texts, strict=True):
        colour = _COLOURS[label % len(_COLOURS)]
        axes.plot((left, right, right, left, left), (top, top, bottom, bottom, top), color=colour, linewidth=1.5)
        axes.text(
            left, top, text, fontsize=7, color="white", va="bottom", bbox={"facecolor": colour, "pad": 1, "lw": 0}
        )
    axes.set(xlim=(0, image.size(2)), ylim=(image.size(1), 0), xticks=[], yticks=[])


def _write(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_file(path, png.getvalue())
