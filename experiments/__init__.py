"""The experiments behind docs/results.md: grids of pretrain.py + evaluate.py runs, resumable, one JSON
line a run.
"""
