"""The training loop of the detector (docs/detection.md)."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from elattn._files import make_folder, write_file
from elattn.detect.augment import Augment
from elattn.detect.average import Average
from elattn.detect.batches import DetectionBatches
from elattn.detect.config import DetectConfig
from elattn.detect.data import load_data
from elattn.detect.detector import Detector, load_detector, save_detector
from elattn.detect.evaluate import Evaluation, evaluate
from elattn.detect.images import BadImage
from elattn.detect.loss import Losses, detection_loss
from elattn.detect.plot import plot_run
from elattn.errors import UserError
from elattn.models import YoloLat
from elattn.train.checkpoint import clear_run, read_training, restore, save_training
from elattn.train.interrupt import Interrupted, catch_interrupt
from elattn.train.processes import select_device

__all__ = ["DetectResult", "train_detector"]

# Options that may differ when a run is resumed: where things are, not what is computed.
_FREE = ("data", "device")
# What a checkpoint says of a run.
_PROGRESS = ("epoch", "best", "log", "done", "seconds", "sums")


@dataclass(frozen=True)
class DetectResult:
    """What came out.

    Attributes:
        best: average precision of the best checkpoint on the validation split.
        last: the last evaluation there.
        log: the entries of log.jsonl.
        skipped: images that could not be read, with the reason.
    """

    best: float
    last: Evaluation
    log: list[dict[str, Any]]
    skipped: list[BadImage]


def train_detector(
    config: DetectConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    plot: bool = True,
) -> DetectResult:
    """Trains a detector and leaves in `out` the best and the last checkpoint, log.jsonl and pictures of the run.

    Checkpoints hold averaged weights. A run that was interrupted goes on with `resume=True` and the same
    configuration, and ends with the same bits as if nothing had happened (on the same machine with as many threads).

    Args:
        console: for the progress; None prints nothing.
        plot: draw the pictures.

    Raises:
        UserError: the data or the checkpoint is not usable, and nothing was overwritten; or the loss is not finite.
        Interrupted: by Ctrl-C.
    """
    run = _Run(config, Path(out), console or Console(quiet=True), plot)
    run.prepare(resume, overwrite)
    return run.go()


class _Run:
    """One call of `train_detector`."""

    def __init__(self, config: DetectConfig, out: Path, console: Console, plot: bool) -> None:
        self.config, self.out, self.console, self.plot = config, out, console, plot
        self.epoch, self.best = 0, -1.0  # whole epochs
        self.log: list[dict[str, Any]] = []
        # Of the epoch under way: updates, seconds, and the sum of each loss.
        self.done, self.seconds, self.sums = 0, 0.0, [0.0] * len(Losses._fields)

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Reads data and checkpoint. What is in `out` is replaced only when nothing was found to be wrong."""
        config = self.config
        if self.out.exists() and any(self.out.iterdir()) and not (resume or overwrite):
            raise UserError(
                f"{self.out} exists already: continue with --resume, replace with --overwrite, or choose another --out"
            )
        device = select_device(config.device)
        train = load_data(config.data, "train")
        self.held_out = load_data(config.data, "val", classes=train.classes)
        self.classes = train.classes
        self.batches = DetectionBatches(train, config.batch_size, config.seed, _augment(config))
        # With images that cannot be read, the last updates of an epoch are none.
        self.updates = math.ceil(len(train) / config.batch_size)
        torch.manual_seed(config.seed)
        options = {"variant": config.variant, "neck": config.neck, "position": config.position}
        self.model = YoloLat(len(train.classes), **options).to(device, memory_format=torch.channels_last)
        self.average = Average(self.model, YoloLat(len(train.classes), **options).to(device), config.ema)
        self.optimizer = _optimizer(self.model, config)
        if resume:
            progress, tensors = read_training(self.out / "last")
            _check_same_run(progress["config"], dataclasses.asdict(config))
            restore(tensors, self.model, self.optimizer)
            self.average.model.load_state_dict(load_detector(self.out / "last").model.state_dict())
            self.average.updates = progress["updates"]
            for name in _PROGRESS:
                setattr(self, name, progress[name])
        elif self.out.exists() and any(self.out.iterdir()):
            clear_run(self.out)
        make_folder(self.out)
        self.console.print(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {len(train):,} images to train on, "
            f"{len(self.held_out):,} for validation, {len(self.classes)} classes",
            soft_wrap=True,
        )

    def go(self) -> DetectResult:
        """All epochs that are left."""
        config, images = self.config, len(self.batches.data)
        evaluation: Evaluation | None = None
        with _progress(self.console) as bar, catch_interrupt() as interrupted:
            task = bar.add_task("", total=config.epochs * images, loss="-", ap="-")
            while self.epoch < config.epochs:
                bar.update(task, completed=self.epoch * images + self.done * config.batch_size)
                for loss, size in self._train_epoch():
                    bar.update(task, advance=size, loss=f"{loss:.2f}")
                    if interrupted.is_set():
                        self._checkpoint()
                        raise Interrupted(self.average.updates, self.out)
                entry = self._end_epoch()
                if self.epoch % config.eval_every == 0 or self.epoch == config.epochs:
                    evaluation = self._evaluate()
                    entry |= {name: getattr(evaluation, name) for name in ("ap", "ap50", "ap75")}
                    bar.update(task, ap=f"{evaluation.ap:.3f}")
                    bar.console.print(
                        f"epoch {self.epoch:>3}  loss {entry['total']:.3f}  AP {evaluation.ap:.3f}  "
                        f"AP50 {evaluation.ap50:.3f}"
                    )
                    if evaluation.ap > self.best:
                        self.best = evaluation.ap
                        save_detector(self._detector(), self.out / "best")
                self._checkpoint()
        if evaluation is None:  # resumed when nothing was left
            evaluation = self._evaluate()
        if self.plot:
            plot_run(self.log, evaluation, self.held_out, self._detector(), self.out)
        return DetectResult(self.best, evaluation, self.log, self.batches.skipped)

    def _train_epoch(self) -> Iterator[tuple[float, int]]:
        """The updates that are left in an epoch; yields the loss of each and the number of its images."""
        config, device = self.config, next(self.model.parameters()).device
        self.model.train()
        for batch in itertools.islice(self.batches.epoch(self.epoch, config.size_in(self.epoch)), self.done, None):
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(self.epoch * self.updates + self.done)
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                raw = self.model(batch.images)
            losses = detection_loss(raw, batch.boxes, batch.labels, self.model.stride)
            losses.total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            values = torch.stack(losses).tolist()
            if not math.isfinite(values[0]):
                raise UserError(f"the loss is {values[0]} in epoch {self.epoch + 1}: try a smaller --learning-rate")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()
            self.done += 1
            self.seconds += time.perf_counter() - began
            self.sums = [s + value for s, value in zip(self.sums, values, strict=True)]
            yield values[0], len(batch.images)

    def _end_epoch(self) -> dict[str, Any]:
        """The log's entry of the epoch."""
        self.epoch += 1
        means = [s / self.done for s in self.sums]
        entry = {
            "epoch": self.epoch,
            **dict(zip(Losses._fields, means, strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
        }
        self.log.append(entry)
        self.done, self.seconds, self.sums = 0, 0.0, [0.0] * len(Losses._fields)
        return entry

    def _learning_rate(self, update: int) -> float:
        config = self.config
        if update < config.warmup:
            return config.learning_rate * (update + 1) / config.warmup
        updates = config.epochs * self.updates
        done = (update - config.warmup) / max(updates - config.warmup, 1)
        return config.learning_rate * (0.505 + 0.495 * math.cos(math.pi * done))

    def _evaluate(self) -> Evaluation:
        return evaluate(self.average.model, self.held_out, self.config.size)

    def _detector(self) -> Detector:
        return Detector(self.average.model, self.classes, self.config.size)

    def _checkpoint(self) -> None:
        save_detector(self._detector(), self.out / "last")
        progress = {name: getattr(self, name) for name in _PROGRESS}
        progress |= {"config": dataclasses.asdict(self.config), "updates": self.average.updates}
        save_training(self.out / "last", self.model, self.optimizer, progress)
        write_file(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))


def _augment(config: DetectConfig) -> Augment | None:
    return Augment(mirror=config.mirror) if config.augment else None


def _optimizer(model: nn.Module, config: DetectConfig) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, given in now.items():
        if name not in _FREE and before.get(name) != given:
            raise UserError(
                f"the run to resume has {name} = {before.get(name)!r}, not {given!r}: give the options it began with"
            )


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("images  loss {task.fields[loss]}  AP {task.fields[ap]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=console.quiet,
    )
