"""The training loop (docs/training.md)."""

import dataclasses
import json
import math
import shutil
import statistics
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elattn._files import make_folder, write_file
from elattn.data import Batches, Corpus, Source, Tokenizer, load_corpus, load_tokenizer, save_tokenizer
from elattn.errors import UserError
from elattn.models import ELAConfig, ELATransformer
from elattn.train.checkpoint import check_run, clear_run, read_training, restore, save_training
from elattn.train.config import TrainConfig
from elattn.train.evaluate import Evaluation, evaluate
from elattn.train.interrupt import Interrupted, catch_interrupt
from elattn.train.plot import plot_losses
from elattn.train.processes import Processes, join_processes

__all__ = ["TrainResult", "train"]

_LOG_EVERY = 10
# Options that may differ when a run is resumed: where things are, not what is computed.
_FREE = ("data", "tokenizer", "device", "compile")


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        bits_per_byte: of the best checkpoint, on the documents held out.
        unigram, bigram: of the byte models, there.
        tokens_per_second: median of the log.
        log: the entries of log.jsonl.
    """

    bits_per_byte: float
    unigram: float
    bigram: float
    tokens_per_second: float
    log: list[dict[str, Any]]


def train(
    model_config: ELAConfig,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cache: str | Path | None = None,
    console: Console | None = None,
    plot: bool = True,
) -> TrainResult:
    """Trains a model and leaves in `out` the best and the last checkpoint, log.jsonl and loss.png.

    A run that was interrupted goes on with `resume=True` and the same arguments, and ends with the same bits as if
    nothing had happened (on the same machine with as many threads).

    Under torchrun each process takes its share of the windows, and the weights are those that one process with
    `batch_size` times as many windows would find, up to the rounding of sums (and the balance loss of experts, which
    each process forms of its own tokens).

    Args:
        cache: folder of token files, which runs may share; by default `out`/cache.
        console: for the progress; None prints nothing.
        plot: draw loss.png.

    Raises:
        UserError: the text, the folder or the checkpoint is not usable, and nothing was overwritten; or the loss is
            not finite, and the last checkpoint is that of the validation before.
        Interrupted: by Ctrl-C.
    """
    with join_processes(config.device) as processes:
        if console is None or not processes.first:
            console = Console(quiet=True)
        run = _Run(model_config, config, Path(out), processes, console, plot)
        run.prepare(resume, overwrite, None if cache is None else Path(cache))
        return run.go()


class _Run:
    """One call of `train`, in one process."""

    def __init__(
        self,
        model_config: ELAConfig,
        config: TrainConfig,
        out: Path,
        processes: Processes,
        console: Console,
        plot: bool,
    ) -> None:
        self.model_config, self.config, self.out = model_config, config, out
        self.processes, self.console, self.plot = processes, console, plot
        self.step, self.best = 0, math.inf
        self.log: list[dict[str, Any]] = []
        # Loss, gradient norm and seconds of the updates that the log does not have yet.
        self.recent: list[list[float]] = []

    def prepare(self, resume: bool, overwrite: bool, cache: Path | None) -> None:
        """Reads text and checkpoint. What is in `out` is replaced only when nothing was found to be wrong."""
        config, existed = self.config, self.out.exists()
        try:
            self.corpus = self.processes.one_after_first(lambda: self._load(resume, overwrite, cache))
        except BaseException:
            if self.processes.first and not existed:
                shutil.rmtree(self.out, ignore_errors=True)  # nothing but the cache can be in it
            raise
        rows = config.batch_size * config.accumulate * self.processes.size
        self.batches = Batches(self.corpus.train, rows, config.context, config.seed)

        torch.manual_seed(config.seed)
        self.model = ELATransformer(self.model_config).to(self.processes.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
        )
        if resume:
            progress, tensors = self.checkpoint
            restore(tensors, self.model, self.optimizer)
            self.step, self.best, self.recent = (progress[name] for name in ("step", "best", "recent"))
            self.log = [entry for entry in _read_log(self.out / "log.jsonl") if entry["step"] <= self.step]
        self.processes.one_after_first(lambda: self._begin(overwrite))

    def _load(self, resume: bool, overwrite: bool, cache: Path | None) -> Corpus:
        config = self.config
        if self.processes.first and not resume and _holds_something(self.out):
            if not overwrite:
                raise UserError(
                    f"{self.out} exists already: continue with --resume, replace with --overwrite, or choose another "
                    "--out"
                )
            check_run(self.out)
        most, layers = self.model_config.max_seq_len, range(self.model_config.num_layers)
        if most is not None and most < config.context and any(map(self.model_config.is_softmax, layers)):
            raise UserError(
                f"windows of {config.context} tokens are longer than max_seq_len = {most} of softmax layers"
            )
        source = Source(None if config.data is None else Path(config.data), config.field)
        self.identity = {
            "model": dataclasses.asdict(self.model_config),
            "training": {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE},
            "processes": self.processes.size,
            "text": source.digest,
        }
        if resume:
            self.checkpoint = read_training(self.out / "last")
            _check_same_run(self.checkpoint[0]["identity"], self.identity)
        tokenizer: Tokenizer | None = None
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
        elif resume and config.vocab_size is not None:
            tokenizer = load_tokenizer(self.out)
        corpus = load_corpus(
            source,
            held_out=config.held_out,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            cache=cache or self.out / "cache",
        )
        self.identity["tokenizer"] = corpus.tokenizer.digest
        if resume and self.checkpoint[0]["identity"]["tokenizer"] != corpus.tokenizer.digest:
            raise UserError("the run to resume has another tokenizer: give the one it began with")
        try:
            self.model_config.require_vocabulary(corpus.tokenizer.vocab_size)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name, part in (("to train on", corpus.train), ("held out for validation", corpus.held_out)):
            if part.tokens.size <= config.context:
                raise UserError(
                    f"the text has {part.tokens.size} tokens {name}, but one window needs {config.context + 1}: give a "
                    "longer text or a shorter context"
                )
        return corpus

    def _begin(self, overwrite: bool) -> None:
        if not self.processes.first:
            return
        if overwrite and _holds_something(self.out):
            clear_run(self.out)
        make_folder(self.out)
        save_tokenizer(self.corpus.tokenizer, self.out)
        _write_log(self.out / "log.jsonl", self.log)
        corpus = self.corpus
        self.console.print(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {corpus.train.tokens.size:,} tokens to "
            f"train on, {corpus.held_out.tokens.size:,} held out (bits per byte there: unigram {corpus.unigram:.3f}, "
            f"bigram {corpus.bigram:.3f})",
            soft_wrap=True,
        )

    def go(self) -> TrainResult:
        """All updates that are left."""
        config = self.config
        loss: nn.Module = _Loss(self.model)
        if config.compile:
            loss = torch.compile(loss)  # type: ignore[assignment]
        if self.processes.size > 1:
            loss = DistributedDataParallel(loss)
        tokens = self.batches.rows * config.context  # of an update
        with _progress(self.console) as bar, catch_interrupt() as interrupted:
            task = bar.add_task("", total=config.steps, completed=self.step, loss="-", norm="-", bits="-", rate="-")
            while self.step < config.steps:
                stop = self._update(loss, interrupted)
                bar.update(
                    task,
                    completed=self.step,
                    loss=f"{self.recent[-1][0]:.3f}",
                    norm=f"{self.recent[-1][1]:.2f}",
                    rate=f"{tokens * len(self.recent) / sum(seconds for *_, seconds in self.recent):,.0f}",
                )
                evaluating = self.step % config.eval_every == 0 or self.step == config.steps
                if self.step % _LOG_EVERY == 0 or evaluating:
                    entry = self._entry(tokens)
                    if evaluating:
                        result = self._evaluate(entry)
                        bar.update(task, bits=f"{result.bits_per_byte:.3f}")
                        bar.console.print(
                            f"step {self.step:>5}  training loss {entry['loss']:.3f}  held-out bits per byte "
                            f"{result.bits_per_byte:.3f}"
                        )
                    self.log.append(entry)
                    if self.processes.first:
                        with (self.out / "log.jsonl").open("a") as file:
                            file.write(json.dumps(entry) + "\n")
                        if evaluating:
                            self._checkpoint(entry["bits_per_byte"])
                if stop and self.step < config.steps:
                    if self.processes.first:
                        self._checkpoint(None)
                    raise Interrupted(self.step, self.out)
        corpus = self.corpus
        rate = statistics.median(entry["tokens_per_second"] for entry in self.log)
        return TrainResult(self.best, corpus.unigram, corpus.bigram, rate, self.log)

    def _update(self, loss: nn.Module, interrupted: threading.Event) -> bool:
        """One update of the weights; whether a process was interrupted."""
        began = time.perf_counter()
        config, processes = self.config, self.processes
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(self.step, config)
        starts = self.batches.starts(self.step)
        total = self.corpus.train.count_targets(starts, config.context)
        parts = starts[processes.rank :: processes.size].reshape(config.accumulate, config.batch_size)
        value = 0.0
        for i, part in enumerate(parts):
            batch = self.batches.take(part).to(processes.device)
            waiting = i + 1 < config.accumulate and isinstance(loss, DistributedDataParallel)
            with loss.no_sync() if waiting else nullcontext():  # type: ignore[operator]
                with self._autocast():
                    mean = loss(batch.ids, batch.targets, batch.cu_seqlens)
                # The mean over all targets of the update; DistributedDataParallel divides by the number of processes.
                share = mean * (batch.count * processes.size / total)
                share.backward()
            value += float(share.detach()) / processes.size
        value, stop = processes.sum(value, float(interrupted.is_set()))
        self.step += 1
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {self.step}: try a smaller --learning-rate")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recent.append([value, float(norm), time.perf_counter() - began])
        return stop > 0

    def _entry(self, tokens: int) -> dict[str, Any]:
        """The log's entry of the recent updates."""
        loss, norm, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        count = len(self.recent)
        self.recent = []
        return {
            "step": self.step,
            "loss": loss / count,
            "grad_norm": norm / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens * count / seconds,
        }

    def _evaluate(self, entry: dict[str, Any]) -> Evaluation:
        result = evaluate(
            self.model,
            self.corpus.held_out,
            self.config.context,
            self.config.batch_size,
            processes=self.processes,
            autocast=self._autocast,
        )
        entry["bits_per_byte"] = result.bits_per_byte
        if result.aux is not None:
            entry["aux"] = result.aux
        return result

    def _checkpoint(self, bits_per_byte: float | None) -> None:
        if bits_per_byte is not None and bits_per_byte < self.best:
            self.best = bits_per_byte
            self._save(self.out / "best")
        self._save(self.out / "last")
        progress = {"identity": self.identity, "step": self.step, "best": self.best}
        save_training(self.out / "last", self.model, self.optimizer, progress | {"recent": self.recent})
        if self.plot:
            corpus = self.corpus
            bytes_per_token = corpus.train.predicted_bytes / corpus.train.predicted_tokens
            plot_losses(
                self.log,
                self.out / "loss.png",
                unigram=corpus.unigram,
                bigram=corpus.bigram,
                bytes_per_token=bytes_per_token,
            )

    def _save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        save_tokenizer(self.corpus.tokenizer, folder)

    def _autocast(self) -> AbstractContextManager[object]:
        on = self.config.precision == "bfloat16"
        return torch.autocast(self.processes.device.type, torch.bfloat16) if on else nullcontext()


class _Loss(nn.Module):
    """`ELATransformer.loss` as a forward, which is what torch.compile and DistributedDataParallel take."""

    def __init__(self, model: ELATransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self.model.loss(ids, targets, cu_seqlens)


def _learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def _holds_something(out: Path) -> bool:
    """Whether there is something else than the token cache of a start that did not get further."""
    return out.exists() and (not out.is_dir() or any(path.name != "cache" for path in out.iterdir()))


def _check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    for part in ("model", "training"):
        for name in now[part]:
            was, given = before[part].get(name), now[part][name]
            if was != given:
                raise UserError(
                    f"the run to resume has {name} = {was!r}, not {given!r}: give the options it began with"
                )
    if before["processes"] != now["processes"]:
        raise UserError(f"the run to resume has {before['processes']} processes, not {now['processes']}")
    if before["text"] != now["text"]:
        raise UserError("the text has changed since the run to resume began; start again with --overwrite")


def _read_log(path: Path) -> list[dict[str, Any]]:
    log = []
    try:
        for line in path.read_text().splitlines():
            log.append(json.loads(line))
    except (OSError, ValueError):
        pass  # a history of no consequence for the training, whose last line may be cut short
    return log


def _write_log(path: Path, log: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(entry) + "\n" for entry in log))


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=10),  # the line fits 80 columns
        MofNCompleteColumn(),
        TextColumn(
            "loss {task.fields[loss]} norm {task.fields[norm]} held out {task.fields[bits]} {task.fields[rate]} tok/s"
        ),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=console.quiet,
    )
