"""Ctrl-C during training."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["Interrupted", "catch_interrupt"]


class Interrupted(Exception):
    """Training was stopped by Ctrl-C, after a checkpoint was written."""

    def __init__(self, step: int, out: Path) -> None:
        super().__init__(f"stopped after step {step}; {out / 'last'} holds everything needed to go on")
        self.step, self.out = step, out


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that no step is left half done; a second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
