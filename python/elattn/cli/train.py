"""`elattn train`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from elattn.cli.model import ModelOptions, model_config
from elattn.errors import UserError
from elattn.train import TrainConfig
from elattn.train import train as run_training
from elattn.train.processes import is_first

__all__ = ["train"]

_DEFAULT = TrainConfig()


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    data: Annotated[
        Path | None, _option("Data", "Text, folder or JSON-lines; by default Python's documentation topics.")
    ] = None,
    text_field: Annotated[str, _option("Data", "Name of the text in JSON-lines.")] = _DEFAULT.field,
    tokenizer: Annotated[Path | None, _option("Data", "A tokenizer.json; by default tokens are bytes.")] = None,
    vocab_size: Annotated[int | None, _option("Data", "Train a byte-level BPE of so many tokens.")] = None,
    held_out: Annotated[float, _option("Data", "Share of the text, its end, for validation.")] = _DEFAULT.held_out,
    cache: Annotated[Path | None, _option("Data", "Folder of token files; by default in --out.")] = None,
    steps: Annotated[int, _option("Training", "Updates of the weights.")] = _DEFAULT.steps,
    batch_size: Annotated[int, _option("Training", "Windows per forward pass and process.")] = _DEFAULT.batch_size,
    accumulate: Annotated[int, _option("Training", "Forward passes per update.")] = _DEFAULT.accumulate,
    context: Annotated[int, _option("Training", "Tokens per window.")] = _DEFAULT.context,
    learning_rate: Annotated[float, _option("Training", "Peak; a cosine follows.")] = _DEFAULT.learning_rate,
    warmup: Annotated[int, _option("Training", "Steps to the peak.")] = _DEFAULT.warmup,
    weight_decay: Annotated[float, _option("Training", "Of the matrices.")] = _DEFAULT.weight_decay,
    clip: Annotated[float, _option("Training", "Largest norm of the gradient.")] = _DEFAULT.clip,
    eval_every: Annotated[int, _option("Training", "Steps between validations and checkpoints.")] = _DEFAULT.eval_every,
    seed: Annotated[int, _option("Training", "Of weights and batches.")] = _DEFAULT.seed,
    device: Annotated[str | None, _option("Machine", "cpu or cuda; by default what is there.")] = None,
    precision: Annotated[str, _option("Machine", "float32, or bfloat16 autocast.")] = _DEFAULT.precision,
    compile: Annotated[bool, _option("Machine", "Use torch.compile.", "--compile")] = False,
    preset: ModelOptions.preset = None,
    config: ModelOptions.config = None,
    d_model: ModelOptions.d_model = None,
    layers: ModelOptions.layers = None,
    heads: ModelOptions.heads = None,
    kv_heads: ModelOptions.kv_heads = None,
    d_hidden: ModelOptions.d_hidden = None,
    experts: ModelOptions.experts = None,
    top_k: ModelOptions.top_k = None,
    moe_bias: ModelOptions.moe_bias = None,
    tie_labels: ModelOptions.tie_labels = None,
    aux_coef: ModelOptions.aux_coef = None,
    attention: ModelOptions.attention = None,
    full_attention_every: ModelOptions.full_attention_every = None,
    kernel: ModelOptions.kernel = None,
    decay: ModelOptions.decay = None,
    short_conv: ModelOptions.short_conv = None,
    gate: ModelOptions.gate = None,
    rotary: ModelOptions.rotary = None,
    hyper_link: ModelOptions.hyper_link = None,
    memory_lobe: ModelOptions.memory_lobe = None,
    final_norm: ModelOptions.final_norm = None,
    tie_embeddings: ModelOptions.tie_embeddings = None,
    max_seq_len: ModelOptions.max_seq_len = None,
) -> None:
    """Train a language model on text. Under torchrun its processes share the work."""
    options = {name: value for name, value in locals().items() if name in vars(ModelOptions)}
    del options["preset"], options["config"]
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    try:
        training = TrainConfig(
            data=None if data is None else str(data),
            field=text_field,
            tokenizer=None if tokenizer is None else str(tokenizer),
            vocab_size=vocab_size,
            held_out=held_out,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            context=context,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            eval_every=eval_every,
            seed=seed,
            precision=precision,
            compile=compile,
            device=device,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    model = model_config(options, preset, config, vocab_size=vocab_size, tokenizer=tokenizer)
    console = Console(highlight=False)
    result = run_training(model, training, out, resume=resume, overwrite=overwrite, cache=cache, console=console)
    if is_first():
        console.print(
            f"held-out text: {result.bits_per_byte:.3f} bits per byte (bigram {result.bigram:.3f}, unigram "
            f"{result.unigram:.3f}), {result.tokens_per_second:,.0f} tokens/s. The model is in {out / 'best'}, "
            f"the curves in {out / 'loss.png'}.",
            soft_wrap=True,
        )
