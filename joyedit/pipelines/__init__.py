"""Pipelines, one algorithm per file."""
