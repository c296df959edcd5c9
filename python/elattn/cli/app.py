"""Commands: options in, functions of the package called, results printed."""

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import elattn
from elattn import _library
from elattn.errors import UserError
from elattn.models import ELAConfig, export_torchscript
from elattn.train import Interrupted, TrainConfig, load_model
from elattn.train import train as run_training

__all__ = ["app", "main"]

app = typer.Typer(
    help="Exact linear attention: train, use and export a byte-level language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(highlight=False)

Run = Annotated[Path, typer.Argument(help="Folder of a training run or of a saved model.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    data: Annotated[Path | None, typer.Option(help="Text file; by default Python's documentation topics.")] = None,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows per update.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes per window.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak; a cosine follows.")] = 3e-3,
    warmup: Annotated[int, typer.Option(help="Steps to the peak.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of the text, its end, for validation.")] = 0.1,
    eval_every: Annotated[int, typer.Option(help="Steps between validations and checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    d_model: Annotated[int, typer.Option(help="Width.")] = 128,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads; by default as many.")] = None,
    d_hidden: Annotated[int, typer.Option(help="Width of the feed-forward networks.")] = 256,
    kernel: Annotated[str, typer.Option(help=f"One of {', '.join(elattn.kernels())}.")] = "hadamard_exp",
    decay: Annotated[str, typer.Option(help="Forgetting: none, head, channel or token.")] = "channel",
    short_conv: Annotated[int, typer.Option(help="Width of the short convolution, 0 for none.")] = 4,
    gate: Annotated[bool, typer.Option(help="Gate the attention's output.")] = True,
    rotary: Annotated[bool, typer.Option(help="Rotary position embedding.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Train a language model on the bytes of a text."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    try:
        model_config = ELAConfig(
            vocab_size=256,
            d_model=d_model,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            d_hidden=d_hidden,
            kernel=kernel,
            decay=decay,
            short_conv=short_conv,
            gate=gate,
            rotary=rotary,
            final_norm=True,
        )
        config = TrainConfig(
            data=None if data is None else str(data),
            steps=steps,
            batch_size=batch_size,
            context=context,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            held_out=held_out,
            eval_every=eval_every,
            seed=seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    result = run_training(model_config, config, out, resume=resume, overwrite=overwrite, console=_console)
    _console.print(
        f"held-out text: {result.bits_per_byte:.3f} bits per byte (bigram {result.bigram:.3f}, unigram "
        f"{result.unigram:.3f}), {result.tokens_per_second:,.0f} tokens/s. The model is in {out / 'best'}, "
        f"the curve in {out / 'loss.png'}.",
        soft_wrap=True,
    )


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(min=0, help="Bytes to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest of this total probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Continue a text: the continuation goes to stdout, the speed to stderr."""
    model = load_model(run)
    if model.config.vocab_size != 256:
        raise UserError(f"the model in {run} has {model.config.vocab_size} tokens, not the 256 bytes")
    ids = torch.tensor([list(prompt.encode())])
    began = time.perf_counter()
    try:
        generator = torch.Generator().manual_seed(seed)
        tokens = model.generate(ids, new_tokens, temperature, top_k, top_p, generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from None
    seconds = time.perf_counter() - began
    print(bytes(tokens[0, ids.size(1) :].tolist()).decode(errors="replace"))
    print(f"{new_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


@app.command()
def export(
    run: Run,
    file: Annotated[Path, typer.Argument(help="TorchScript file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a model as TorchScript, which C++ loads without Python."""
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists already: replace it with --overwrite, or choose another name")
    model = load_model(run)
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {file.parent}")
    export_torchscript(model, file)
    _console.print(f"{file}: {file.stat().st_size:,} bytes, with new_state, prefill, step and forward", soft_wrap=True)


@app.command()
def info() -> None:
    """Print versions, the CPU's capability and the kernels."""
    rows = {
        "elattn": elattn.__version__,
        "library": _library.library_path(),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        "kernels": ", ".join(elattn.kernels()),
    }
    for name, value in rows.items():
        _console.print(f"{name:<8}  {value}", soft_wrap=True)


def main() -> None:
    """Runs the command; a mistake of the user is one line on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except UserError as error:
        sys.exit(f"elattn: {error}")
    except Interrupted as stop:
        arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
        print(f"elattn: {stop}. To go on: {shlex.join(['elattn', *arguments, '--resume'])}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
