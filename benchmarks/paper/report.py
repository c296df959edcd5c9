"""The results as Markdown with plots, and what they mean, into docs/results.md."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import Goal
from benchmarks.paper import decode, forms, parts, plots, speed
from benchmarks.paper.forms import Form
from benchmarks.paper.plots import Results
from benchmarks.paper.presets import Preset
from benchmarks.report import MARKS

SECTIONS = ("goals", *parts.PARTS)
PLOTS = {name: f"results-{name}.png" for name in parts.PARTS}
GOAL_CONTEXT = 131072
NOT_MEASURED = "Not measured yet."
# Title of each table, the form that its last column compares with, and a row of another table that belongs to it.
GROUPS = {
    "attention": ("Attention", "recommended", ()),
    "kernel": ("Kernels", "recommended", ("bare-rotary", "recommended")),
    "link": ("Hyper-Link", "recommended", ("recommended",)),
    "lobe": ("Memory Lobe", "link-sum", ("link-sum",)),
    "moe": ("Mixture of experts", "moe-none", ("recommended",)),
}


def write(sizes: Preset, preset: str, folder: Path, seeds: int) -> dict[str, str]:
    """Draws the plots, writes results.md into `folder`, and returns the Markdown of each section."""
    folder.mkdir(parents=True, exist_ok=True)
    goals: list[Goal] = []
    found = {
        "train": _train(parts.trained("train", sizes, seeds, folder), folder, goals),
        "ablate": _ablate(parts.trained("ablate", sizes, seeds, folder), folder, goals),
        "decode": _decode(parts.timed("decode", folder), folder, goals),
        "speed": _speed(parts.timed("speed", folder), folder, goals),
        "recall": _recall(parts.trained("recall", sizes, seeds, folder), folder),
    }
    command = f"`python -m benchmarks.paper all --preset {preset} --seeds {seeds}`"
    found["goals"] = f"{command}\n\n{_table(('goal', 'target', 'measured', ''), [_row(goal) for goal in goals])}"
    figures = {name: found[name] for name in SECTIONS}
    (folder / "results.md").write_text("\n\n".join(f"# {name}\n\n{figures[name]}" for name in SECTIONS) + "\n")
    return figures


def write_docs(path: Path, figures: dict[str, str]) -> None:
    """Replaces what stands between the markers of each section in `path`."""
    text = path.read_text()
    for name, content in figures.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{path} needs one line {begin} and one line {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    path.write_text(text)


def _train(results: Results, folder: Path, goals: list[Goal]) -> str:
    goals += _loss_goals(results, "train", ("ela-gpt", "fa-gpt", "fair-fa-gpt"))
    if "fa-gpt" not in results:
        return NOT_MEASURED
    plots.curves(folder / PLOTS["train"], forms.TRAIN, results)
    rows = [_loss_row(form, results, ("fa-gpt", "fair-fa-gpt")) for form in forms.TRAIN if form.name in results]
    headers = ("model", "parameters", "nats per byte", "range", "to FA-GPT", "to FA-GPT with convolution and gate")
    said = [
        _compared(results, "ela-gpt", "fa-gpt", "The paper's ELA-GPT", "FA-GPT"),
        _compared(results, "recommended", "fa-gpt", "The recommended pure stack", "FA-GPT"),
        _compared(results, "recommended", "fair-fa-gpt", "It", "softmax with the same convolution and gate"),
        _compared(results, "hybrid", "fair-fa-gpt", "The hybrid", "that"),
    ]
    return _section(_facts(results), PLOTS["train"], "Validation loss over the steps", _table(headers, rows), said)


def _ablate(results: Results, folder: Path, goals: list[Goal]) -> str:
    goals += _loss_goals(results, "ablate", ("bare-rotary", "softmax", "softmax-conv-gate"))
    if "softmax" not in results:
        return NOT_MEASURED
    titles = {group: title for group, (title, *_) in GROUPS.items()}
    plots.ablation(folder / PLOTS["ablate"], forms.ABLATE, results, titles, ("softmax", "softmax-conv-gate"))
    spread = statistics.mean(_range(runs) for runs in results.values())
    body = [
        f"Range over the seeds, mean of all forms: {spread:.3f} nats. Differences (mean ± standard deviation over the "
        "seeds, seed by seed) that are not clearly larger than their own deviation mean nothing."
    ]
    for group, (title, base, guests) in GROUPS.items():
        shown = [form for form in forms.ABLATE if (form.group == group or form.name in guests) and form.name in results]
        if not shown or base not in results:
            continue
        shown.sort(key=lambda form: form.group == group)
        rows = [_loss_row(form, results, ("softmax", base)) for form in shown]
        against = next(form.title for form in forms.ABLATE if form.name == base)
        headers = ("model", "parameters", "nats per byte", "range", "to softmax, rotary", f"to {against}")
        body += [f"### {title}", _table(headers, rows), _best(shown, base, results)]
    return _section(_facts(results), PLOTS["ablate"], "Validation loss of every form", "\n\n".join(body), [])


def _loss_goals(results: Results, part: str, names: tuple[str, str, str]) -> list[Goal]:
    """What is asked of the losses; names of the paper's form, of softmax, and of softmax with convolution and gate."""
    paper, softmax, fair = names
    what = f"validation loss ({part})"
    bare = Goal(f"{what}: the paper's form over softmax, rotary", "reported")
    pure = Goal(f"{what}: recommended pure stack against softmax, rotary", "below")
    close = Goal(f"{what}: the same against softmax with the same convolution and gate", "at most 1% above")
    hybrid = Goal(f"{what}: hybrid 3:1 against both", "below")
    if {softmax, paper} <= results.keys():
        bare.measured = f"{_signed(_difference(results, paper, softmax))} nats"
    if {softmax, "recommended"} <= results.keys():
        difference = _difference(results, "recommended", softmax)
        pure.measured, pure.reached = f"{_signed(difference)} nats", difference[0] < 0
    if {"recommended", fair} <= results.keys():
        more = _nats(results["recommended"]) / _nats(results[fair]) - 1
        close.measured, close.reached = f"{100 * more:+.1f}%".replace("-", "−"), round(more, 3) <= 0.01
    if {softmax, fair, "hybrid"} <= results.keys():
        both = [_difference(results, "hybrid", other) for other in (softmax, fair)]
        hybrid.measured = " and ".join(f"{_signed(pair)} nats" for pair in both)
        hybrid.reached = max(mean for mean, _ in both) < 0
    return [bare, pure, close, hybrid]


def _best(shown: list[Form], base: str, results: Results) -> str:
    best = min(shown, key=lambda form: _nats(results[form.name]))
    if best.name == base:
        return f"Nothing here is better than {best.title}."
    mean, deviation = difference = _difference(results, best.name, base)
    clear = "" if abs(mean) > 2 * deviation else ", within the noise"
    return f"Best: {best.title} ({_signed(difference)} nats{clear})."


def _decode(result: dict[str, Any] | None, folder: Path, goals: list[Goal]) -> str:
    full, hybrid, pure = decode.FULL_ATTENTION, decode.HYBRID, decode.PURE
    speeds = Goal("decode, pure stack over FA-GPT", "≥ 20x")
    hybrid_speed = Goal("decode there, hybrid 3:1 over FA-GPT", "≥ 2.5x")
    saved = Goal("state there, hybrid against FA-GPT's cache", "75% less")
    constant = Goal("state of the pure stack", "the same at every context")
    prefilled = Goal("prefill, pure stack over FA-GPT", "≥ 10x")
    overhead = Goal("part of a step outside matrix products and attention, ELA-GPT", "≤ 25%")
    scripted = Goal("that step as TorchScript", "not slower than eager")
    goals += [speeds, hybrid_speed, saved, constant, prefilled, overhead, scripted]
    if result is None:
        return NOT_MEASURED
    rows = {(row["model"], row["context"]): row for row in result["contexts"]}
    cached = [context for model, context in rows if model == full]
    longest = GOAL_CONTEXT if GOAL_CONTEXT in cached else max(cached)

    def rate(model: str, context: int) -> float:
        return rows[model, context]["tokens_per_second"] / rows[full, context]["tokens_per_second"]

    speeds.what += f", context {longest:,}"
    speeds.measured, speeds.reached = f"{rate(pure, longest):.1f}x", rate(pure, longest) >= 20
    hybrid_speed.measured, hybrid_speed.reached = f"{rate(hybrid, longest):.1f}x", rate(hybrid, longest) >= 2.5
    less = 1 - rows[hybrid, longest]["state_bytes"] / rows[full, longest]["state_bytes"]
    saved.measured, saved.reached = f"{less:.1%} less", round(less, 2) >= 0.75
    sizes = {row["state_bytes"] for (model, _), row in rows.items() if model == pure}
    constant.measured, constant.reached = ", ".join(f"{size:,} bytes" for size in sorted(sizes)), len(sizes) == 1
    seconds = {row["model"]: row["seconds"] for row in result["prefill"]}
    prefilled.what += f", {result['prefill'][0]['tokens']:,} tokens"
    prefilled.measured = f"{seconds[full] / seconds[pure]:.1f}x"
    prefilled.reached = seconds[full] / seconds[pure] >= 10
    steps = {(row["model"], row["how"]): row for row in result["profile"]}
    overhead.measured, overhead.reached = f"{steps[pure, 'eager']['share']:.0%}", steps[pure, "eager"]["share"] <= 0.25
    faster = steps[pure, "eager"]["microseconds"] / steps[pure, "TorchScript"]["microseconds"]
    scripted.measured, scripted.reached = f"{faster:.2f}x the speed of eager", round(faster, 2) >= 1

    plots.decoding(folder / PLOTS["decode"], result["contexts"])
    table = [
        (
            f"{context:,}",
            model,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['median_tokens_per_second']:,.0f}",
            f"{rate(model, context):.1f}x" if (full, context) in rows else "",
            f"{row['state_bytes'] / 1e6:,.2f}",
            f"{row['state_bytes'] / rows[full, context]['state_bytes']:.1%}" if (full, context) in rows else "",
        )
        for (model, context), row in rows.items()
    ]
    headers = ("context", "model", "tokens/s", "median", "to FA-GPT", "state, MB", "of FA-GPT's")
    prefill = [
        (f"{row['tokens']:,}", row["model"], f"{row['seconds']:.2f}", f"{seconds[full] / row['seconds']:.1f}x")
        for row in result["prefill"]
    ]
    profile = [
        (
            row["model"],
            row["how"],
            f"{row['microseconds']:,.0f}",
            f"{row['work_microseconds']:,.0f}",
            f"{row['share']:.0%}",
            ", ".join(f"{operator} {time:.0f}" for operator, time in row["largest"][:5]),
        )
        for row in result["profile"]
    ]
    said = [
        f"Hybrid over FA-GPT: {', '.join(f'{rate(hybrid, n):.1f}x at {n:,}' for m, n in rows if m == hybrid)}. "
        f"The abstract says up to 6x faster and 75% less: ours are {rate(hybrid, longest):.1f}x and {less:.1%} at "
        f"{longest:,} tokens; the pure stack is {rate(pure, longest):.0f}x there, with "
        f"{rows[full, longest]['state_bytes'] / rows[pure, longest]['state_bytes']:,.0f} times less state."
    ]
    body = [
        _table(headers, table),
        "### Prefill",
        _table(("tokens", "model", "seconds", "to FA-GPT"), prefill),
        "### A step at batch 1",
        _table(("model", "how", "µs", "work, µs", "outside", "largest outside, µs under the profiler"), profile),
    ]
    facts = f"{_machine(result['machine'])}, {_threads(result['threads'])}."
    return _section(facts, PLOTS["decode"], "Tokens per second and state by context", "\n\n".join(body), said)


def _speed(result: dict[str, Any] | None, folder: Path, goals: list[Goal]) -> str:
    at_least = {128: 1.0, 4096: 3.0}
    shapes = (
        {row["length"]: row["ratio"] for row in result["training"] if row["model"] == decode.PURE} if result else {}
    )
    for length, target in at_least.items():
        goal = Goal(f"training step, ELA-GPT over FA-GPT, L = {length:,}", f"≥ {target:g}x")
        if length in shapes:
            goal.measured, goal.reached = f"{shapes[length]:.2f}x", round(shapes[length], 2) >= target
        goals.append(goal)
    moe = [row for row in result["moe"] if row["layer"] == speed.EXPERTS] if result else []
    goal = Goal("layer of experts over a dense one of equal active size, forward and forward+backward", "≥ 0.7x")
    if moe:
        goal.measured = " and ".join(f"{row['ratio']:.2f}x" for row in moe)
        goal.reached = min(round(row["ratio"], 2) for row in moe) >= 0.7
    goals.append(goal)
    if result is None:
        return NOT_MEASURED
    plots.speed(folder / PLOTS["speed"], result["training"], result["moe"])
    steps = [
        (
            f"{row['batch']} x {row['length']:,}",
            row["model"],
            f"{row['seconds'] * 1e3:,.0f}",
            f"{statistics.median(row['samples']) * 1e3:,.0f}",
            f"{row['ratio']:.2f}x",
        )
        for row in result["training"]
    ]
    layers = [
        (
            row["what"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{statistics.median(row['samples']) * 1e3:.2f}",
            f"{row['ratio']:.2f}x",
        )
        for row in result["moe"]
    ]
    body = [
        _table(("batch x length", "model", "ms", "median", "speed, FA-GPT = 1"), steps),
        "### Mixture of experts",
        _table(("layer", "ms", "median", "speed, dense = 1"), layers),
    ]
    facts = f"{_machine(result['machine'])}, {_threads(result['threads'])}."
    return _section(facts, PLOTS["speed"], "Relative speed of training", "\n\n".join(body), [])


def _recall(results: Results, folder: Path) -> str:
    if not results:
        return NOT_MEASURED
    titles = {form.name: form.title for form in forms.RECALL}
    accuracy: dict[str, dict[int, list[float]]] = {}
    steps: dict[str, list[int]] = {}
    for name, runs in results.items():
        best = _best_rate(runs)
        accuracy[name] = {int(n): [run["accuracy"][n] for run in best] for n in best[0]["accuracy"]}
        steps[name] = [run["steps"] for run in best]
    plots.recall(folder / PLOTS["recall"], titles, accuracy)
    pairs = list(next(iter(accuracy.values())))
    rows = [
        (
            titles[name],
            f"{results[name][0]['parameters']:,}",
            *(_share(by_pairs[n]) for n in pairs),
            f"{statistics.mean(steps[name]):,.0f}",
        )
        for name, by_pairs in accuracy.items()
    ]
    hardest = {name: statistics.mean(by_pairs[pairs[-1]]) for name, by_pairs in accuracy.items()}
    said = []
    if {"softmax", "softmax-conv-gate", "recommended", "hybrid"} <= hardest.keys():
        said.append(
            f"At {pairs[-1]} pairs: softmax {hardest['softmax']:.0%}, with convolution and gate "
            f"{hardest['softmax-conv-gate']:.0%}, recommended pure {hardest['recommended']:.0%}, hybrid "
            f"{hardest['hybrid']:.0%}."
        )
    headers = ("model", "parameters", *(f"{n} pairs" for n in pairs), "steps")
    return _section(_facts(results), PLOTS["recall"], "Recall by number of pairs", _table(headers, rows), said)


def _best_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the learning rate with the best mean accuracy."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        by_rate.setdefault(run["identity"]["learning_rate"], []).append(run)
    return max(
        by_rate.values(), key=lambda some: statistics.mean(statistics.mean(r["accuracy"].values()) for r in some)
    )


def _share(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.0%}" + (f" ({low:.0%} to {high:.0%})" if high - low >= 0.01 else "")


def _loss_row(form: Form, results: Results, bases: tuple[str, str]) -> tuple[str, ...]:
    runs = results[form.name]
    nats = [run["nats"] for run in runs]
    differences = []
    for base in bases:
        if base == form.name or base not in results:
            differences.append("")
            continue
        differences.append(_signed(_difference(results, form.name, base)))
    span = f"{min(nats):.3f} to {max(nats):.3f}" if len(nats) > 1 else ""
    return (form.title, f"{runs[0]['parameters']:,}", f"{_nats(runs):.3f}", span, *differences)


def _compared(results: Results, name: str, other: str, subject: str, against: str) -> str:
    if not {name, other} <= results.keys():
        return ""
    mean, deviation = _difference(results, name, other)
    where = "above" if mean > 0 else "below"
    return f"{subject} ends {abs(mean):.3f} ± {deviation:.3f} nats {where} {against}."


def _difference(results: Results, name: str, other: str) -> tuple[float, float]:
    """Mean and standard deviation, over the seeds that both have, of the difference in nats."""
    theirs = {run["seed"]: run["nats"] for run in results[other]}
    values = [run["nats"] - theirs[run["seed"]] for run in results[name] if run["seed"] in theirs]
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _nats(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(run["nats"] for run in runs)


def _range(runs: list[dict[str, Any]]) -> float:
    return max(run["nats"] for run in runs) - min(run["nats"] for run in runs)


def _signed(difference: tuple[float, float]) -> str:
    mean, deviation = difference
    return f"{mean:+.3f} ± {deviation:.3f}".replace("-", "−")


def _row(goal: Goal) -> tuple[str, ...]:
    return goal.what, goal.target, goal.measured, "" if goal.target == "reported" else MARKS[goal.reached]


def _facts(results: Results) -> str:
    """What the runs were, in one paragraph."""
    run = next(iter(results.values()))[0]
    settings = run["identity"].get("training") or run["identity"]["task"]
    model = run["identity"]["model"]
    seeds = sorted({run["seed"] for runs in results.values() for run in runs})
    counts = {len(runs) for runs in results.values()}
    complete = "" if len(counts) == 1 else " Some forms have fewer runs."
    listed = ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items() if name != "seed"
    )
    return (
        f"{_machine(run['machine'])}, one thread for a run. d_model {model['d_model']}, {model['num_layers']} layers, "
        f"{model['num_heads']} heads; {listed}; {len(seeds)} seed{'s' * (len(seeds) != 1)}.{complete}"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _machine(facts: dict[str, Any]) -> str:
    return (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, capability {facts['cpu_capability']}, "
        f"PyTorch {facts['torch']}, elattn {facts['elattn']}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _section(facts: str, plot: str, caption: str, body: str, said: Iterable[str]) -> str:
    meaning = " ".join(sentence for sentence in said if sentence)
    return "\n\n".join(part for part in (facts, f"![{caption}]({plot})", body, meaning) if part)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, ["---"] * len(headers), *rows))
