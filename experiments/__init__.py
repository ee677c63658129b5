"""The experiments behind the README's results: grids of pretrain.py + evaluate.py runs, resumable, one JSON
line a run.
"""
