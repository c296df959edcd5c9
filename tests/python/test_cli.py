"""The command `elattn`: training, resuming, generating, exporting, and the mistakes that a user can make."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from elattn._library import library_path
from elattn.cli import app as app_module
from elattn.cli import main
from elattn.cli.generate import until
from elattn.data import load_tokenizer
from elattn.models import ELAConfig, ELATransformer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "--batch-size", "4", "--context", "32", "--eval-every", "10", "--d-model", "16", "--layers", "1", "--heads", "2",
    "--d-hidden", "16", "--warmup", "2",
]  # fmt: skip
LONG = [*SMALL, "--eval-every", "40"]  # the last of equal options counts


@dataclass
class Run:
    code: int
    stdout: str
    stderr: str


def run_here(*arguments: object, stdin: bytes = b"") -> Run:
    """Runs the command in this process, which is much faster than to start Python and PyTorch each time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["elattn", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setenv("COLUMNS", "200")
        code: object = 0
        try:
            main()
        except SystemExit as stop:  # a string is printed to stderr by the interpreter, with exit code 1
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    return Run(int(code), out.getvalue(), err.getvalue())


def run_process(*arguments: object) -> Run:
    command = [sys.executable, "-m", "elattn", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return Run(run.returncode, run.stdout, run.stderr)


def elattn(*arguments: object, check: int = 0, stdin: bytes = b"") -> Run:
    run = run_here(*arguments, stdin=stdin)
    assert run.code == check, run
    return run


def mistake(*arguments: object, run: Callable[..., Run] = run_here) -> str:
    """Runs a command that must fail with one line on stderr, no traceback, and returns the line."""
    found = run(*arguments)
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    assert found.code == 1, found
    assert len(lines) == 1 and lines[0].startswith("elattn: "), found.stderr
    assert "Traceback" not in found.stdout
    return lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text with structure to learn."""
    words = random.Random(0).choices(["the ", "cat ", "sat ", "on ", "a ", "mat. ", "dog ", "ran. "], k=3000)
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def run(one_thread: None, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps."""
    out = tmp_path_factory.mktemp("run") / "model"
    elattn("train", "--data", text, "--out", out, "--steps", 20, *SMALL)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_train_leaves_a_model_a_log_and_a_curve(run: Path) -> None:
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    entries = log_of(run)
    assert entries[-1]["step"] == 20
    bits = [entry["bits_per_byte"] for entry in entries if "bits_per_byte" in entry]
    assert len(bits) == 2 and bits[-1] < bits[0] < 8.5
    model = ELATransformer.from_pretrained(run / "best")
    assert model(torch.randint(256, (1, 5))).shape == (1, 5, 256)
    assert not [name for name in contents(run) if "partial" in name]


def test_equal_seeds_give_equal_models(run: Path, text: Path, tmp_path: Path) -> None:
    elattn("train", "--data", text, "--out", tmp_path / "again", "--steps", 20, *SMALL)
    other = contents(tmp_path / "again")
    for name, content in contents(run).items():
        if name.endswith("model.safetensors"):
            assert other[name] == content, name
    elattn("train", "--data", text, "--out", tmp_path / "seed", "--steps", 20, "--seed", 1, *SMALL)
    assert contents(tmp_path / "seed")["last/model.safetensors"] != contents(run)["last/model.safetensors"]


def interrupted(text: Path, out: Path, steps: int) -> Run:
    """Trains, and presses Ctrl-C once the first checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "elattn", "train", "--data", str(text), "--out", str(out), "--steps", str(steps), *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process, or sums would round differently
    )
    try:
        deadline = time.monotonic() + 100
        while not (out / "last" / "training.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    return Run(process.returncode, stdout, stderr)


def test_ctrl_c_leaves_a_checkpoint_and_resuming_is_exact(text: Path, tmp_path: Path) -> None:
    steps = 240
    stopped = interrupted(text, tmp_path / "stopped", steps)
    assert stopped.code == 130, stopped
    assert "Traceback" not in stopped.stderr and "--resume" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1
    ELATransformer.from_pretrained(tmp_path / "stopped" / "last")
    ELATransformer.from_pretrained(tmp_path / "stopped" / "best")
    before = log_of(tmp_path / "stopped")[-1]["step"]
    assert 0 < before < steps

    elattn("train", "--data", text, "--out", tmp_path / "stopped", "--steps", steps, *LONG, "--resume")
    elattn("train", "--data", text, "--out", tmp_path / "whole", "--steps", steps, *LONG)
    resumed, whole = contents(tmp_path / "stopped"), contents(tmp_path / "whole")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert resumed[name] == whole[name], name
    bits = [
        [(e["step"], e["bits_per_byte"]) for e in log_of(tmp_path / n) if "bits_per_byte" in e]
        for n in ("stopped", "whole")
    ]
    assert bits[0] == bits[1]


def test_generate(run: Path) -> None:
    arguments = ("generate", run, "--prompt", "the cat", "--new-tokens", 20)
    first, second = (elattn(*arguments, "--temperature", 0) for _ in range(2))
    assert first.stdout == second.stdout and "tokens/s" in first.stderr
    assert elattn(*arguments, "--seed", 1).stdout == elattn(*arguments, "--seed", 1).stdout
    model = ELATransformer.from_pretrained(run / "best")
    ids = torch.tensor([list(b"the cat")])
    expected = bytes(model.generate(ids, 20, temperature=0)[0, 7:].tolist()).decode(errors="replace")
    assert first.stdout == expected + "\n"


def test_generate_reads_stdin_and_stops(run: Path) -> None:
    whole = elattn("generate", run, "--new-tokens", 60, "--temperature", 0, stdin=b"the cat").stdout
    assert whole == elattn("generate", run, "--prompt", "the cat", "--new-tokens", 60, "--temperature", 0).stdout
    stop = whole[5:8]
    stopped = elattn("generate", run, "--new-tokens", 60, "--temperature", 0, "--stop", stop, stdin=b"the cat").stdout
    assert stopped == whole[: whole.index(stop)] + "\n"


def test_a_conversation_goes_on_from_its_state(run: Path, tmp_path: Path) -> None:
    """As if all of it, prompts and continuations, were one prompt."""
    model, state = ELATransformer.from_pretrained(run / "best"), tmp_path / "state"
    ids: list[int] = []
    for prompt in ("the cat", " sat", " on "):
        files = ("--state-in", state) if ids else ()
        ids += prompt.encode()
        new = model.generate(torch.tensor([ids]), 20, temperature=0)[0, len(ids) :].tolist()
        ids += new
        found = elattn(
            "generate", run, "--temperature", 0, "--new-tokens", 20, *files, "--state-out", state, stdin=prompt.encode()
        )
        assert found.stdout == bytes(new).decode(errors="replace") + "\n"


def test_subwords_from_training_to_generation(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    elattn("train", "--data", text, "--out", out, "--steps", 10, "--vocab-size", 270, *SMALL, "--cache", tmp_path / "c")
    assert not (out / "cache").exists()
    model, tokenizer = ELATransformer.from_pretrained(out / "best"), load_tokenizer(out / "best")
    assert model.config.vocab_size == 270
    ids = torch.tensor([tokenizer.encode("the cat")])
    expected = tokenizer.decode(model.generate(ids, 20, temperature=0, eos_id=0)[0, ids.size(1) :].tolist())
    found = elattn("generate", out, "--prompt", "the cat", "--temperature", 0, "--new-tokens", 20).stdout
    assert found == expected + "\n"
    for folder in ("", "best", "last"):
        (out / folder / "tokenizer.json").rename(out / folder / "moved.json")
    assert "no tokenizer.json" in mistake("generate", out, "--prompt", "a")
    given = ("train", "--data", text, "--tokenizer", out / "moved.json", "--steps", 10, *SMALL, "--out", tmp_path / "b")
    elattn(*given)
    weights = [(folder / "last" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "b")]
    assert ELAConfig.from_json((tmp_path / "b" / "last" / "config.json").read_text()).vocab_size <= 270
    assert len(weights[0]) >= len(weights[1])


def config_of(out: Path, *options: object, check: str | None = None) -> ELAConfig:
    arguments = ("train", "--out", out, "--steps", 1, "--batch-size", 1, "--context", 8, "--eval-every", 1, *options)
    elattn(*arguments)
    return ELAConfig.from_json((out / "last" / "config.json").read_text())


def test_every_field_of_the_model_has_an_option(text: Path, tmp_path: Path) -> None:
    expected = ELAConfig(
        vocab_size=256, d_model=24, num_layers=3, num_heads=4, num_kv_heads=2, d_hidden=8, num_experts=3, top_k=1,
        moe_bias="inner", tie_labels=False, kernel="sum_sq", rotary=True, decay="head", short_conv=3, gate=False,
        attention="linear", full_attention_every=3, hyper_link="dense", memory_lobe="depth", aux_coef=0.5,
        final_norm=False, tie_embeddings=False, max_seq_len=64,
    )  # fmt: skip
    options = [
        "--d-model", 24, "--layers", 3, "--heads", 4, "--kv-heads", 2, "--d-hidden", 8, "--experts", 3, "--top-k", 1,
        "--moe-bias", "inner", "--free-labels", "--kernel", "sum_sq", "--rotary", "--decay", "head", "--short-conv", 3,
        "--no-gate", "--attention", "linear", "--full-attention-every", 3, "--hyper-link", "dense", "--memory-lobe",
        "depth", "--aux-coef", 0.5, "--no-final-norm", "--free-embeddings", "--max-seq-len", 64,
    ]  # fmt: skip
    assert config_of(tmp_path / "options", "--data", text, *options) == expected
    (tmp_path / "config.json").write_text(expected.to_json())
    file = ("--data", text, "--config", tmp_path / "config.json")
    assert config_of(tmp_path / "file", *file) == expected
    assert config_of(tmp_path / "both", *file, "--memory-lobe", "none", "--rotary").memory_lobe is None


def test_presets(text: Path, tmp_path: Path) -> None:
    small = ("--data", text, "--d-model", 16, "--layers", 1, "--d-hidden", 8)
    paper = config_of(tmp_path / "paper", "--preset", "paper", *small)
    assert paper == ELAConfig.paper(vocab_size=256, d_model=16, num_layers=1, d_hidden=8)
    recommended = config_of(tmp_path / "recommended", "--preset", "recommended", *small, "--no-gate")
    assert recommended == ELAConfig.recommended(vocab_size=256, d_model=16, num_layers=1, d_hidden=8, gate=False)


def test_bench(run: Path) -> None:
    out = elattn("bench", run, "--length", 32, "--length", 64).stdout
    state = sum(x.numel() * x.element_size() for x in ELATransformer.from_pretrained(run / "best").new_state(1))
    assert "tokens/s" in out and out.count(f" {state:,} ") == 2, out
    assert "preset demo" in elattn("bench", "--length", 16).stdout


def test_stops_are_found_across_pieces() -> None:
    text = "one two three two"
    for stops, expected in ((["two"], "one "), (["none"], text), (["e t", "thr"], "on"), (["twin", "two t"], "one ")):
        for size in (1, 2, 5, 50):
            pieces = list(until((text[i : i + size] for i in range(0, len(text), size)), stops))
            assert "".join(pieces) == expected, (stops, size)
    assert list(until(iter(["a", "b", "x", "c"]), ["xy"])) == ["a", "b", "xc"], "held back no longer than needed"


def test_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.pt"
    elattn("export", run, file)
    ids = torch.randint(256, (1, 5))
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(ids), ELATransformer.from_pretrained(run / "best")(ids))
    before = file.read_bytes()
    assert "--overwrite" in mistake("export", run, file)
    assert file.read_bytes() == before
    elattn("export", run, file, "--overwrite")
    monkeypatch.setattr(app_module, "export_aoti", lambda model, path: path.write_text("compiled"))
    elattn("export", run, tmp_path / "step.pt2", "--format", "aoti")
    assert (tmp_path / "step.pt2").read_text() == "compiled"


def test_info() -> None:
    out = elattn("info").stdout
    for word in ("elattn", "PyTorch", torch.__version__, "hadamard_exp", str(library_path())):
        assert word in out


def test_help_names_every_command_and_option() -> None:
    out = elattn("--help").stdout
    for command in ("train", "generate", "export", "bench", "info"):
        assert command in out
        elattn(command, "--help")


# Mistakes: one line, exit code not 0, nothing overwritten


def test_bad_texts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = {
        "empty.txt": b"",
        "blank.txt": b"  \n \n",
        "binary.bin": bytes(range(256)) * 100,
        "zeros.txt": b"a\0b" * 1000,
        "short.txt": b"short",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("missing.txt", *files):
        line = mistake("train", "--data", tmp_path / name, "--out", out, "--steps", 2, *SMALL)
        assert name in line or "longer text" in line, line
        assert not out.exists(), name
    (tmp_path / "folder").mkdir()
    assert "no text files" in mistake("train", "--data", tmp_path / "folder", "--out", out, "--steps", 2, *SMALL)
    assert not out.exists()


def test_an_earlier_run_is_not_overwritten(run: Path, text: Path) -> None:
    before = contents(run)
    line = mistake("train", "--data", text, "--out", run, "--steps", 20, *SMALL)
    assert "--resume" in line and "--overwrite" in line
    assert contents(run) == before


def test_resuming_with_other_options_or_another_text_is_refused(run: Path, text: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert "steps = 20, not 30" in mistake("train", "--data", text, "--out", run, "--steps", 30, *SMALL, "--resume")
    changed = text.read_text()
    text.write_text(changed + "and more.")
    assert "text has changed" in mistake("train", "--data", text, "--out", run, "--steps", 20, *SMALL, "--resume")
    text.write_text(changed)
    assert contents(run) == before
    line = mistake("train", "--data", text, "--out", tmp_path / "new", "--steps", 20, *SMALL, "--resume")
    assert "nothing to resume" in line


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "half"])
def test_corrupt_checkpoints(damage: bytes | None, run: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name, content in contents(run).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    for name in ("last/training.safetensors", "best/model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2] if damage is None else damage)
    before = contents(copy)
    assert "cannot be read" in mistake("train", "--data", text, "--out", copy, "--steps", 20, *SMALL, "--resume")
    assert "cannot be read" in mistake("generate", copy, "--prompt", "a")
    assert "cannot be read" in mistake("export", copy, tmp_path / "model.pt")
    assert contents(copy) == before and not (tmp_path / "model.pt").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert "cannot read" in mistake(
        "train", "--data", tmp_path / "missing.txt", "--out", tmp_path / "out", run=run_process
    )


def test_other_mistakes(run: Path, tmp_path: Path) -> None:
    assert "no model in" in mistake("generate", tmp_path, "--prompt", "a")
    assert "at least one token" in mistake("generate", run, "--prompt", "")
    assert "not UTF-8" in mistake("generate", run, run=lambda *a: run_here(*a, stdin=b"\xff"))
    assert "temperature" in mistake("generate", run, "--prompt", "a", "--temperature", -1)
    assert "--stop must not be empty" in mistake("generate", run, "--prompt", "a", "--stop", "")
    assert "no state file" in mistake("generate", run, "--prompt", "a", "--state-in", tmp_path / "none")
    assert "no folder" in mistake("generate", run, "--prompt", "a", "--state-out", tmp_path / "none" / "state")
    assert "no folder" in mistake("export", run, tmp_path / "none" / "model.pt")
    assert "must be cpu or cuda" in mistake("bench", run, "--device", "tpu")
    (tmp_path / "paper.json").write_text(ELAConfig.paper().to_json())
    (tmp_path / "bad.json").write_text('{"vocab_size": 256, "layers": 2}')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    for message, options in {
        "kernel must be one of": ("--kernel", "softmax"),
        "multiple of num_heads": ("--d-model", 30, "--heads", 4),
        "top_k must be 1..num_experts = 4": ("--experts", 4, "--top-k", 5),
        "steps must be positive": ("--steps", 0),
        "exclude each other": ("--resume", "--overwrite"),
        "--preset must be one of": ("--preset", "huge"),
        "--preset and --config exclude": ("--preset", "demo", "--config", tmp_path / "paper.json"),
        "bad.json: ELAConfig: unknown key 'layers'": ("--config", tmp_path / "bad.json"),
        "cannot read": ("--config", tmp_path / "missing.json"),
        "vocab_size 6400, but tokens are bytes": ("--config", tmp_path / "paper.json"),
        "line 2 has no field 'text' (it has: title)": ("--data", tmp_path / "bad.jsonl"),
        "more than the 256 bytes": ("--vocab-size", 100),
        "device must be cpu or cuda": ("--device", "tpu"),
    }.items():
        assert message in mistake("train", "--out", tmp_path / "out", *options), message
        assert not (tmp_path / "out").exists()


def test_options_of_the_wrong_type_are_refused() -> None:
    """Reported by the option parser, with its own layout and exit code 2."""
    for arguments in (["train"], ["train", "--out", "x", "--steps", "many"], ["nonsense"], ["generate"]):
        run = elattn(*arguments, check=2)
        assert "Traceback" not in run.stderr and run.stderr.strip()
