"""Names of files and folders as a person writes them."""

from pathlib import Path


def expanded(name: str | Path) -> Path:
    """The path, with `~` as the home folder. Raises ValueError for the home of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}: there is no user of that name") from None
