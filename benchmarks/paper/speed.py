"""Part (e): a training step of ELA-GPT beside one of FA-GPT, and a mixture of experts beside one dense network."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.paper import checks, decode
from benchmarks.paper.presets import Speed
from benchmarks.paper.turns import ratio, take_turns
from elattn.models import ELATransformer
from elattn.nn import MoE, SwiGLU

EXPERTS, DENSE = "MoE", "dense"


def measure(sizes: Speed, paper_size: bool, console: Console) -> dict[str, Any]:
    result = {
        "threads": torch.get_num_threads(),
        "training": training(sizes, paper_size),
        "moe": moe(sizes, paper_size),
    }
    for row in result["training"] + result["moe"]:
        what = f"{row['model']}, batch {row['batch']}, length {row['length']}" if "model" in row else row["what"]
        console.print(
            f"{what}: {row['seconds'] * 1e3:.1f} ms, {row['ratio']:.2f}x the speed of {row['against']}", highlight=False
        )
    return result


def training(sizes: Speed, paper_size: bool) -> list[dict[str, Any]]:
    """Seconds of a step (loss, backward, AdamW) for each (batch, length)."""
    rows = []
    models = decode.build_models(paper_size)
    for batch, length in sizes.shapes:
        calls = {name: _training_step(model, batch, length) for name, model in models.items()}
        samples = take_turns(calls, sizes.rounds)
        against = samples[decode.FULL_ATTENTION]
        rows += [
            {
                "model": name,
                "batch": batch,
                "length": length,
                "seconds": min(times),
                "against": decode.FULL_ATTENTION,
                "ratio": ratio(against, times),
                "samples": times,
            }
            for name, times in samples.items()
        ]
    return rows


def _training_step(model: ELATransformer, batch: int, length: int) -> Callable[[], None]:
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True)

    def call() -> None:
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def moe(sizes: Speed, paper_size: bool) -> list[dict[str, Any]]:
    """A layer of 4 experts, top-2, beside a dense one with the hidden width of both chosen experts together."""
    d_model, d_hidden = (256, 256) if paper_size else (32, 16)
    torch.manual_seed(0)
    x = torch.randn(1, sizes.moe_tokens, d_model)
    experts, dense = MoE(d_model, d_hidden, 4, top_k=2, bias_mode="outer"), SwiGLU(d_model, 2 * d_hidden)
    # Scores as those of a trained router: at initialisation they are all but equal.
    with torch.no_grad():
        experts.labels.normal_(std=d_model**-0.5)
    checks.assert_mixes_experts(experts, x[:, :64])
    rows = []
    for mode, backward in (("forward", False), ("forward+backward", True)):
        calls = {
            EXPERTS: functools.partial(_layer, experts, x, backward),
            DENSE: functools.partial(_layer, dense, x, backward),
        }
        samples = take_turns(calls, max(10, 4 * sizes.rounds))
        for name, times in samples.items():
            rows.append(
                {
                    "what": f"{name}, {mode}, {sizes.moe_tokens:,} tokens",
                    "mode": mode,
                    "layer": name,
                    "seconds": min(times),
                    "against": DENSE,
                    "ratio": ratio(samples[DENSE], times),
                    "samples": times,
                }
            )
    return rows


def _layer(layer: nn.Module, x: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        if backward:
            y.backward(x)  # any gradient of the shape
            layer.zero_grad()
