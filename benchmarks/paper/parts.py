"""The five parts, by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.paper import decode, forms, recall, speed, text
from benchmarks.paper.jobs import Job, execute
from benchmarks.paper.presets import Preset
from elattn._files import write_file

TRAINED: dict[str, Callable[[Preset, int, Path], list[Job]]] = {
    "train": lambda sizes, seeds, folder: text.jobs(forms.TRAIN, sizes.train, seeds, folder),
    "ablate": lambda sizes, seeds, folder: text.jobs(forms.ABLATE, sizes.ablate, seeds, folder),
    "recall": lambda sizes, seeds, folder: recall.jobs(sizes.recall, seeds, folder),
}
TIMED: dict[str, Callable[[Preset, Console], dict[str, Any]]] = {
    "decode": lambda sizes, console: decode.measure(sizes.decode, sizes.paper_size, console),
    "speed": lambda sizes, console: speed.measure(sizes.speed, sizes.paper_size, console),
}
# Timed parts first: nothing of ours runs beside them.
PARTS = (*TIMED, *TRAINED)


def run(name: str, sizes: Preset, folder: Path, seeds: int, workers: int, console: Console) -> int:
    """Runs a part and returns how many of its runs failed."""
    console.print(f"[bold]{name}[/bold]")
    if name in TRAINED:
        return execute(list_jobs(name, sizes, seeds, folder), workers, console)
    facts = machine.describe()
    if facts["load"] > 0.5:
        console.print(f"[yellow]Others use this machine (load {facts['load']}): times may come out too long.[/yellow]")
    machine.keep_pages()
    torch.manual_seed(0)
    result = TIMED[name](sizes, console) | {"machine": facts}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    return 0


def list_jobs(name: str, sizes: Preset, seeds: int, folder: Path) -> list[Job]:
    return TRAINED[name](sizes, seeds, folder / name)


def trained(name: str, sizes: Preset, seeds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results that a part has, by form, in the order of seeds (and learning rates)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in list_jobs(name, sizes, seeds, folder):
        if result := job.result():
            found.setdefault(job.form, []).append(result)
    return found


def timed(name: str, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
