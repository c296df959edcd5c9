"""The command `elattn`."""

from elattn.cli.app import main

__all__ = ["main"]
