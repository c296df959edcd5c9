"""`python -m benchmarks.paper`, in the repository root: trains, measures and reports."""

import shutil
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.paper.presets import PRESETS

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Part(str, Enum):
    train = "train"
    ablate = "ablate"
    decode = "decode"
    recall = "recall"
    speed = "speed"
    all = "all"
    report = "report"


class Size(str, Enum):
    smoke = "smoke"
    small = "small"
    full = "full"


def main(
    part: Annotated[Part, typer.Argument(help="What to measure; `report` puts what is there into docs/results.md.")],
    preset: Annotated[Size, typer.Option(help="small: 15 minutes a part on 2 cores; full: for a GPU.")] = Size.small,
    out: Annotated[Path, typer.Option(help="Where the results go, in a folder of the preset's name.")] = Path(
        "build/paper"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every form.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, one thread each.")] = 2,
) -> None:
    """Answers the paper's questions with our own models. What was trained already is not trained again."""
    from benchmarks.paper import parts, report

    sizes, folder, console = PRESETS[preset.value], out / preset.value, Console()
    if part is Part.report:
        if preset is Size.smoke:
            raise typer.BadParameter("the figures of the documentation come from --preset small or full")
        figures = report.write(sizes, preset.value, folder, seeds)
        missing = [name for name in parts.PARTS if figures[name] == report.NOT_MEASURED]
        if missing:
            raise typer.BadParameter(f"{folder} has no results of {', '.join(missing)}: run those parts first")
        report.write_docs(DOCS / "results.md", figures)
        for plot in report.PLOTS.values():
            if (folder / plot).exists():
                shutil.copyfile(folder / plot, DOCS / plot)
        console.print("Written: docs/results.md")
        return
    names = list(parts.PARTS) if part is Part.all else [part.value]
    failures = sum(parts.run(name, sizes, folder, seeds, jobs, console) for name in names)
    report.write(sizes, preset.value, folder, seeds)
    console.print(f"Written: {folder}/results.md")
    if failures:
        console.print(f"{failures} runs failed; the others are kept. Run again to try those that failed.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
