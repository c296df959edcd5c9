"""`python -m benchmarks.detection`, in the repository root: times, trains and reports."""

import json
import shutil
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

DOCS = Path(__file__).resolve().parents[2] / "docs"

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)
_Out = Annotated[Path, typer.Option(help="Where the results go.")]
_Data = Annotated[str, typer.Option(help='Folder in COCO or YOLO format, or "demo".')]
_DEFAULT_OUT = Path("build/detection")


class Group(str, Enum):
    budget = "budget"
    epochs = "epochs"
    ablation = "ablation"


@app.command()
def speed(
    out: _Out = _DEFAULT_OUT,
    data: _Data = "demo",
    size: Annotated[list[int] | None, typer.Option(help="Sides of the input; 320 and 640 by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at a time, at most 16; 1 and 16 by default.")] = None,
    growth: Annotated[
        list[int] | None, typer.Option(help="Sides at which the necks are compared; 320 to 1280 by default.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Forms of YoloLat; seven by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all take turns.")] = 11,
    threads: Annotated[int, typer.Option(min=1, help="Of every call.")] = 1,
) -> None:
    """Time both detectors, with the weights that `train` left if there are any."""
    from benchmarks import machine
    from benchmarks.detection import contestants, train
    from benchmarks.detection import speed as part
    from elattn._files import write_file

    console = Console()
    if unknown := set(model or ()) - contestants.LAT.keys():
        raise typer.BadParameter(f"no form {', '.join(unknown)}; there are {', '.join(contestants.LAT)}")
    facts = machine.describe()
    if facts["load"] > 0.5:
        console.print(f"[yellow]Others use this machine (load {facts['load']}): times may come out too long.[/yellow]")
    machine.keep_pages()
    given = {"sizes": size, "batches": batch, "growth": growth, "models": model}
    sizes = part.Sizes(**{name: value for name, value in given.items() if value}, rounds=rounds, threads=threads)
    result = part.measure(data, sizes, train.trained_weights(out), console) | {"machine": facts}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "speed.json", json.dumps(result, indent=1) + "\n")
    _report(out, console)


@app.command()
def train(
    out: _Out = _DEFAULT_OUT,
    data: _Data = "demo",
    cpu_seconds: Annotated[float, typer.Option(help="Of a training in the group budget.")] = 480,
    epochs: Annotated[
        int | None, typer.Option(help="Of a training in the other groups; by default those of lat_n in the budget.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every model.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, one thread each.")] = 2,
    group: Annotated[list[Group] | None, typer.Option(help="What to compare; all by default.")] = None,
) -> None:
    """Train both detectors and compare their average precision. What was trained already is not trained again."""
    from benchmarks.detection import train as part

    console = Console()
    failures = part.run(out, data, cpu_seconds, epochs, seeds, jobs, [g.value for g in group or Group], console)
    _report(out, console)
    if failures:
        console.print(f"{failures} runs failed; the others are kept. Run again to try those that failed.")
        raise typer.Exit(1)


@app.command()
def report(
    out: _Out = _DEFAULT_OUT,
    docs: Annotated[bool, typer.Option("--docs", help="Also put the figures into docs/results.md.")] = False,
) -> None:
    """Write tables and plots of what is there."""
    from benchmarks.detection import report as part
    from benchmarks.paper.report import write_docs

    text = _report(out, Console())
    if docs:
        write_docs(DOCS / "results.md", {"detection": text})
        for plot in part.PLOTS.values():
            if (out / plot).exists():
                shutil.copyfile(out / plot, DOCS / plot)


def _report(out: Path, console: Console) -> str:
    from benchmarks.detection import report as part

    text = part.write(out)
    console.print(f"Written: {out}/results.md", soft_wrap=True)
    return text


if __name__ == "__main__":
    app()
