"""`python -m benchmarks.run`, in the repository root: measures elattn and its peers and reports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
IMPORT = "import time, torch; t = time.perf_counter(); import elattn; print(time.perf_counter() - t)"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="D = 64, fewer lengths and rounds: below a minute.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the current GPU.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/bench"),
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Also put the figures into docs/benchmarks.md.")
    ] = False,
) -> None:
    """Measures elattn and its peers; writes a table, results.json, results.md and a plot."""
    if write_docs and (quick or device != "cpu"):
        raise typer.BadParameter("the figures of the documentation come from a whole run on the CPU, without --quick")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"the device must be cpu or cuda (got {device})")
    out.mkdir(parents=True, exist_ok=True)
    # Read when PyTorch's compiler is imported: keep its files here, and its workers from running beside a measurement.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((out / "inductor").resolve()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

    import torch

    from benchmarks import goals, machine, measure, oracle, registry, report, steps

    console = Console()
    console.width = max(console.width, 170)  # narrower, the table is unreadable
    on_gpu = device == "cuda"
    if on_gpu and not (torch.cuda.is_available() and torch.ops.elattn._has_cuda()):
        raise typer.BadParameter("cuda needs a GPU that this PyTorch can use and an elattn built with CUDA operators")
    torch.set_num_threads(1)
    facts = machine.describe(device)
    if facts["load"] > 0.5:
        console.print(f"[yellow]Others use this machine (load {facts['load']}): times may come out too long.[/yellow]")
    if not on_gpu and not machine.keep_pages():
        console.print("[yellow]This C library has no mallopt: times include newly mapped pages.[/yellow]")
    has_step_loop = not on_gpu and machine.load_step_loop(out)
    ceilings = machine.GpuCeilings() if on_gpu else machine.Ceilings(out)
    oracle.check_oracle()

    rows: list[measure.Row] = []
    budget = measure.QUICK if quick or on_gpu else measure.FULL
    cases = registry.gpu_cases(quick) if on_gpu else registry.cases(quick)
    columns = (
        TextColumn("{task.description:48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Without auto_refresh, whose thread would be timed too.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases))
        for i, case in enumerate(cases):
            run = case.runs[0]
            progress.update(task, description=f"{case.name} {run.mode} D={run.head_dim} L={run.length}", refresh=True)
            ceilings.sample(mm=i % 4 == 0)
            rows += measure.measure(case, budget)
            progress.advance(task)
        progress.update(task, description="steps by position, import", refresh=True)
        rounds = 5 if quick else 25
        positions = {} if quick else steps.by_position(rounds, device)
        overhead = steps.call_overhead(rounds) if has_step_loop else None
        extras = goals.Extras(positions, overhead, None if on_gpu else _import_seconds(2 if quick else 5))
    if on_gpu:
        reached = goals.evaluate_gpu(rows, extras, ceilings)
    else:
        reached = goals.evaluate(rows, extras, ceilings.fma)

    console.print(report.table(rows, ceilings))
    for reason in report.reportable(rows)[1]:
        console.print(f"Not measured: {reason}.")
    console.print(f"{ceilings}.")
    console.print(report.goal_table(reached))
    report.write_json(out / "results.json", facts, ceilings, rows, extras, reached)
    report.write_plot(out / report.PLOT, rows, facts["gpu"] if on_gpu else "one core, B = 1, H = 8")
    figures = report.markdown(facts, ceilings, rows, extras, reached)
    (out / "results.md").write_text(figures + "\n")
    console.print(f"Written: {out}/results.json, results.md, {report.PLOT}")

    wrong = [row for row in rows if row.wrong]
    if wrong:
        console.print(f"[red]{len(wrong)} results were wrong; they have no figures.[/red]")
        raise typer.Exit(1)
    if write_docs:
        report.write_docs(ROOT / "docs/benchmarks.md", figures)
        shutil.copyfile(out / report.PLOT, ROOT / "docs" / report.PLOT)
        console.print("Written: docs/benchmarks.md")


def _import_seconds(runs: int) -> float:
    """What `import elattn` adds to `import torch`, in fresh interpreters: the best of `runs`."""
    command = [sys.executable, "-c", IMPORT]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(runs))


if __name__ == "__main__":
    typer.run(main)
