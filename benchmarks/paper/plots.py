"""The pictures of the report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.paper.forms import Form

Results = dict[str, list[dict[str, Any]]]

COLOURS = ("#30475e", "#c1272d", "#3f88c5", "#44a27a", "#e88a3c", "#8e6bb0", "#7f7f7f", "#b5a642", "#d17a9e", "#4c4c4c")
MARKERS = "o^svDP*X<>"


def curves(path: Path, forms: list[Form], results: Results) -> None:
    """Validation loss over the steps: the mean over the seeds, and a band from the lowest to the highest."""
    figure, (axes, end) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(3, 2))
    for i, form in enumerate(form for form in forms if form.name in results):
        runs = results[form.name]
        steps = [step for step, _ in runs[0]["validation"]]
        values = list(zip(*([nats for _, nats in run["validation"]] for run in runs), strict=True))
        mean = [sum(v) / len(v) for v in values]
        for axis, first in ((axes, 0), (end, len(steps) // 2)):
            axis.fill_between(
                steps[first:], [min(v) for v in values][first:], [max(v) for v in values][first:],
                color=COLOURS[i], alpha=0.2, lw=0,
            )  # fmt: skip
            axis.plot(steps[first:], mean[first:], color=COLOURS[i], marker=MARKERS[i], ms=4, label=form.title)
    bigram = next(iter(results.values()))[0]["bigram_nats"]
    axes.axhline(bigram, color="gray", ls=":", label="bigram model")
    axes.legend(frameon=False, fontsize=9)
    axes.set(ylabel="validation loss, nats per byte", title="Mean and range over the seeds")
    end.set(title="The second half")
    for axis in (axes, end):
        axis.set_xlabel("step")
        _finish(axis)
    _save(figure, path)


def ablation(path: Path, forms: list[Form], results: Results, titles: dict[str, str], lines: Iterable[str]) -> None:
    """Validation loss at the end of every form, every seed a dot; `lines` are forms drawn through all of it."""
    forms = [form for form in forms if form.name in results]
    groups = [group for group in titles if any(form.group == group for form in forms)]
    rows: list[Form | str] = []
    for group in groups:
        rows += [group, *(form for form in forms if form.group == group)]
    figure, axis = plt.subplots(figsize=(9, 0.24 * len(rows) + 1.2), layout="constrained")
    for name, style in zip((name for name in lines if name in results), ("--", ":"), strict=False):
        title = next(form.title for form in forms if form.name == name)
        axis.axvline(_mean(results[name]), color="gray", ls=style, lw=1, label=title)
    for y, row in enumerate(rows):
        if isinstance(row, str):
            continue
        nats = [run["nats"] for run in results[row.name]]
        colour = COLOURS[groups.index(row.group)]
        axis.plot([min(nats), max(nats)], [y, y], color=colour, lw=2, alpha=0.4)
        axis.plot(nats, [y] * len(nats), "o", color=colour, ms=3, alpha=0.6)
        axis.plot(_mean(results[row.name]), y, "|", color=colour, ms=11, mew=2)
    axis.set_yticks(range(len(rows)), [titles[row] if isinstance(row, str) else row.title for row in rows], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("validation loss, nats per byte (lower is better)")
    axis.legend(frameon=False, fontsize=8)
    _finish(axis)
    _save(figure, path)


def decoding(path: Path, rows: list[dict[str, Any]]) -> None:
    """Tokens/s and bytes of the state against the context."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        mine = [row for row in rows if row["model"] == name]
        contexts = [row["context"] for row in mine]
        style = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 5, "label": name}
        axes[0].plot(contexts, [row["tokens_per_second"] for row in mine], **style)
        axes[1].plot(contexts, [row["state_bytes"] / 1e6 for row in mine], **style)
    contexts = sorted({row["context"] for row in rows})
    for axis, what in zip(axes, ("tokens/s, batch 1 (higher is faster)", "state, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=what)
        axis.set_xticks(contexts, [f"{n:,}" for n in contexts], rotation=30)
        axis.minorticks_off()
        _finish(axis)
    axes[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def recall(path: Path, titles: dict[str, str], accuracy: dict[str, dict[int, list[float]]]) -> None:
    """Accuracy against the number of pairs: the mean over the seeds, and a band of their range."""
    figure, axis = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
    for i, (name, by_pairs) in enumerate(accuracy.items()):
        pairs = list(by_pairs)
        axis.fill_between(pairs, *([f(by_pairs[n]) for n in pairs] for f in (min, max)), color=COLOURS[i], alpha=0.15)
        mean = [sum(by_pairs[n]) / len(by_pairs[n]) for n in pairs]
        axis.plot(pairs, mean, color=COLOURS[i], marker=MARKERS[i], ms=5, label=titles[name])
    axis.set(xscale="log", xlabel="pairs of key and value", ylabel="questions answered rightly", ylim=(-0.02, 1.02))
    axis.set_xticks(pairs, [str(n) for n in pairs])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(axis)
    _save(figure, path)


def speed(path: Path, training: list[dict[str, Any]], moe: list[dict[str, Any]]) -> None:
    """Speed relative to FA-GPT for each shape, and of the mixture relative to the dense network."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(3, 1))
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in training))
    models = list(dict.fromkeys(row["model"] for row in training))
    for i, name in enumerate(models):
        ratios = [row["ratio"] for row in training if row["model"] == name]
        bars = axes[0].bar([n + 0.8 * i / len(models) for n in range(len(shapes))], ratios, 0.75 / len(models))
        axes[0].bar_label(bars, fmt="%.2f", fontsize=8)
        for bar in bars:
            bar.set_color(COLOURS[i])
        bars.set_label(name)
    labels = [f"batch {batch}, length {length:,}" for batch, length in shapes]
    axes[0].set_xticks([n + 0.3 for n in range(len(shapes))], labels)
    axes[0].axhline(1, color="gray", lw=1)
    axes[0].set(title="Training step", ylabel="speed, FA-GPT = 1")
    axes[0].legend(frameon=False, fontsize=9)
    rows = [row for row in moe if row["layer"] == "MoE"]
    bars = axes[1].bar([row["mode"] for row in rows], [row["ratio"] for row in rows], 0.5, color=COLOURS[3])
    axes[1].bar_label(bars, fmt="%.2f", fontsize=8)
    axes[1].axhline(1, color="gray", lw=1)
    axes[1].set(title="Mixture of experts", ylabel="speed, dense of equal active size = 1")
    for axis in axes:
        _finish(axis)
    _save(figure, path)


def _mean(runs: list[dict[str, Any]]) -> float:
    return sum(run["nats"] for run in runs) / len(runs)


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
