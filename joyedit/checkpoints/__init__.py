"""Configs and weights: where files come from, how they are read and written, what a network is."""
