"""All evidence of one GPU by one command: `python -m benchmarks.gpu --out gpu.json`. See `__main__.py`."""
