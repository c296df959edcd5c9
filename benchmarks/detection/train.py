"""Average precision of both detectors after the same CPU seconds, and after the same epochs, by the same evaluator.

Settings are chosen on the split "val"; the split "test" is reported. Every training is a job that leaves a JSON file,
so that what is there already is not trained again.
"""

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks import machine
from benchmarks.detection import contestants
from benchmarks.detection.contestants import DETECTION, LAT, PEER
from benchmarks.paper.jobs import Job, execute
from elattn._files import write_file
from elattn.detect import (
    DetectConfig,
    DetectionData,
    Prediction,
    evaluate,
    load_data,
    load_detector,
    save_detector,
    train_detector,
)
from elattn.detect.evaluate import average_precision

COMPARED = ("lat_n", "lat_dw")  # with the peer
ABLATION = ("lat_n", "lat_n softmax", "lat_n no neck", "lat_n position 3")
GROUPS = ("budget", "epochs", "ablation")
# Tried with the first seed; fields of DetectConfig, and options of the peer.
LAT_TRIED: dict[str, dict[str, Any]] = {
    f"learning rate {rate:g}": {"learning_rate": rate} for rate in (2e-3, 4e-3, 8e-3)
}
# The first is what the peer takes by itself for ten classes, with a warm-up of three epochs, a linear fall, and mosaics
# until ten epochs before the end. Beyond 10,000 updates it would take MuSGD, which multiplies in bfloat16: an update
# takes 4 seconds on a CPU without instructions for it.
_SHORT = {"momentum": 0.9, "warmup_epochs": 0.5, "warmup_bias_lr": 0.0, "cos_lr": True}
PEER_TRIED: dict[str, dict[str, Any]] = {
    "default": {"optimizer": "AdamW", "lr0": 7.14e-4, "momentum": 0.9, "warmup_bias_lr": 0.0},
    "AdamW 2e-3": {"optimizer": "AdamW", "lr0": 2e-3, **_SHORT},
    "AdamW 4e-3": {"optimizer": "AdamW", "lr0": 4e-3, **_SHORT},
    "SGD 1e-2": {"optimizer": "SGD", "lr0": 1e-2, **_SHORT},
}
_FIGURES = ("ap", "ap50", "ap75", "small", "medium", "large")
_CALIBRATION = 128  # images


def run(
    out: Path,
    data: str,
    cpu_seconds: float,
    epochs: int | None,
    seeds: int,
    workers: int,
    groups: Sequence[str],
    console: Console,
) -> int:
    """Trains what is missing and writes plan.json, which says what belongs together; returns how many runs failed.

    Args:
        cpu_seconds: of a training in the group "budget".
        epochs: of a training in the groups "epochs" and "ablation"; those of lat_n in the budget by default.
        workers: trainings at a time, one thread each.
        groups: what to train; the plan has all.
    """
    peer, said = contestants.load_peer()
    console.print(f"{PEER}: {said}", highlight=False)
    yolo = write_yolo(data, out / "yolo") if peer else None
    names = [*COMPARED, *([PEER] if peer else [])]
    costs = calibrate(names, data, out / "calibration.json", console)
    own = share_epochs(costs, len(load_data(data, "train")), cpu_seconds)
    equal = epochs or own["lat_n"]
    make = functools.partial(make_job, out, data, yolo)

    tried = {"lat_n": LAT_TRIED} | ({PEER: PEER_TRIED} if peer else {})
    tuning = {
        name: {setting: make(name, own[name], setting, options, 0) for setting, options in settings.items()}
        for name, settings in tried.items()
    }
    console.print("[bold]settings[/bold]")
    failures = execute([job for jobs in tuning.values() for job in jobs.values()], workers, console)
    chosen = {name: choose({setting: job.result() for setting, job in jobs.items()}) for name, jobs in tuning.items()}
    for name, setting in chosen.items():
        console.print(f"{name}: {setting}", highlight=False)

    def repeat(name: str, number: int) -> list[Job]:
        kind = PEER if name == PEER else "lat_n"
        return [make(name, number, chosen[kind], tried[kind][chosen[kind]], seed) for seed in range(seeds)]

    listed = {
        "budget": {name: repeat(name, own[name]) for name in names},
        "epochs": {name: repeat(name, equal) for name in names},
        "ablation": {name: repeat(name, equal) for name in ABLATION},
    }
    plan = {
        "data": data,
        "cpu_seconds": cpu_seconds,
        "costs": costs,
        "own_epochs": own,
        "equal_epochs": equal,
        "seeds": seeds,
        "chosen": chosen,
        "peer": said,
        "tuning": {name: {s: job.path.name for s, job in jobs.items()} for name, jobs in tuning.items()},
        "groups": {g: {n: [job.path.name for job in jobs] for n, jobs in some.items()} for g, some in listed.items()},
        "machine": machine.describe(),
    }
    write_file(out / "plan.json", json.dumps(plan, indent=1) + "\n")
    # Those of a seed come together, so that a run cut short compares all; each once, though several groups have it.
    jobs = {}
    for seed in range(seeds):
        jobs |= {mine[seed].path: mine[seed] for group in groups for mine in listed[group].values()}
    console.print("[bold]comparison[/bold]")
    return failures + execute(list(jobs.values()), workers, console)


def make_job(
    out: Path, data: str, yolo: Path | None, name: str, epochs: int, setting: str, options: dict[str, Any], seed: int
) -> Job:
    """A training of a model under a setting. The weights of the first seed stay beside the result."""
    stem = f"{name}-{epochs}epochs-{setting}-seed{seed}".replace(" ", "_").replace(",", "")
    path = out / "train" / f"{stem}.json"
    kept = path.with_suffix(".weights") if seed == 0 else None
    same = {"data": data, "epochs": epochs, "seed": seed}
    if name == PEER:
        config = DetectConfig()
        same |= {"batch_size": config.batch_size, "size": config.size, "settings": options}
        return Job(path, name, seed, same, functools.partial(train_peer, yolo=yolo, kept=kept))
    return Job(path, name, seed, same | LAT[name] | options, functools.partial(train_lat, kept=kept))


def train_lat(*, kept: Path | None, **config: Any) -> dict[str, Any]:
    """Trains YoloLat. Its CPU seconds include reading the data and one validation."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        train_detector(DetectConfig(**config, eval_every=config["epochs"]), Path(folder) / "run", plot=False)
        seconds = time.process_time() - began
        detector = load_detector(Path(folder) / "run" / "last")
    if kept:
        save_detector(detector, kept)
    figures = {
        split: figures_of(
            evaluate(detector.model, load_data(config["data"], split, classes=detector.classes), detector.size)
        )
        for split in ("val", "test")
    }
    return _result(detector.model, seconds, figures)


def train_peer(
    *,
    data: str,
    epochs: int,
    seed: int,
    batch_size: int,
    size: int,
    settings: dict[str, Any],
    yolo: Path,
    kept: Path | None,
) -> dict[str, Any]:
    """Trains the peer; of its two heads the one that does better on "val" counts."""
    from benchmarks.detection import peer

    threads = torch.get_num_threads()
    model, seconds = peer.train(
        yolo, settings, epochs=epochs, batch_size=batch_size, size=size, seed=seed, threads=threads
    )
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    heads = {}
    for head in peer.HEADS:
        detector = peer.Detector(model, size, head=head, every_label=True, **DETECTION)
        heads[head] = {split: judge(detector, load_data(data, split)) for split in ("val", "test")}
    best = max(heads, key=lambda head: heads[head]["val"]["ap"])
    return _result(model, seconds, heads[best]) | {"head": best, "heads": heads}


def judge(detector: Any, data: DetectionData, batch_size: int = 16) -> dict[str, float]:
    """COCO's figures of a peer's detector, by the evaluator of YoloLat."""
    samples, predictions = [], []
    for first in range(0, len(data), batch_size):
        batch = [data[i] for i in range(first, min(first + batch_size, len(data)))]
        images = [np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()[..., ::-1]) for sample in batch]
        for sample, (boxes, scores, labels) in zip(batch, detector(images), strict=True):
            predictions.append(Prediction(sample.image_id, boxes, scores, labels))
        samples += batch
    return {
        name: value for name, value in average_precision(samples, predictions, data.classes).items() if name in _FIGURES
    }


def figures_of(evaluation: Any) -> dict[str, float]:
    return {name: getattr(evaluation, name) for name in _FIGURES}


def _result(model: nn.Module, seconds: float, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "summary": f"AP {figures['val']['ap']:.3f} on val, {seconds:.0f} CPU s",
        "cpu_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    } | figures


def choose(results: Mapping[str, dict[str, Any] | None]) -> str:
    """The setting with the best average precision on "val"."""
    there = {setting: result["val"]["ap"] for setting, result in results.items() if result}
    if not there:
        raise RuntimeError("no setting could be trained")
    return max(there, key=lambda setting: there[setting])


def share_epochs(costs: Mapping[str, float], images: int, cpu_seconds: float) -> dict[str, int]:
    """Whole epochs of each model in the budget, given the CPU seconds of an image.

    The peer's are rounded to the nearest number. Ours are rounded down, and take no more than the budget nor the peer.
    """
    epochs, limit = {}, cpu_seconds
    if PEER in costs:
        epochs[PEER] = max(1, round(cpu_seconds / (images * costs[PEER])))
        limit = min(limit, epochs[PEER] * images * costs[PEER])
    return epochs | {name: max(1, int(limit / (images * cost))) for name, cost in costs.items() if name != PEER}


def calibrate(names: Sequence[str], data: str, path: Path, console: Console, rounds: int = 3) -> dict[str, float]:
    """CPU seconds that training takes for an image, measured in turns on one thread; kept in a file.

    The other trainings run beside each other, where the clock of the CPU counts more seconds for the same work: by how
    much hardly differs between models.
    """
    if path.exists() and names == list(costs := json.loads(path.read_text())):
        return costs
    console.print(f"CPU seconds of an image: {', '.join(names)}, in turns", highlight=False)
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        small = write_yolo(data, Path(folder), _CALIBRATION)
        images = len(load_data(str(small), "train"))
        for _ in range(rounds):
            for name in names:
                samples[name].append(_cost(name, small) / images)
    costs = {name: statistics.median(times) for name, times in samples.items()}
    write_file(path, json.dumps(costs, indent=1) + "\n")
    return costs


def _cost(name: str, data: Path) -> float:
    """CPU seconds of an epoch on a YOLO folder."""
    config = DetectConfig()
    if name == PEER:
        same = {"batch_size": config.batch_size, "size": config.size, "seed": 0, "threads": 1}
        return contestants.load_peer()[0].train(data, {}, epochs=2, **same)[1] / 2

    def seconds(epochs: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            same = {"data": str(data), "epochs": epochs, "eval_every": epochs}
            train_detector(DetectConfig(**same, **LAT[name]), Path(folder) / "run", plot=False)
            return time.process_time() - began

    return (seconds(6) - seconds(3)) / 3  # two thirds of both are early epochs, on smaller inputs


def write_yolo(data: str, folder: Path, most: int | None = None) -> Path:
    """The data as the peer reads it: links to the images, and a text file of boxes for each. Returns the data.yaml.

    Args:
        most: largest number of training images; of validation images then a sixteenth.
    """
    file = folder / "data.yaml"
    if file.exists():
        return file
    for split, limit in (("train", most), ("val", most and most // 16)):
        source = load_data(data, split)
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(min(len(source), limit or len(source))):
            sample = source[i]
            name = f"{i:06}"
            link = folder / "images" / split / f"{name}{Path(sample.path).suffix}"
            if not link.exists():
                os.symlink(Path(sample.path).resolve(), link)
            sides = torch.tensor(sample.image.shape[:0:-1])
            boxes = sample.boxes[~sample.crowd]
            centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2 / sides, (boxes[:, 2:] - boxes[:, :2]) / sides
            rows = torch.cat((centres, extents), 1).tolist()
            labels = sample.labels[~sample.crowd].tolist()
            lines = [" ".join(map(str, (label, *row))) for label, row in zip(labels, rows, strict=True)]
            (folder / "labels" / split / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    # JSON is YAML too. Written last: it says that the folder is whole.
    content = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": source.classes}
    write_file(file, json.dumps(content) + "\n")
    return file


def read_plan(out: Path) -> dict[str, Any] | None:
    path = out / "plan.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_results(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The results that are there, of the runs in these files."""
    paths = [out / "train" / name for name in names]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def trained_weights(out: Path) -> dict[str, Path]:
    """Weights by name of the model: those of the first seed, after the budget or else after the same epochs."""
    groups = (read_plan(out) or {"groups": {}})["groups"]
    found = {}
    for group in reversed(GROUPS):
        for name, files in groups.get(group, {}).items():
            path = (out / "train" / files[0]).with_suffix(".weights")
            if path.exists():
                found[name] = path
    return found
