"""The pictures of the report."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.detection.contestants import PEER

COLOURS = {"linear": "#c1272d", "softmax": "#3f88c5", "none": "#7f7f7f", PEER: "#30475e"}
MARKERS = {"linear": "o", "softmax": "^", "none": "s", PEER: "D"}
LABELS = {"linear": "lat_n, linear neck", "softmax": "lat_n, softmax neck", "none": "lat_n, no neck", PEER: PEER}


def growth(path: Path, rows: list[dict[str, Any]], raw: list[dict[str, Any]]) -> None:
    """Time of the forward and of the neck against the pixels, one image."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    for axis, part in zip(axes, ("forward", "neck and head"), strict=True):
        lines = {
            neck: [
                (row["size"] ** 2, row["seconds"] * 1e3) for row in rows if (row["part"], row["neck"]) == (part, neck)
            ]
            for neck in ("linear", "softmax", "none")
        }
        if part == "forward":
            lines[PEER] = [
                (row["size"] ** 2, row["seconds"] * 1e3)
                for row in raw
                if (row["name"], row["form"], row["batch"]) == (PEER, "fused", 1)
            ]
        for name, points in lines.items():
            if points:
                style = {"color": COLOURS[name], "marker": MARKERS[name], "ms": 5, "label": LABELS[name]}
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(xscale="log", yscale="log", xlabel="side of the input, px", ylabel="ms, one image", title=part)
        axis.set_xticks([size**2 for size in sizes], [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        _finish(axis)
    axes[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def precision(path: Path, groups: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """AP and AP50 on the test split: the median of the seeds as a bar, every seed a dot."""
    if not groups:
        return
    counts = [len(models) for models in groups.values()]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2 + 1.2 * sum(counts), 4.4), sharey=True, squeeze=False, layout="constrained",
        width_ratios=counts,
    )  # fmt: skip
    for axis, (title, models) in zip(axes[0], groups.items(), strict=True):
        for shift, (figure_name, colour) in enumerate((("ap50", "#3f88c5"), ("ap", "#c1272d"))):
            values = [sorted(run["test"][figure_name] for run in runs) for runs in models.values()]
            places = [i + 0.4 * shift for i in range(len(models))]
            heights = [(some[(len(some) - 1) // 2] + some[len(some) // 2]) / 2 for some in values]
            bars = axis.bar(places, heights, 0.38, color=colour, alpha=0.75, label=figure_name.upper())
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=3)
            for place, some in zip(places, values, strict=True):
                axis.plot([place] * len(some), some, "o", color="black", ms=2.5)
        axis.set_xticks(
            [i + 0.2 for i in range(len(models))], [name.replace(" ", "\n", 1) for name in models], fontsize=8
        )
        axis.set(title=title)
        _finish(axis)
    axes[0][0].legend(frameon=False, fontsize=9)
    axes[0][0].set_ylabel('average precision, split "test"')
    _save(figure, path)


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
