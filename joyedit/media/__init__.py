"""Pictures, masks and films: what comes in, and what goes out."""
