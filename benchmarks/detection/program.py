"""The C++ program beside Python: image file to boxes."""

import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import machine
from benchmarks.detection import contestants
from benchmarks.detection.contestants import DETECTION
from elattn._library import library_path
from elattn.detect import Detector, export_detector_torchscript, read_image
from elattn.models import YoloLat

PROGRAM = library_path().parent / "examples" / "detect"
HOWS = ("Python, eager", "Python, fused", "C++")
_TOLERANCE = 1e-4
_REPEATS = 20  # in a round, of which the median counts


def measure(model: YoloLat, image: np.ndarray, size: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Seconds of each, in turns; nothing if the program is not built (make examples).

    Args:
        image: uint8 (H, W, 3), RGB.
        size: side of the input.

    Raises:
        AssertionError: the program finds other boxes than Python.
    """
    if not PROGRAM.exists():
        return []
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        picture, exported = Path(folder) / "image.ppm", Path(folder) / "model.pt"
        Image.fromarray(image).save(picture)
        names = [str(i) for i in range(model.num_classes)]
        export_detector_torchscript(Detector(model, names, size), exported)
        fused = model.fuse()
        found, _ = _run_program(exported, picture, threads)
        expected = find(fused, picture, size).double()
        # Of scores alone: boxes whose scores are equal to rounding may change places.
        if len(found) != len(expected) or (found - expected)[:, 0].abs().max() > _TOLERANCE:
            raise AssertionError(f"C++ finds boxes with the scores {found[:, 0]}, Python with {expected[:, 0]}")
        samples: dict[str, list[float]] = {how: [] for how in HOWS}
        for _ in range(rounds):
            samples["Python, eager"].append(_median(lambda: find(model, picture, size)))
            samples["Python, fused"].append(_median(lambda: find(fused, picture, size)))
            samples["C++"].append(_run_program(exported, picture, threads)[1])
    return [{"how": how, "size": size, "seconds": min(values), "samples": values} for how, values in samples.items()]


@torch.inference_mode()
def find(model: YoloLat, picture: Path, size: int) -> Tensor:
    """Scores and boxes (n, 5) in pixels of the picture."""
    boxes, scores, _ = contestants.find(model, [read_image(picture)], size)[0]
    return torch.cat((scores[:, None], boxes), 1)


def _run_program(model: Path, picture: Path, threads: int) -> tuple[Tensor, float]:
    """What `find` returns, and the seconds of a picture."""
    options = ["--confidence", DETECTION["confidence"], "--iou", DETECTION["iou"]]
    options += ["--threads", threads, "--repeat", _REPEATS]
    words = [str(word) for word in (PROGRAM, model, picture, *options)]
    # Freed memory stays with it, as with the Python that it is compared to.
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | machine.KEEP_PAGES)
    rows = [[float(x) for x in line.split("\t")[1:]] for line in done.stdout.splitlines()]
    milliseconds = [float(x) for x in re.findall(r"([\d.]+) ms", done.stderr)]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 5), sum(milliseconds) / 1e3


def _median(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
