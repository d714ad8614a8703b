"""The drawn world on which the small checkpoints are trained and judged."""
