import zlib
from collections.abc import Generator, Iterator

import pytest
import torch

from backend import BACKEND, CPU_CONTRACT, DEVICE, REQUIRE_GPU, missing_gpu


def pytest_configure(config: pytest.Config) -> None:
    if BACKEND == "cuda" and torch.cuda.is_available():
        torch.set_default_device(DEVICE)
    # torch.empty then returns NaN, in C++ too: an element that an operator does not write fails every comparison.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.addinivalue_line("markers", "gpu: needs a GPU; every test does where ELATTN_TEST_BACKEND is cuda")
    for line in (
        "ignore:.*torch.jit.* is (deprecated|not supported).*",
        "ignore:.*does not have a deterministic implementation.*",
        "ignore:The given buffer is not writable.*",
    ):
        config.addinivalue_line("filterwarnings", line)


def is_gpu_test(item: pytest.Item) -> bool:
    return BACKEND == "cuda" or item.get_closest_marker("gpu") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if is_gpu_test(item) and (reason := missing_gpu()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_GPU and report.skipped and is_gpu_test(item):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if CPU_CONTRACT.kwargs["reason"] not in reason:
            report.outcome = "failed"
            report.longrepr = f"ELATTN_REQUIRE_GPU=1 allows no GPU test to be skipped. {reason}"
    return report


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random numbers that depend on the test's name only: the same result alone and in any order."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small PyTorch operations: two threads would wait for each other most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
