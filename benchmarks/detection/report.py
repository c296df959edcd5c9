"""What was measured as Markdown with plots."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.detection import plots, program, speed, train
from benchmarks.detection.contestants import PEER
from benchmarks.goals import Goal
from benchmarks.paper.turns import ratio
from benchmarks.report import MARKS
from elattn._files import make_folder

PLOTS = {"growth": "results-detection-time.png", "ap": "results-detection-ap.png"}
NOT_MEASURED = "Not measured yet."
PUBLISHED = 316_438  # parameters of lat_n at one class
FORMS = ("eager", "fused", "channels last", "TorchScript")
TITLES = {
    "budget": "After the same CPU seconds",
    "epochs": "After the same epochs",
    "ablation": "The neck",
}

Rows = list[dict[str, Any]]


def write(out: Path) -> str:
    """Draws the plots, writes results.md into `out`, and returns it."""
    make_folder(out)
    path = out / "speed.json"
    times = json.loads(path.read_text()) if path.exists() else None
    plan = train.read_plan(out)
    parts = [_goals(times, plan, out), "### Speed", _speed(times, out), "### Average precision", _precision(plan, out)]
    text = "\n\n".join(parts)
    (out / "results.md").write_text(text + "\n")
    return text


def _goals(times: dict[str, Any] | None, plan: dict[str, Any] | None, out: Path) -> str:
    goals = [*_speed_goals(times), *_precision_goals(plan, out)]
    rows = [(g.what, g.target, g.measured, "" if g.target == "reported" else MARKS[g.reached]) for g in goals]
    return _table(("goal", "target", "measured", ""), rows)


def _speed_goals(times: dict[str, Any] | None) -> list[Goal]:
    times = times or {"models": [], "raw": [], "boxes": [], "growth": [], "program": [], "trained": []}
    counts = [int(row["parameters"]["1"]) for row in times["models"] if row["name"] == "lat_n"]
    exact = Goal("parameters of lat_n, one class", f"{PUBLISHED:,}")
    if counts:
        exact.measured, exact.reached = f"{counts[0]:,}", counts[0] == PUBLISHED
    default = speed.default_parameters()
    small = Goal("parameters of the default, one class", "≤ 330,000", f"{default:,}", default <= 330_000)
    share = Goal("attention's share of that forward, 320 px", "≤ 8%")
    if value := _quotient(times["growth"], {"part": "attention"}, {"part": "forward"}, neck="linear", size=320):
        share.measured, share.reached = f"{value:.1%}", round(value, 2) <= 0.08
    best = _best_forms(times["raw"], size=320, batch=1)
    fastest = best[PEER]["seconds"] / best["lat_n"]["seconds"] if {PEER, "lat_n"} <= best.keys() else None

    def forward(size: int) -> float | None:
        return _quotient(times["raw"], {"name": PEER}, {"name": "lat_n"}, form="fused", size=size, batch=1)

    def necks(size: int) -> float | None:
        return _quotient(times["growth"], {"neck": "softmax"}, {"neck": "linear"}, part="forward", size=size)

    weights = "trained" if {"lat_n", PEER} <= set(times["trained"]) else "random"
    boxes = f"image to boxes, 320 px, {PEER} over lat_n, the fastest form of each, {weights} weights"
    return [
        exact,
        small,
        _at_least(f"tensor to raw output, 320 px, fused, {PEER} over lat_n", 4.5, forward(320)),
        _at_least("the same, 640 px", 4.5, forward(640)),
        _at_least("the same, 320 px, the fastest form of each", None, fastest),
        _at_least("that forward, softmax neck over linear, 640 px", 4, necks(640)),
        _at_least("the same, 1,280 px", 10, necks(1280)),
        _at_least(boxes, 3.5, _boxes_quotient(times["boxes"], 320)),
        _at_least("image file to boxes, eager Python over the C++ program", 1, _over_program(times["program"], 0)),
        share,
    ]


def _boxes_quotient(rows: Rows, size: int) -> float | None:
    """Time of the peer over that of lat_n, each as it is fastest."""
    rows = [row for row in rows if (row["size"], row["batch"]) == (size, 1) and "predict()" not in row["how"]]
    fastest = {row["name"]: row for row in sorted(rows, key=lambda row: -row["seconds"])}
    if not {"lat_n", PEER} <= fastest.keys():
        return None
    return ratio(fastest[PEER]["samples"], fastest["lat_n"]["samples"])


def _over_program(rows: Rows, how: int) -> float | None:
    """Time of a way of `program.HOWS` over that of the C++ program."""
    return _quotient(rows, {"how": program.HOWS[how]}, {"how": program.HOWS[-1]})


def _precision_goals(plan: dict[str, Any] | None, out: Path) -> list[Goal]:
    groups, seconds = (plan["groups"], plan["cpu_seconds"]) if plan else ({}, 480.0)
    budget, epochs = (_results(out, groups.get(group, {})) for group in ("budget", "epochs"))
    within = f"in {seconds:g} CPU seconds"
    ours = budget.get("lat_n", []) if seconds <= 480 else []

    def over(results: dict[str, Rows], figure: str) -> float | None:
        mine, peer = (_median(results.get(name, []), figure) for name in ("lat_n", PEER))
        return mine / peer if mine and peer else None

    return [
        _at_least(f"AP {within}, median of the seeds", 0.42, _median(ours, "ap"), 3, ""),
        _at_least(f"AP50 {within}, median of the seeds", 0.65, _median(ours, "ap50"), 3, ""),
        _at_least(f"AP, lat_n over {PEER}, {within}", 1.1, over(budget, "ap")),
        _at_least(f"AP50, lat_n over {PEER}, {within}", 1.2, over(budget, "ap50")),
        _at_least(f"AP, lat_n over {PEER}, after the same epochs", None, over(epochs, "ap")),
        _at_least(f"AP50, lat_n over {PEER}, after the same epochs", None, over(epochs, "ap50")),
    ]


def _at_least(what: str, target: float | None, value: float | None, digits: int = 2, unit: str = "x") -> Goal:
    """Reached if the value is, to the digits shown; without a target it is reported only."""
    goal = Goal(what, "reported" if target is None else f"≥ {target:g}{unit}")
    if value is not None:
        goal.measured = f"{value:.{digits}f}{unit}"
        goal.reached = None if target is None else round(value, digits) >= target
    return goal


def _quotient(rows: Rows, over: dict[str, Any], under: dict[str, Any], **same: Any) -> float | None:
    """Median over the rounds of the quotient of two times, if both are there."""
    above, below = _row(rows, **over, **same), _row(rows, **under, **same)
    return ratio(above["samples"], below["samples"]) if above and below else None


def _speed(times: dict[str, Any] | None, out: Path) -> str:
    if times is None:
        return NOT_MEASURED
    plots.growth(out / PLOTS["growth"], times["growth"], times["raw"])
    sizes = list(times["models"][0]["flops"])
    models = [
        (
            row["name"],
            *(f"{row['parameters'][classes]:,}" for classes in ("1", "10", "80")),
            *(f"{row['flops'][size][form] / 1e9:.3f}" for size in sizes for form in ("eager", "fused")),
            f"{row['attention_flops'][sizes[0]] / 1e6:.1f}" if row["attention_flops"][sizes[0]] else "",
        )
        for row in times["models"]
    ]
    headers = (
        "model",
        *(f"parameters, {n}" for n in ("1 class", "10 classes", "80")),
        *(f"GFLOP, {size} px{form}" for size in sizes for form in ("", ", fused")),
        f"of these linear attention, MFLOP, {sizes[0]} px",
    )
    trained = ", ".join(times["trained"])
    body = [
        f"{_machine(times['machine'])}, {_threads(times['threads'])}, float32. {PEER}: {times['peer']}. "
        f"{times['classes']} classes; "
        + (f"trained weights: {trained}, random ones otherwise." if trained else "random weights."),
        f"![Time by pixels]({PLOTS['growth']})",
        _table(headers, models),
        "#### Tensor to raw output",
        "Milliseconds of a batch, best round; ratios are the median over the rounds. Fused, YoloLat is channels last.",
        _raw_table(times["raw"]),
        "#### Image to boxes",
        "Pixels as uint8 to boxes in them, at confidence 0.001, 100 at most: letterbox, forward, decoding and "
        "suppression.",
        _boxes_table(times["boxes"]),
        _table(
            ("size", "letterbox", "forward", "boxes"),
            [
                (f"{size}", *(_share(times["stages"], stage, size) for stage in ("letterbox", "forward", "boxes")))
                for size in dict.fromkeys(row["size"] for row in times["stages"])
            ],
        ),
        _program_table(times["program"]),
        "#### The neck by size",
        "lat_n, fused, one image, milliseconds. The neck has the head in it.",
        _growth_table(times["growth"]),
        _growth_said(times["growth"]),
    ]
    return "\n\n".join(part for part in body if part)


def _raw_table(rows: Rows) -> str:
    lines = []
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        best = _best_forms(mine)
        for name in best:
            by_form = {row["form"]: row for row in mine if row["name"] == name}
            peer = _row(mine, name=PEER, form="fused")
            lines.append(
                (
                    f"{size} px, batch {batch}",
                    name,
                    *(f"{by_form[form]['seconds'] * 1e3:.2f}" if form in by_form else "" for form in FORMS),
                    f"{ratio(peer['samples'], by_form['fused']['samples']):.2f}x" if peer else "",
                    f"{best[PEER]['seconds'] / best[name]['seconds']:.2f}x" if peer else "",
                )
            )
    return _table(("", "model", *FORMS, f"speed, fused {PEER} = 1", "the fastest forms"), lines)


def _best_forms(rows: Rows, **wanted: Any) -> dict[str, dict[str, Any]]:
    """The fastest form of each model."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        matches = all(row[key] == value for key, value in wanted.items())
        if matches and (row["name"] not in best or row["seconds"] < best[row["name"]]["seconds"]):
            best[row["name"]] = row
    return best


def _boxes_table(rows: Rows) -> str:
    lines = []
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        ours = _row(mine, name="lat_n", how="fused")
        for row in mine:
            lines.append(
                (
                    f"{size} px, batch {batch}",
                    f"{row['name']}, {row['how']}",
                    f"{row['seconds'] * 1e3:.2f}",
                    f"{ratio(row['samples'], ours['samples']):.2f}x" if ours and row is not ours else "",
                )
            )
    return _table(("", "model", "ms", "time, lat_n fused = 1"), lines)


def _program_table(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [
        (row["how"], f"{row['seconds'] * 1e3:.2f}", f"{_over_program(rows, how):.2f}x") for how, row in enumerate(rows)
    ]
    return _table((f"image file to boxes, {rows[0]['size']} px", "ms", "time, C++ = 1"), lines)


def _share(rows: Rows, stage: str, size: int) -> str:
    mine = {row["stage"]: row["seconds"] for row in rows if row["size"] == size}
    return f"{mine[stage] * 1e3:.2f} ms ({mine[stage] / sum(mine.values()):.0%})"


def _growth_table(rows: Rows) -> str:
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        times = [
            _ms(rows, part=part, neck=neck, size=size)
            for part in ("forward", "neck and head", "attention")
            for neck in ("linear", "softmax", "none")
            if (part, neck) != ("attention", "none")
        ]
        forward, neck = (
            _quotient(rows, {"neck": "softmax"}, {"neck": "linear"}, part=part, size=size)
            for part in ("forward", "neck and head")
        )
        share, eager = (
            _quotient(rows, {"part": "attention"}, {"part": part}, neck="linear", size=size)
            for part in ("forward", "forward, eager")
        )
        lines.append((f"{size}", *times, f"{forward:.1f}x", f"{neck:.1f}x", f"{share:.1%}", f"{eager:.1%}"))
    necks = ("softmax", "none")
    headers = (
        *("size", "forward, linear", *necks, "neck, linear", *necks, "attention, linear", "softmax"),
        *("forward, softmax over linear", "neck", "linear attention's share of the forward", "of the eager one"),
    )
    return _table(headers, lines)


def _ms(rows: Rows, **wanted: Any) -> str:
    row = _row(rows, **wanted)
    return f"{row['seconds'] * 1e3:.2f}" if row else ""


def _growth_said(rows: Rows) -> str:
    """By how much the necks grow with the pixels."""
    sizes = sorted({row["size"] for row in rows})
    if len(sizes) < 2:
        return ""
    first, last = sizes[0], sizes[-1]

    def grows(neck: str) -> float:
        small, large = (_row(rows, part="neck and head", neck=neck, size=size)["seconds"] for size in (first, last))
        return large / small

    return (
        f"From {first} to {last:,} px there are {(last / first) ** 2:.0f} times the pixels; the linear neck takes "
        f"{grows('linear'):.0f} times as long, the softmax neck {grows('softmax'):.0f} times."
    )


def _precision(plan: dict[str, Any] | None, out: Path) -> str:
    if plan is None:
        return NOT_MEASURED
    results = {group: mine for group, names in plan["groups"].items() if (mine := _results(out, names))}
    plots.precision(out / PLOTS["ap"], {TITLES[group]: mine for group, mine in results.items()})
    costs = ", ".join(f"{name} {1e3 * cost:.0f}" for name, cost in plan["costs"].items())
    chosen = ", ".join(f"{name}: {setting}" for name, setting in plan["chosen"].items())
    parts = [
        f"{_machine(plan['machine'])}, one thread for a run. Data: {plan['data']}, float32. {PEER}: {plan['peer']}. "
        f"Milliseconds of the CPU that training takes for an image, measured in turns: {costs}. Settings chosen on the "
        f'split "val" ({chosen}), figures of the split "test", averaged weights after the last epoch, median and range '
        "of the seeds.",
        f"![Average precision]({PLOTS['ap']})",
    ]
    for group, mine in results.items():
        parts += [f"#### {TITLES[group]}", _precision_table(mine, "lat_n" if group == "ablation" else PEER)]
        missing = [name for name in plan["groups"][group] if len(mine.get(name, [])) < plan["seeds"]]
        if missing:
            parts.append(f"Runs are missing of {', '.join(missing)}.")
    parts += ["#### Settings that were tried", _tuning_table(plan, out)]
    return "\n\n".join(parts)


def _precision_table(results: dict[str, Rows], base: str) -> str:
    lines = [
        (
            name + (f" ({runs[0]['head']})" if "head" in runs[0] else ""),
            f"{runs[0]['parameters']:,}",
            f"{runs[0]['identity']['epochs']}",
            f"{statistics.mean(run['cpu_seconds'] for run in runs):,.0f}",
            *(_with_range(runs, figure) for figure in ("ap", "ap50")),
            *(f"{_median(runs, figure):.3f}" for figure in ("ap75", "small", "medium", "large")),
            _difference(runs, results.get(base, [])) if name != base else "",
        )
        for name, runs in results.items()
    ]
    figures = ("AP", "AP50", "AP75", "small", "medium", "large")
    return _table(("model", "parameters", "epochs", "CPU s", *figures, f"AP, to {base}"), lines)


def _tuning_table(plan: dict[str, Any], out: Path) -> str:
    lines = [
        (name, setting, f"{run['val']['ap']:.3f}", f"{run['cpu_seconds']:,.0f}")
        for name, files in plan["tuning"].items()
        for setting, file in files.items()
        for run in train.read_results(out, [file])
    ]
    return _table(("model", "setting", 'AP on "val", seed 0', "CPU s"), lines)


def _results(out: Path, names: dict[str, list[str]]) -> dict[str, Rows]:
    """The runs of each model that are there."""
    found = {name: train.read_results(out, files) for name, files in names.items()}
    return {name: runs for name, runs in found.items() if runs}


def _difference(runs: Rows, base: Rows) -> str:
    """Mean and standard deviation over the seeds that both have."""
    theirs = {run["seed"]: run["test"]["ap"] for run in base}
    values = [run["test"]["ap"] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{deviation}".replace("-", "−")


def _with_range(runs: Rows, figure: str) -> str:
    values = [run["test"][figure] for run in runs]
    span = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{span}"


def _median(runs: Rows, figure: str) -> float | None:
    return statistics.median(run["test"][figure] for run in runs) if runs else None


def _row(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _machine(facts: dict[str, Any]) -> str:
    return (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, capability {facts['cpu_capability']}, "
        f"PyTorch {facts['torch']}, elattn {facts['elattn']}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, ["---"] * len(headers), *rows))
