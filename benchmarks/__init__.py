"""Speed side by side with peers: `python -m benchmarks.NAME`, one command each."""
