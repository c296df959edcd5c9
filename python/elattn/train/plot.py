"""The loss curve of a run."""

import io
import math
from pathlib import Path
from typing import Any

from elattn._files import write_file

__all__ = ["plot_losses"]


def plot_losses(log: list[dict[str, Any]], path: Path, *, unigram: float, bigram: float) -> None:
    """Draws training and validation loss over the steps as a PNG, with the byte models as lines.

    `log` holds the entries of log.jsonl; losses are drawn in bits per byte.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    training = [(entry["step"], entry["loss"] / math.log(2)) for entry in log if "loss" in entry]
    validation = [(entry["step"], entry["bits_per_byte"]) for entry in log if "bits_per_byte" in entry]
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.4, label="training")
    if validation:
        label = f"held-out text: {min(bits for _, bits in validation):.3f} at best"
        axes.plot(*zip(*validation, strict=True), color="tab:blue", marker="o", markersize=3, label=label)
    axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram: {unigram:.3f}")
    axes.axhline(bigram, color="tab:orange", linestyle="--", label=f"bigram: {bigram:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, max(unigram * 1.2, 1)))
    axes.grid(alpha=0.2)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    write_file(path, png.getvalue())
