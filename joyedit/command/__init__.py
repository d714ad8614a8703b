"""The `joyedit` command: what it takes, and what it does with it."""
