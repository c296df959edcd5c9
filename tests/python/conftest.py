import zlib
from collections.abc import Iterator

import pytest
import torch

from backend import BACKEND, DEVICE


def pytest_configure(config: pytest.Config) -> None:
    if BACKEND == "cuda":
        torch.set_default_device(DEVICE)
    # torch.empty then returns NaN, in C++ too: an element that an operator does not write fails every comparison.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for line in (
        "ignore:.*torch.jit.* is (deprecated|not supported).*",
        "ignore:.*does not have a deterministic implementation.*",
        "ignore:The given buffer is not writable.*",
    ):
        config.addinivalue_line("filterwarnings", line)


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
