"""The training loop (docs/training.md)."""

import dataclasses
import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from elattn._files import write_file
from elattn.data import ByteBatches, bigram_bits_per_byte, load_text, split_text, unigram_bits_per_byte
from elattn.errors import UserError
from elattn.models import ELAConfig, ELATransformer
from elattn.train.checkpoint import clear_run, read_training, restore, save_training
from elattn.train.plot import plot_losses

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "evaluate", "train"]

_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        data: path of a text, None for Python's documentation topics.
        steps, batch_size, context: number of updates, windows per update, bytes per window.
        learning_rate, warmup: the peak, reached after `warmup` steps, from where a cosine falls to a tenth.
        weight_decay: of the matrices; norms, embeddings, convolutions and forgetting rates have none.
        clip: largest norm of the gradient.
        held_out: share of the text, its end, that only validation sees.
        eval_every: steps between validations; each also writes checkpoints.
        seed: of the initial weights and the batches.
    """

    data: str | None = None
    steps: int = 1000
    batch_size: int = 16
    context: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    held_out: float = 0.1
    eval_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "learning_rate", "clip", "eval_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TrainConfig: {name} must be positive (got {getattr(self, name)})")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainConfig: {name} must not be negative (got {getattr(self, name)})")
        if not 0 < self.held_out < 1:
            raise ValueError(f"TrainConfig: held_out must lie between 0 and 1 (got {self.held_out})")


@dataclass(frozen=True)
class TrainResult:
    """Bits per byte on the held-out text, of the best checkpoint and of the byte models; and the speed."""

    bits_per_byte: float
    unigram: float
    bigram: float
    tokens_per_second: float


class Interrupted(Exception):
    """Training was stopped by Ctrl-C, after a checkpoint was written."""

    def __init__(self, step: int, out: Path) -> None:
        super().__init__(f"stopped after step {step}; {out / 'last'} holds everything needed to go on")
        self.step, self.out = step, out


def train(
    model_config: ELAConfig,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains a model and leaves in `out` the best and the last checkpoint, log.jsonl and loss.png.

    A run that was interrupted goes on with `resume=True` and the same arguments, and ends with the same bits as if
    nothing had happened (on the same machine with as many threads).

    Raises:
        UserError: the text, the folder or the checkpoint is not usable; nothing was overwritten.
        Interrupted: by Ctrl-C.
    """
    out, console = Path(out), console or Console()
    text = load_text(config.data)
    data, held_out = split_text(text, config.held_out)
    batches = ByteBatches(data, config.batch_size, config.context, config.seed)
    if held_out.numel() <= config.context:
        raise UserError(
            f"{held_out.numel()} bytes are held out for validation, but one window needs {config.context + 1}: "
            "give a longer text or a shorter context"
        )
    unigram, bigram = unigram_bits_per_byte(data, held_out[1:]), bigram_bits_per_byte(data, held_out)
    identity = {
        "model": dataclasses.asdict(model_config),
        "training": dataclasses.asdict(config),
        "text_crc32": zlib.crc32(text.numpy().tobytes()),
    }

    torch.manual_seed(config.seed)
    model = ELATransformer(model_config)
    optimizer = _optimizer(model, config)
    step, best, seconds = 0, math.inf, 0.0
    log: list[dict[str, Any]] = []
    recent: list[float] = []  # losses that the log does not have yet
    if resume:
        progress, tensors = read_training(out / "last")
        _check_same_run(progress["identity"], identity)
        restore(tensors, model, optimizer)
        step, best, seconds, recent = (progress[name] for name in ("step", "best", "seconds", "recent"))
        log = [entry for entry in _read_log(out / "log.jsonl") if entry["step"] <= step]
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(
                f"{out} exists already: continue with --resume, replace with --overwrite, or choose another --out"
            )
        clear_run(out)
    _make_folder(out)
    _write_log(out / "log.jsonl", log)

    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"{size:,} parameters, {data.numel():,} bytes to train on, {held_out.numel():,} held out "
        f"(bits per byte there: unigram {unigram:.3f}, bigram {bigram:.3f})",
        soft_wrap=True,
    )

    def checkpoint(bits_per_byte: float | None) -> None:
        nonlocal best
        if bits_per_byte is not None and bits_per_byte < best:
            best = bits_per_byte
            model.save_pretrained(out / "best")
        model.save_pretrained(out / "last")
        progress = {"identity": identity, "step": step, "best": best, "seconds": seconds, "recent": recent}
        save_training(out / "last", model, optimizer, progress)
        _write_log(out / "log.jsonl", log)
        plot_losses(log, out / "loss.png", unigram=unigram, bigram=bigram)

    with _progress(console) as bar, _catch_interrupt() as interrupted:
        task = bar.add_task("", total=config.steps, completed=step, loss="-", bits="-", rate="-")
        while step < config.steps:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, config)
            loss = model.loss(*batches[step])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds += time.perf_counter() - began
            recent.append(loss.item())

            rate = step * config.batch_size * config.context / seconds
            bar.update(task, completed=step, loss=f"{recent[-1]:.3f}", rate=f"{rate:,.0f}")
            evaluating = step % config.eval_every == 0 or step == config.steps
            if step % _LOG_EVERY == 0 or evaluating:
                mean = sum(recent) / len(recent)
                if not math.isfinite(mean):
                    raise UserError(f"the loss is {mean} at step {step}: try a smaller --learning-rate")
                recent.clear()
                log.append({"step": step, "loss": mean, "tokens_per_second": rate})
            if evaluating:
                bits = evaluate(model, held_out, config.context) / math.log(2)
                log[-1]["bits_per_byte"] = bits
                checkpoint(bits)
                bar.update(task, bits=f"{bits:.3f}")
                bar.console.print(f"step {step:>5}  training loss {mean:.3f}  held-out bits per byte {bits:.3f}")
            if interrupted.is_set() and step < config.steps:
                checkpoint(None)
                raise Interrupted(step, out)
    return TrainResult(best, unigram, bigram, config.steps * config.batch_size * config.context / seconds)


@torch.no_grad()
def evaluate(model: ELATransformer, data: Tensor, context: int, batch_size: int = 16) -> float:
    """Mean loss in nats over all bytes of `data` (N,) uint8 but the first, seen through windows of `context` bytes."""
    data = data.long()
    count = (data.numel() - 1) // context
    inputs, targets = (x[: count * context].reshape(count, context) for x in (data[:-1], data[1:]))
    parts = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    if data.numel() - 1 > count * context:  # the rest, in a shorter window
        parts.append((data[None, count * context : -1], data[None, count * context + 1 :]))
    total = sum(float(model.loss(x, y)) * y.numel() for x, y in parts)
    return total / (data.numel() - 1)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if p in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def _check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    for part in ("model", "training"):
        for name in now[part]:
            was, given = before[part].get(name), now[part][name]
            if was != given:
                raise UserError(
                    f"the run to resume has {name} = {was!r}, not {given!r}: give the options it began with"
                )
    if before["text_crc32"] != now["text_crc32"]:
        raise UserError("the text has changed since the run to resume began; start again with --overwrite")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []  # a history of no consequence for the training


def _write_log(path: Path, log: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(entry) + "\n" for entry in log))


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=10),  # the line fits 80 columns
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  held out {task.fields[bits]}  {task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that no step is left half done; a second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
