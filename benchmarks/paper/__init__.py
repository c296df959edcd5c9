"""What the paper claims, measured with our own models: `python -m benchmarks.paper`, in the repository root."""
