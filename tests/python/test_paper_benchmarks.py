"""benchmarks/paper: every form is built and trained a few steps, every part writes what the report reads."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.paper import decode, forms, parts, recall, report, speed  # noqa: E402
from benchmarks.paper.jobs import Job, execute  # noqa: E402
from benchmarks.paper.presets import PRESETS  # noqa: E402

from elattn.models import ELAConfig, ELATransformer  # noqa: E402

SMOKE, SMALL = PRESETS["smoke"], PRESETS["small"]
VOCAB_SIZE = 256
pytestmark = pytest.mark.usefixtures("one_thread")


def quiet() -> Console:
    return Console(quiet=True)


def test_the_recommended_form_is_that_of_its_preset() -> None:
    made = dataclasses.asdict(forms.config(_form("recommended"), SMALL.ablate, VOCAB_SIZE))
    recommended = ELAConfig.recommended(
        **{name: made[name] for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_hidden")}
    )
    assert made == dataclasses.asdict(recommended)


def test_the_forms_of_the_paper_are_those_of_its_preset() -> None:
    for name, options in (("ela-gpt", {}), ("fa-gpt", {"attention": "softmax"})):
        form = next(form for form in forms.TRAIN if form.name == name)
        made = dataclasses.asdict(forms.config(form, SMALL.train, VOCAB_SIZE))
        sizes = {key: made[key] for key in ("vocab_size", "d_model", "num_layers", "num_heads", "d_hidden")}
        assert made == dataclasses.asdict(ELAConfig.paper(**sizes, **options))


@pytest.mark.parametrize("listed", [forms.TRAIN, forms.ABLATE, forms.RECALL], ids=["train", "ablate", "recall"])
@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_forms_have_equal_parameters(listed: list[forms.Form], preset: str) -> None:
    sizes = getattr(PRESETS[preset], {"train": "train", "attention": "ablate", "recall": "recall"}[listed[0].group])
    counts = {form.name: forms.count_parameters(forms.config(form, sizes, VOCAB_SIZE)) for form in listed if form.equal}
    goal = forms.count_parameters(forms.config(forms.Form("softmax", "", "", forms.SOFTMAX), sizes, VOCAB_SIZE))
    assert len(counts) == len([form for form in listed if form.equal])
    assert all(abs(count / goal - 1) <= 0.02 for count in counts.values()), counts


def test_every_form_trains_once_and_is_reported(tmp_path: Path) -> None:
    for name in parts.TRAINED:
        assert parts.run(name, SMOKE, tmp_path, 1, 1, quiet()) == 0
    found = {name: parts.trained(name, SMOKE, 1, tmp_path) for name in parts.TRAINED}
    assert [list(found[name]) for name in ("train", "ablate", "recall")] == [
        [form.name for form in listed] for listed in (forms.TRAIN, forms.ABLATE, forms.RECALL)
    ]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    for name in parts.TRAINED:
        assert parts.run(name, SMOKE, tmp_path, 1, 1, quiet()) == 0
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}

    figures = report.write(SMOKE, "smoke", tmp_path, 1)
    assert all(form.title in figures["ablate"] for form in forms.ABLATE)
    assert figures["decode"] == figures["speed"] == report.NOT_MEASURED
    assert all((tmp_path / report.PLOTS[name]).exists() for name in parts.TRAINED)


def test_timed_parts_are_reported(tmp_path: Path) -> None:
    for name in parts.TIMED:
        parts.run(name, SMOKE, tmp_path, 1, 1, quiet())
    figures = report.write(SMOKE, "smoke", tmp_path, 1)
    assert "1,024" in figures["decode"] and "forward+backward" in figures["speed"]
    assert figures["train"] == report.NOT_MEASURED
    rows = json.loads((tmp_path / "decode.json").read_text())["contexts"]
    assert {row["model"] for row in rows if row["context"] == 1024} == {decode.PURE, decode.RECOMMENDED}


def test_documentation_has_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text((ROOT / "docs/results.md").read_text())
    report.write_docs(path, {name: f"figures of {name}" for name in report.SECTIONS})
    text = path.read_text()
    assert all(f"figures of {name}\n\n<!-- {name}: end -->" in text for name in report.SECTIONS)
    path.write_text(text.replace("<!-- speed: end -->", ""))
    with pytest.raises(ValueError, match="speed: end"):
        report.write_docs(path, {"speed": ""})


def test_a_run_with_other_settings_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "form-seed0.json"
    for steps, failures in ((1, 0), (2, 0), (0, 1)):
        assert execute([Job(path, "form", 0, {"steps": steps}, _run)], 1, quiet()) == failures
    assert json.loads(path.read_text())["identity"] == {"steps": 2}
    path.write_text("cut sho")
    assert Job(path, "form", 0, {"steps": 2}, _run).result() is None


def test_recall_asks_every_key_once_and_expects_its_value() -> None:
    for pairs in (4, 8, 32):
        ids, targets = recall.make_batch(pairs, 5, 128, seed=0)
        assert ids.shape == targets.shape == (5, recall.length(pairs))
        for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
            stated = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
            asked = {row[t]: value for t, value in enumerate(wanted) if value != -100}
            assert asked == stated and len(stated) == pairs
            assert all(t >= 2 * pairs for t, value in enumerate(wanted) if value != -100)


def test_accuracy_is_that_of_the_answers() -> None:
    class Oracle(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            # Half of the keys, the even ones, are answered rightly.
            logits = torch.zeros(*ids.shape, 64)
            for b, row in enumerate(ids.tolist()):
                stated = dict(zip(row[0:16:2], row[1:16:2], strict=True))
                for t, token in enumerate(row):
                    logits[b, t, stated.get(token, 0) if token % 2 == 0 else 0] = 1
            return logits

    ids, targets = recall.make_batch(8, 16, 64, -8)
    even = float((ids[targets != -100] % 2 == 0).double().mean())
    task = {"eval_sequences": 16, "vocab_size": 64}
    assert recall.accuracy(Oracle(), 8, task) == pytest.approx(even)


def test_a_state_at_a_context_holds_as_much_as_one_that_was_computed() -> None:
    for name, config in decode.configs(paper_size=False).items():
        model = ELATransformer(config)
        ids = torch.randint(config.vocab_size, (1, 80))
        _, computed = model.prefill(ids, model.new_state(1, 80))
        filled = decode.state_at(model, 80, 8)
        assert decode.state_bytes(filled, 80) == decode.state_bytes(computed, 80), name
        assert all(int(x) == 80 for x in filled if x.dtype == torch.int64), name
        model.step(ids[:, 0], filled)


def test_a_wrong_mixture_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = speed.MoE.forward
    monkeypatch.setattr(speed.MoE, "forward", lambda self, x: (1.01 * forward(self, x)[0], 0))
    with pytest.raises(AssertionError, match=r"mixture of experts: off by 0\.01"):
        speed.moe(SMOKE.speed, paper_size=False)


def _form(name: str) -> forms.Form:
    return next(form for form in forms.ABLATE if form.name == name)


def _run(steps: int) -> dict[str, object]:
    if steps == 0:
        raise ValueError("no steps")
    return {"summary": "done"}
