"""Files that are read whole, up to a size that no honest one has.

A file that is larger is refused after that many bytes, whatever it calls itself: a link to /dev/zero too.
"""

from pathlib import Path


def read_bytes(path: Path, at_most: int) -> bytes:
    """The content. Raises ValueError for more than `at_most` bytes, OSError for what is no file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a device or a pipe, not a file")  # a pipe would be waited for
    with path.open("rb") as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"{path} has more than {at_most:,} bytes: no file of its kind is that large")
    return content


def read_text(path: Path, at_most: int) -> str:
    """`read_bytes` of UTF-8. Raises ValueError for other text."""
    try:
        return read_bytes(path, at_most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_beginning(path: Path, at_most: int = 2**16) -> str:
    """The first bytes of a text in any encoding that begins as ASCII; others become U+FFFD."""
    with path.open("rb") as file:
        return file.read(at_most).decode("utf-8", errors="replace")
