"""Parts (a) and (b): byte-level language models of equal size, trained alike on the same text."""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import forms
from benchmarks.paper.forms import Form
from benchmarks.paper.jobs import Job
from benchmarks.paper.presets import Text
from elattn.models import ELAConfig
from elattn.testing import assert_causal, assert_mixes_tokens
from elattn.train import TrainConfig, load_model, train

VOCAB_SIZE = 256


def jobs(compared: list[Form], sizes: Text, seeds: int, folder: Path) -> list[Job]:
    """One for each seed and form; those of a seed come together, so that a run cut short compares all forms."""
    training = {
        name: getattr(sizes, name)
        for name in ("steps", "batch_size", "context", "eval_every", "held_out", "learning_rate", "warmup")
    }
    models = {form.name: dataclasses.asdict(forms.config(form, sizes, VOCAB_SIZE)) for form in compared}
    return [
        Job(
            folder / f"{name}-seed{seed}.json",
            name,
            seed,
            {"model": model, "training": training | {"seed": seed}},
            train_one,
        )
        for seed in range(seeds)
        for name, model in models.items()
    ]


def train_one(model: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Trains, then checks that the trained model is causal and mixes tokens: a leak would fake a low loss."""
    config = TrainConfig(**training)
    with tempfile.TemporaryDirectory() as folder:
        result = train(ELAConfig(**model), config, Path(folder) / "run", plot=False)
        trained = load_model(Path(folder) / "run")
    sample = torch.randint(VOCAB_SIZE, (1, min(64, config.context)), generator=torch.Generator().manual_seed(0))
    assert_causal(trained, sample)
    assert_mixes_tokens(trained, sample)
    validation = [(e["step"], e["bits_per_byte"] * math.log(2)) for e in result.log if "bits_per_byte" in e]
    nats = validation[-1][1]
    return {
        "summary": f"{nats:.3f} nats",
        "nats": nats,
        "training": [(entry["step"], entry["loss"]) for entry in result.log],
        "validation": validation,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "tokens_per_second": result.tokens_per_second,
        "bigram_nats": result.bigram * math.log(2),
    }
