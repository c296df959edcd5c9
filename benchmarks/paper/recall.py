"""Part (d): multi-query associative recall, as linear attention models are tested with (Arora et al. 2023, "Zoology").

A sequence states pairs of key and value, then asks for the value of every key again, at random distances of which short
ones are likelier. Keys are the lower half of the vocabulary, values the upper; token 0 fills what is between. A model
sees all numbers of pairs in training, one in each batch, after a first while with the fewest.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper import forms
from benchmarks.paper.jobs import Job
from benchmarks.paper.presets import Recall
from elattn.models import ELAConfig, ELATransformer
from elattn.testing import assert_causal, assert_mixes_tokens

POWER = 0.01  # of the distribution of distances: density POWER * x^(POWER - 1)


def length(pairs: int) -> int:
    """Tokens of a sequence: half for the pairs, half for the questions."""
    return max(4 * pairs, 64)


def make_batch(pairs: int, batch: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, length(pairs)) int64; a target is -100 but where a key is asked for."""
    generator = torch.Generator().manual_seed(seed)
    total, half = length(pairs), vocab_size // 2

    def choose(weights: Tensor) -> Tensor:
        """`pairs` different columns for each sequence, (batch, pairs)."""
        return torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)

    keys = 1 + choose(torch.ones(half - 1))
    values = half + choose(torch.ones(vocab_size - half))
    ids = torch.zeros(batch, total, dtype=torch.long)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    slots = (total - 2 * pairs) // 2
    distance = torch.arange(1, slots + 1, dtype=torch.float64)
    place = 2 * pairs + 2 * choose(distance ** (POWER - 1))
    ids.scatter_(1, place, keys)
    targets = torch.full_like(ids, -100).scatter_(1, place, values)
    return ids, targets


def jobs(sizes: Recall, seeds: int, folder: Path) -> list[Job]:
    """One for each seed, learning rate and form."""
    models = {form.name: dataclasses.asdict(forms.config(form, sizes, sizes.vocab_size)) for form in forms.RECALL}
    task = {
        name: getattr(sizes, name)
        for name in (
            "vocab_size",
            "pairs",
            "easy_steps",
            "steps",
            "tokens",
            "eval_every",
            "eval_sequences",
            "warmup",
            "enough",
        )
    }
    return [
        Job(
            folder / f"{name}-rate{rate:g}-seed{seed}.json",
            name,
            seed,
            {"model": model, "task": task, "learning_rate": rate, "seed": seed},
            train_one,
        )
        for seed in range(seeds)
        for rate in sizes.learning_rates
        for name, model in models.items()
    ]


def train_one(model: dict[str, Any], task: dict[str, Any], learning_rate: float, seed: int) -> dict[str, Any]:
    """Trains until every number of pairs is recalled well enough, or for the steps of the task."""
    torch.manual_seed(seed)
    net = ELATransformer(ELAConfig(**model))
    optimizer = torch.optim.AdamW(net.parameter_groups(0.1), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    curve, step, reached = [], 0, {}
    began = time.perf_counter()
    while step < task["steps"] and not (reached and min(reached.values()) >= task["enough"]):
        warm = min((step + 1) / task["warmup"], 1.0)
        # Falls linearly to a tenth, so that the last evaluation is of a settled model.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (1 - 0.9 * step / task["steps"])
        pairs = task["pairs"][0 if step < task["easy_steps"] else step % len(task["pairs"])]
        batch = max(1, task["tokens"] // length(pairs))
        loss = net.loss(*make_batch(pairs, batch, task["vocab_size"], (seed + 1) * 1_000_003 + step))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % task["eval_every"] == 0 or step == task["steps"]:
            reached = {str(n): accuracy(net, n, task) for n in task["pairs"]}
            curve.append((step, float(loss.detach()), reached))
    ids, _ = make_batch(task["pairs"][0], 1, task["vocab_size"], 0)
    assert_causal(net, ids)
    assert_mixes_tokens(net, ids)
    return {
        "summary": " ".join(f"{n}: {share:.0%}" for n, share in reached.items()) + f" in {step} steps",
        "accuracy": reached,
        "steps": step,
        "curve": curve,
        "parameters": sum(p.numel() for p in net.parameters()),
        "training_seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def accuracy(model: ELATransformer, pairs: int, task: dict[str, Any]) -> float:
    """Share of questions answered rightly, on sequences that training never draws (their seed is negative)."""
    ids, targets = make_batch(pairs, task["eval_sequences"], task["vocab_size"], -pairs)
    asked = targets != -100
    return float((model(ids).argmax(-1)[asked] == targets[asked]).double().mean())
