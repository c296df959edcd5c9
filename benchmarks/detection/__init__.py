"""The detector beside an optional peer: `python -m benchmarks.detection`, in the repository root.

The peer is the smallest model of Ultralytics (AGPL-3.0), which nothing else of elattn uses: `pip install ultralytics`.
Without it the rest is measured all the same.
"""
