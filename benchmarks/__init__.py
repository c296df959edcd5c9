"""How fast elattn is, beside what it replaces: `make bench`, or `python -m benchmarks.run` in the repository root."""
