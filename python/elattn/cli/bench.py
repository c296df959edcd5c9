"""`elattn bench`: a quick look at this machine; `make bench` of the repository measures with care."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import elattn
from elattn.cli.model import model_config
from elattn.models import ELATransformer
from elattn.models.state import kv_cache_bytes, state_bytes
from elattn.train import load_model, select_device

__all__ = ["bench"]

_HEADS, _HEAD_DIM = 4, 64
_SECONDS = 0.3  # of each measurement


def bench(
    run: Annotated[Path | None, typer.Argument(help="Folder of a training run or of a saved model.")] = None,
    preset: Annotated[str | None, typer.Option(help="Without a run: the shape to decode with, as in train.")] = None,
    lengths: Annotated[list[int], typer.Option("--length", min=1, help="Tokens; may be given several times.")] = [  # noqa: B006
        512,
        2048,
        8192,
    ],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what is there.")] = None,
) -> None:
    """Measure attention beside scaled_dot_product_attention, and the decode of a model."""
    target = select_device(device)
    console = Console(highlight=False)
    model = load_model(run) if run is not None else ELATransformer(model_config({}, preset, None))
    model = model.to(target).eval()

    table = Table(title=f"causal attention, {_HEADS} heads of {_HEAD_DIM}, tokens/s", title_justify="left")
    for heading in ("tokens", "elattn forward", "softmax", "elattn with gradient", "softmax"):
        table.add_column(heading, justify="right")
    for length in lengths:
        q, k, v = (torch.randn(1, _HEADS, length, _HEAD_DIM, device=target, requires_grad=True) for _ in range(3))
        ours = lambda: elattn.attention(q, k, v, is_causal=True)  # noqa: B023, E731
        theirs = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: B023, E731
        with torch.no_grad():
            rates = [length / _seconds(call, target) for call in (ours, theirs)]
        for call in (ours, theirs):
            rates.append(length / _seconds(lambda: torch.autograd.grad(call().sum(), (q, k, v)), target))  # noqa: B023
        table.add_row(f"{length:,}", *(f"{rate:,.0f}" for rate in rates))
    console.print(table)

    name = str(run) if run is not None else f"preset {preset or 'demo'}, untrained"
    table = Table(title=f"decode of {name}", title_justify="left")
    for heading in ("after tokens", "tokens/s", "state bytes", "KV cache of softmax"):
        table.add_column(heading, justify="right")
    for length in lengths:
        rate, size = _decode(model, length, target)
        table.add_row(f"{length:,}", f"{rate:,.0f}", f"{size:,}", f"{kv_cache_bytes(model.config, length):,}")
    console.print(table)


@torch.no_grad()
def _decode(model: ELATransformer, length: int, device: torch.device) -> tuple[float, int]:
    """Tokens/s after `length` tokens, and the size of what the model then remembers."""
    steps = 10_000  # more than fit into the time
    ids = torch.randint(model.config.vocab_size, (1, length), device=device)
    _, state = model._prefill_hidden(ids, model.new_state(1, length + steps), None)
    token = ids[:, 0]
    rate = 1 / _seconds(lambda: model.step(token, state), device, most=steps)
    return rate, state_bytes(state, length)


def _seconds(call: Callable[[], object], device: torch.device, most: int = 1000) -> float:
    """Median time of a call."""
    times: list[float] = []
    call()
    while len(times) < most and (len(times) < 3 or sum(times) < _SECONDS):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
