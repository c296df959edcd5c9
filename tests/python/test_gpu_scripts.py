"""What `make gpu-check` and its benchmarks decide, as far as it can be seen without a GPU."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gpu_check  # noqa: E402
from benchmarks import goals, gpu_model, registry  # noqa: E402
from benchmarks.machine import GpuCeilings  # noqa: E402
from benchmarks.measure import Row  # noqa: E402
from gpu_check import Stage  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for folder in ("logs", "reports"):
        (tmp_path / folder).mkdir()
    return tmp_path


def run(stages: list[Stage], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = gpu_check.run(stages, out, gpu_check.time.monotonic() + 60)
    return code, capsys.readouterr().out


def test_a_stage_that_fails_does_not_stop_the_next(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = out / "ran"
    stages = [
        Stage("broken", 30, [python("print('why'); raise SystemExit(3)"), python("raise AssertionError")]),
        Stage("slow", 0.5, [python("import time; time.sleep(60)")]),
        Stage("gone", 30, [["/no/such/program"]]),
        Stage("last", 30, [python(f"open({str(marker)!r}, 'w')")], {"ELATTN_SOME_SETTING": "1"}),
    ]
    code, printed = run(stages, out, capsys)
    assert code == 1 and marker.exists()
    for line in ("failed with exit code 3", "out of time", "/no/such/program: No such file", "passed", "FAILED"):
        assert line in printed
    assert "why" in (out / "logs" / "broken.log").read_text()
    assert "AssertionError\n" not in (out / "logs" / "broken.log").read_text()


@pytest.mark.parametrize("optional", [True, False])
def test_what_is_missing_is_said(optional: bool, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        Stage("tests", 1, [["never"]], has_report=True, missing="it is not installed", optional=optional),
        Stage("other", 30, [python("")]),
    ]
    code, printed = run(stages, out, capsys)
    assert "not run: it is not installed" in printed
    assert code == (0 if optional else 1)


def test_tests_that_leave_no_report_fail(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run([Stage("tests", 30, [python("")], has_report=True)], out, capsys)
    assert code == 1 and "did not run to its end" in printed


def test_the_plan_is_for_this_gpu_and_these_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "has", lambda module: module not in ("hypothesis", "xdist", "matplotlib"))
    monkeypatch.setattr(gpu_check, "has_catch2", lambda: False)
    monkeypatch.setattr(gpu_check, "tool", lambda name: None)
    stages = {stage.name: stage for stage in gpu_check.plan(tmp_path, tmp_path / "build", "9.0", 4)}
    assert stages["build"].environment == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    assert stages["build"].commands[1][-2:] == ["--target", "elattn"]
    (operators,) = stages["operators"].commands
    assert "-n" not in operators and not any("adversarial" in word for word in operators)
    assert all(Path(word).exists() for word in operators if word.endswith(".py"))
    assert stages["operators"].environment["ELATTN_REQUIRE_GPU"] == "1"
    assert stages["primitives"].missing and stages["primitives"].optional
    assert stages["memcheck"].missing and stages["memcheck"].optional
    assert "matplotlib" in stages["bench"].missing and not stages["bench"].optional


def test_the_model_counts_the_instructions_that_the_gate_finds() -> None:
    files = json.loads((ROOT / "tests/cuda_gate/budget.json").read_text())["files"]

    def mma(file: str, kernel: str) -> int:
        return files[f"cuda/chunked/{file}.cu"][kernel]["exactly"]["HMMA"]

    for size in (64, 128):
        for values in (64, 128):
            outputs = f"chunked::output_kernel<{size}, {values if size == 64 else '*'}>"
            assert gpu_model.forward_mma(size) == mma("forward", outputs)
            queries = f"chunked::scan_kernel<*QueryScan<{size}, {values}>, true>"
            assert gpu_model.query_scan_mma(size, values) == mma("backward", queries)
        assert gpu_model.state_mma(size) == mma("forward", f"chunked::state_kernel<{size}, *>")
        assert gpu_model.state_mma(size) == mma("backward", f"chunked::state_kernel<*<*, {size}*>>")
        both = f"chunked::scans_kernel<*ReverseScan<{size}, {size}, *>"
        assert 2 * gpu_model.reverse_scan_mma(size) == mma("backward", f"{both}, true>")
        assert 2 * gpu_model.bidirectional_scan_mma(size) == mma("backward", f"{both}, false>")
        queries = f"chunked::scan_kernel<*QueryScan<*, {size}>, false>"
        assert gpu_model.bidirectional_scan_mma(size) == mma("backward", queries)
    assert gpu_model.reverse_scan_mma(128) == mma("backward", "chunked::scan_kernel<*ReverseScan<*>, true>")


def test_goals_of_a_gpu() -> None:
    """A forward at exactly the bandwidth, and softmax attention that takes 12 times as long."""
    ceilings = GpuCeilings()
    ceilings.bandwidth_samples, ceilings.mm_samples = [1e12], [1e18]
    runs = [run for case in registry.gpu_cases() for run in case.runs if run.head_dim == 64]
    rows = []
    for run in runs:
        tokens = run.batch * run.heads * run.length
        slower = {registry.ELATTN: 1, registry.ELATTN_GRAPH: 2}.get(run.peer, 12)
        case = "peers" if run.batch == 4 and run.mode != registry.STEP else "step"
        rows.append(Row(case, run, seconds=slower * tokens * run.traffic / 1e12))
    reached = {goal.what: goal for goal in goals.evaluate_gpu(rows, goals.Extras({}, None, None), ceilings)}
    forward = reached["forward, D = 64, bfloat16, B = 4, H = 16, L = 8,192"]
    assert forward.measured == "1.00 of the bound" and forward.reached
    assert reached["scaled_dot_product_attention, D = 64, L = 32,768"].measured == "12.00x"
    step = reached["a step, B ≥ 64, in a graph"]
    assert step.measured == "0.50 of the bandwidth" and step.reached is False
    assert reached["forward, D = 128, bfloat16, B = 4, H = 16, L = 8,192"].reached is None
