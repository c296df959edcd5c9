"""The results as a table, JSON, a plot and Markdown."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import registry
from benchmarks.goals import Extras, Goal
from benchmarks.machine import Ceilings, GpuCeilings
from benchmarks.measure import Row
from benchmarks.registry import BOTH, FORWARD, STEP

PLOT = "benchmarks.png"
NS = "ns per token and head"
LEFT = ("what", "peer")
TITLES = {
    "peers": "The kernel hadamard_exp and its peers",
    "kernels": "Other kernels",
    "long": "Few heads, many tokens",
    "step": "One token",
    "threads": "One and two threads (wall time)",
}
AnyCeilings = Ceilings | GpuCeilings
MARKS = {True: "reached", False: "not reached", None: "not measured"}


def headers(ceilings: AnyCeilings) -> tuple[str, ...]:
    sizes = ("what", "D", "L", "B", "H", "peer")
    return (*sizes, "per call", NS, "median", *ceilings.columns, "launches", "memory MB", "of ideal", "error")


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _peer(row: Row) -> str:
    run = row.run
    extra = [run.kernel] if row.case == "kernels" and not run.decay else []
    extra += ["decay"] if run.decay else []
    if run.dtype != ("bfloat16" if run.device == "cuda" else "float32"):
        extra.append(run.dtype)
    extra += [f"{run.threads} thread{'s' * (run.threads > 1)}"] if row.case == "threads" else []
    return f"{run.peer}{' (' + ', '.join(extra) + ')' if extra else ''}"


def cells(row: Row, ceilings: AnyCeilings) -> list[str]:
    """A row of the table; its last cell is the error. A wrong result has only that."""
    run = row.run
    length, batch = "" if run.mode == STEP else f"{run.length:,}", str(run.batch) if run.device == "cuda" else ""
    head = [run.mode, str(run.head_dim), length, batch, str(run.heads), _peer(row)]
    if row.seconds is None:
        return [*head, *[""] * 8, f"{row.error:.0e}, WRONG"]
    idle = run.peer == registry.NO_OP
    digits = 3 if run.device == "cuda" and run.mode != STEP else 0
    memory = row.grown_bytes is not None
    return [
        *head,
        _duration(row.seconds),
        "" if idle else f"{row.ns:,.{digits}f}",
        "" if idle else f"{row.ns * row.median_seconds / row.seconds:,.{digits}f}",
        *("" if fraction is None else f"{fraction:.2f}" for fraction in ceilings.fractions(row)),
        "" if row.launches is None else str(row.launches),
        f"{row.grown_bytes / 1e6:,.1f}" if memory else "",
        f"{row.memory_ratio:.2f}" if memory else "",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def reportable(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows of a table, and why the others are not in it."""
    missing = sorted({row.note for row in rows if row.seconds is None and not row.wrong})
    return [row for row in rows if row.seconds is not None or row.wrong], missing


def table(rows: list[Row], ceilings: AnyCeilings) -> Table:
    result = Table(header_style="bold", pad_edge=False)
    for header in headers(ceilings):
        result.add_column(
            header,
            justify="left" if header in LEFT else "right",
            no_wrap=header != NS,
            min_width=9 if header == NS else None,
        )
    previous = None
    for row in reportable(rows)[0]:
        place = (row.case, row.run.mode, row.run.head_dim, row.run.length, row.run.batch, row.run.heads)
        if previous is not None and place != previous:
            result.add_section()
        previous = place
        style = "red" if row.wrong else "bold" if row.run.peer == registry.ELATTN else ""
        result.add_row(*cells(row, ceilings), style=style)
    return result


def goal_table(goals: list[Goal]) -> Table:
    result = Table("goal", "target", "measured", "", header_style="bold", pad_edge=False)
    for goal in goals:
        style = {True: "green", False: "red", None: "dim"}[goal.reached]
        result.add_row(goal.what, goal.target, goal.measured, MARKS[goal.reached], style=style)
    return result


def write_json(
    path: Path, machine: dict[str, Any], ceilings: AnyCeilings, rows: list[Row], extras: Extras, goals: list[Goal]
) -> None:
    """Everything measured, samples included. Lengths of time in seconds, rates in flop/s."""
    derived = [
        {"ns_per_token_and_head": r.ns, "flops_per_second": r.flops, "memory_ratio": r.memory_ratio} for r in rows
    ]
    everything = {
        "machine": machine,
        **ceilings.results(),
        "rows": [asdict(row) | more for row, more in zip(rows, derived, strict=True)],
        "extras": asdict(extras),
        "goals": [asdict(goal) for goal in goals],
    }
    path.write_text(json.dumps(everything, indent=1, default=str) + "\n")


def write_plot(path: Path, rows: list[Row], where: str) -> None:
    """Time per token and head against L, for each head dimension and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "elattn": ("#c1272d", "o", 2.6),
        "elattn (bfloat16)": ("#e88a3c", "s", 1.8),
        registry.SDPA: ("#30475e", "^", 1.8),
        registry.SCAN: ("#3f88c5", "v", 1.8),
        registry.SCAN_COMPILED: ("#44a27a", "D", 1.8),
        registry.FAST_TRANSFORMERS: ("#8e6bb0", "P", 1.8),
        registry.FLA: ("#3f88c5", "v", 1.8),
        registry.FLA_NORMALISED: ("#8e6bb0", "P", 1.8),
    }
    rows = [row for row in rows if row.case == "peers" and row.seconds is not None]
    dims = sorted({row.run.head_dim for row in rows})
    figure, axes = plt.subplots(
        2, len(dims), figsize=(5.6 * len(dims), 8.4), sharex=True, squeeze=False, layout="constrained"
    )
    for i, mode in enumerate((FORWARD, BOTH)):
        for j, dim in enumerate(dims):
            axis = axes[i][j]
            for peer, (colour, marker, width) in styles.items():
                points = [
                    (r.run.length, r.ns)
                    for r in rows
                    if (r.run.mode, r.run.head_dim) == (mode, dim) and _peer(r) == peer
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker, ls="-", color=colour, lw=width, ms=5, label=peer)
            lengths = sorted({r.run.length for r in rows})
            axis.set(xscale="log", yscale="log", title=f"{mode}, D = Dv = {dim}")
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=40)
            axis.minorticks_off()
            low, high = axis.get_ylim()
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
            axis.set_yticks(ticks, [f"{t:,.6g}" for t in ticks])
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if j == 0:
                axis.set_ylabel("ns per token and head")
            if i == 1:
                axis.set_xlabel("L, tokens")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(dims) + 1, frameon=False, fontsize=9)
    figure.suptitle(f"Causal attention on {where} (lower is faster)", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["--:" if i in right else "---" for i in range(len(headers))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headers, rule, *lines))


def markdown(machine: dict[str, Any], ceilings: AnyCeilings, rows: list[Row], extras: Extras, goals: list[Goal]) -> str:
    """The figures of docs/benchmarks.md."""
    gpu = f"{machine['gpu']} (compute capability {machine['capability']}), " if "gpu" in machine else ""
    names = headers(ceilings)
    parts = [
        f"{machine['date']}, {gpu}{machine['processor']}, {machine['cores']} cores, capability "
        f"{machine['cpu_capability']}, {machine['system']}, PyTorch {machine['torch']}, Python {machine['python']}, "
        f"elattn {machine['elattn']}. {ceilings}.",
        f"![Time per token and head against the length]({PLOT})",
        "### Goals",
        markdown_table(
            ("goal", "target", "measured", ""), [(g.what, g.target, g.measured, MARKS[g.reached]) for g in goals]
        ),
    ]
    for case, title in TITLES.items():
        chosen, missing = reportable([row for row in rows if row.case == case])
        if not chosen:
            continue
        lines = [cells(row, ceilings) for row in chosen]
        # Columns that are empty in this group are left out.
        keep = [i for i in range(len(names)) if any(line[i] for line in lines)]
        table = markdown_table(
            [names[i] for i in keep],
            [[line[i] for i in keep] for line in lines],
            [n for n, i in enumerate(keep) if names[i] not in LEFT],
        )
        parts += [f"### {title}", table, *(f"Not measured: {note}." for note in missing)]
    if extras.step_seconds_by_position:
        lines = [(f"{n:,}", f"{s * 1e6:.2f}") for n, s in extras.step_seconds_by_position.items()]
        parts += [
            "### A step by position",
            markdown_table(("tokens before", "µs (B = 1, H = 8, D = 64)"), lines, (0, 1)),
        ]
    return "\n\n".join(parts)


def write_docs(path: Path, figures: str, section: str = "figures") -> None:
    """Replaces what stands between the markers of a section of `path`."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} needs one line {begin} and one line {end}")
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n\n{figures}\n\n{end}{rest.split(end)[1]}")
