"""Commands: options in, functions of the package called, results printed."""

import os
import platform
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import click
import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

import elattn
from elattn import _library
from elattn._files import check_target
from elattn.cli.bench import bench
from elattn.cli.generate import generate
from elattn.cli.train import train
from elattn.data import ByteTokenizer, load_tokenizer
from elattn.errors import UserError
from elattn.models import export_aoti, export_torchscript
from elattn.train import Interrupted, load_model
from elattn.train.processes import is_first

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The commands, of which those for detection are imported when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*super().list_commands(context), "detect"]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name != "detect":
            return super().get_command(context, name)
        from elattn.cli.detect import app as detect

        command = typer.main.get_command(detect)
        command.name = name
        return command


app = typer.Typer(
    cls=_Commands,
    help="Exact linear attention: train, use and export a language model, or a detector.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(generate)
_console = Console(highlight=False)


class Format(str, Enum):
    """What `elattn export` writes."""

    torchscript = "torchscript"
    aoti = "aoti"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run or of a saved model.")],
    file: Annotated[Path, typer.Argument(help="File to write.")],
    format: Annotated[Format, typer.Option(help="TorchScript, or an AOTInductor package of the step.")] = (
        Format.torchscript
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a model for C++ without Python."""
    check_target(file, overwrite)
    model, tokenizer = load_model(run), load_tokenizer(run)
    if format is Format.torchscript:
        export_torchscript(model, file, byte_level=isinstance(tokenizer, ByteTokenizer), eos_id=tokenizer.eos_id)
        content = "with new_state, prefill, step and forward"
    else:
        export_aoti(model, file)
        content = "the compiled step"
    _console.print(f"{file}: {file.stat().st_size:,} bytes, {content}", soft_wrap=True)


app.command()(bench)


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
    """Runs the command; a mistake of the user is one line on stderr and exit code 1, Ctrl-C exit code 130.

    Of the processes of torchrun only the first one tells it.
    """
    try:
        app()
    except UserError as error:
        sys.exit(f"elattn: {error}" if is_first() else 1)
    except BrokenPipeError:  # `elattn generate ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail again
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without the right to write
        if error.filename is None:
            raise
        sys.exit(f"elattn: {error.filename}: {error.strerror}")
    except Interrupted as stop:
        if is_first():
            arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
            again = shlex.join(["elattn", *arguments, "--resume"])
            if "WORLD_SIZE" in os.environ:
                again = "the same command with --resume"
            print(f"elattn: {stop}. To go on: {again}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
