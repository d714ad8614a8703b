"""Side-by-side measurements against the references. Not installed with the package."""
