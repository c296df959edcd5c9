"""The same results from the kernels of each instruction set that this machine can run."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

CAPABILITIES = ("default", "avx2", "avx512")
SCRIPT = """
    import sys
    import torch

    sys.path.insert(0, sys.argv[1])
    from compare import ALL_KERNELS, attention, attention_step, check_backward, check_forward, check_same
    import elattn
    from inputs import qkv

    torch.manual_seed(0)
    results = {}
    for kernel in ALL_KERNELS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for head_dim, value_dim in ((16, 24), (33, 65)):
                q, k, v = qkv(1, 4, 50, head_dim, value_dim, kv_heads=2, dtype=dtype)
                options = {"kernel": kernel, "enable_gqa": True}
                if kernel != "features":
                    options["decay"] = 0.1 * torch.rand(2)
                check_forward(q, k, v, is_causal=True, **options)
                check_backward(q, k, v, is_causal=True, **options)
                options.pop("decay", None)
                check_forward(q, k, v, **options)
                whole = attention(q, k, v, is_causal=True, **options)
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                state = elattn.new_state(1, 2, head_dim, value_dim, kernel=kernel, dtype=wide)
                for t in range(50):
                    check_same(attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, **options), whole[:, :, t])
                results[f"{kernel} {dtype} {head_dim} {value_dim}"] = whole.double()
    torch.save(results, sys.argv[2])
    print(torch.backends.cpu.get_cpu_capability())
"""


def supported(capability: str) -> bool:
    """PyTorch's own names of what the processor has; a lower capability runs on any."""
    have = torch.backends.cpu.get_cpu_capability().lower()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else have
    return capability == "default" or capability in flags or capability == have


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("capabilities")
    found = {}
    for capability in filter(supported, CAPABILITIES):
        path = folder / f"{capability}.pt"
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).parent), str(path)],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert run.returncode == 0, f"{capability}:\n{run.stdout}{run.stderr}"
        print(json.dumps({"ATEN_CPU_CAPABILITY": capability, "path": run.stdout.strip()}))
        assert run.stdout.strip().lower() == capability
        found[capability] = torch.load(path)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_path_passes_the_oracle(capability: str, outputs: dict[str, dict[str, torch.Tensor]]) -> None:
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    assert len(outputs[capability]) == 48


def test_paths_agree(outputs: dict[str, dict[str, torch.Tensor]]) -> None:
    """They order sums alike but round them apart (fused multiply-add), within twice the tolerance of each."""
    from compare import number
    from tolerances import limit, rounding

    for name, expected in outputs["default"].items():
        dtype = getattr(torch, name.split()[1].removeprefix("torch."))
        tolerance = 2 * limit(number(name.split()[0]), dtype) + 2 * rounding(expected, dtype)
        for capability, results in outputs.items():
            assert ((results[name] - expected).abs() <= tolerance).all(), f"{name}: {capability}"


def test_each_path_is_another(outputs: dict[str, dict[str, torch.Tensor]]) -> None:
    """ATEN_CPU_CAPABILITY chooses the kernels: vectors of other widths give other bits."""
    for one, two in itertools.pairwise(outputs):
        assert any(not torch.equal(outputs[one][name], outputs[two][name]) for name in outputs[one]), f"{one} = {two}"
