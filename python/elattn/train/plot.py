"""The curves of a run."""

import io
import math
from pathlib import Path
from typing import Any

from elattn._files import write_file

__all__ = ["plot_losses"]


def plot_losses(
    log: list[dict[str, Any]], path: Path, *, unigram: float, bigram: float, bytes_per_token: float = 1.0
) -> None:
    """Draws loss, gradient norm and learning rate over the steps as a PNG, with the byte models as lines.

    `log` holds the entries of log.jsonl; losses are drawn in bits per byte.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (axes, below) = pyplot.subplots(
        2, figsize=(8, 5.5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    steps = [entry["step"] for entry in log]
    training = [entry["loss"] / math.log(2) / bytes_per_token for entry in log]
    validation = [(entry["step"], entry["bits_per_byte"]) for entry in log if "bits_per_byte" in entry]
    axes.plot(steps, training, color="tab:blue", alpha=0.4, label="training")
    if validation:
        label = f"held-out text: {min(bits for _, bits in validation):.3f} at best"
        axes.plot(*zip(*validation, strict=True), color="tab:blue", marker="o", markersize=3, label=label)
    axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram: {unigram:.3f}")
    axes.axhline(bigram, color="tab:orange", linestyle="--", label=f"bigram: {bigram:.3f}")
    axes.set(ylabel="bits per byte", ylim=(0, max(unigram * 1.2, 1)))
    axes.grid(alpha=0.2)
    axes.legend()

    below.plot(steps, [entry["grad_norm"] for entry in log], color="tab:green", linewidth=1)
    below.set(xlabel="step", ylabel="gradient norm", yscale="log")
    below.yaxis.label.set_color("tab:green")
    below.grid(alpha=0.2)
    rate = below.twinx()
    rate.plot(steps, [entry["lr"] for entry in log], color="tab:red", linewidth=1)
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.yaxis.label.set_color("tab:red")
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    write_file(path, png.getvalue())
