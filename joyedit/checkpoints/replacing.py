"""Writing files and folders so that there is the old one or the new one, never half of either.

What is being made lies in a hidden folder beside its place, `.joyedit-*/made`, under its own name, and is
moved into place when it is whole. Several files appear together. Ctrl-C and the signals that end a process
wait while something is being moved or cleared away, and then act; a process that dies at once (SIGKILL, a
power failure) leaves its hidden folder behind, which the next one that writes there clears away: a lock on
the folder tells whether its maker lives.

Without `force` nothing that exists is replaced, not even what appeared while the new one was being made.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: there, nothing of another process is cleared away
    fcntl = None

PREFIX = ".joyedit-"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
HERE, EXCHANGE = -100, 2  # of renameat2: AT_FDCWD, RENAME_EXCHANGE
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What torch and safetensors say of a full disk, in errors that are no OSError.
DISK_FULL_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed",
    "iostream error",
    "unexpected pos",
)


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = True) -> Iterator[Path]:
    """Write to the path that this yields; afterwards the file is at `path`, or after a failure nothing is.

    Raises FileExistsError for a path that exists, or has come to exist, without `force`; OSError that names
    `path` where the disk is full.
    """
    with replacing_all([path], force=force) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(
    paths: Sequence[Path], *, force: bool = True, removing: Iterable[Path] = ()
) -> Iterator[list[Path]]:
    """`replacing` for several files that appear together, in their order. removing: what goes then."""
    for path in paths:
        if not force:
            refuse_existing(path)
    with _SignalsHeld() as signals, contextlib.ExitStack() as clearing:
        places = {path.parent: clearing.enter_context(workplace(path.parent)) for path in paths}
        made = [places[path.parent] / "made" / path.name for path in paths]
        try:
            with signals.allowed():
                yield made
        except Exception as error:
            _refuse_full_disk(paths, error)
            raise
        for temporary, path in zip(made, paths, strict=True):
            _place(temporary, path, force)
        for path in removing:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, may_replace: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Fill the folder that this yields, which is not there yet; afterwards it is at `folder`.

    may_replace: raises an error for a folder that holds what must not be lost; without it, a `folder` that is
    not empty stays, and raises FileExistsError. It is asked before and, of what is there then, after the
    work.
    """
    refuse_filled(folder, may_replace)
    with _SignalsHeld() as signals, workplace(folder.parent) as place:
        made, replaced = place / "made" / folder.name, place / "replaced" / folder.name
        try:
            with signals.allowed():
                yield made
        except Exception as error:
            _refuse_full_disk([folder], error)
            raise
        refuse_filled(folder, may_replace)
        if os.path.lexists(folder):
            if swap(made, folder):  # the old one is cleared away with the place
                return
            os.rename(folder, replaced)  # who is killed now leaves it there; the next one puts it back
        try:
            made.rename(folder)
        except OSError as error:
            if os.path.lexists(replaced):
                os.rename(replaced, folder)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(f"{folder} has come to exist meanwhile: nothing is replaced") from None
            raise


def swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that there is none between; whether the system can: Linux, on most
    file systems."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):  # Windows, macOS, old C libraries
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError for anything at `path`, a link to nothing included."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: pass force=True to replace it")


def refuse_filled(folder: Path, may_replace: Callable[[Path], None] | None) -> None:
    """Raises NotADirectoryError for what is no folder, FileExistsError for one that holds something, unless
    `may_replace` lets it pass."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}, not a folder")
    if any(folder.iterdir()):
        if may_replace is None:
            raise FileExistsError(f"{folder} exists and is not empty")
        may_replace(folder)


class _SignalsHeld:
    """While this is entered, signals that would end the process wait; outside the main thread nothing does.

    Python runs handlers in the main thread between two instructions: without this, an interrupt could come
    between making something and noting that it must be cleared away.
    """

    def __enter__(self) -> "_SignalsHeld":
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}
        self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        self._release()
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (
                None,
                signal.SIG_IGN,
            ):  # None: set by other than Python, and not to be restored
                self._before[number] = handler
                signal.signal(number, self._wait)

    def _release(self) -> None:
        ended: BaseException | None = None
        while self._before:
            number, handler = next(iter(self._before.items()))
            try:
                signal.signal(number, handler)
                del self._before[number]
            except BaseException as error:  # of a handler that was put back a moment ago
                ended = error
        if ended is not None:
            raise ended
        while self._waiting:
            signal.raise_signal(self._waiting.pop())

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append(number)


@contextlib.contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent` with the folders made/ and replaced/, this process's own, cleared away in
    the end."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_remains(parent)
    place, lock = _locked_folder(parent)
    try:
        for name in ("made", "replaced"):
            (place / name).mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        place = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        if fcntl is None:
            return place, None
        with contextlib.suppress(FileNotFoundError):  # taken for remains before it was locked
            lock = os.open(place, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if place.exists():
                return place, lock
            os.close(lock)


def clear_remains(parent: Path) -> None:
    """Clear away what processes that died have left in `parent`; a folder that one was about to replace is
    put back into its place."""
    if fcntl is None:
        return
    with os.scandir(parent) as entries:
        remains = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    for place in remains:
        with contextlib.suppress(OSError):  # another user's, or cleared away by somebody else just now
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for old in (place / "replaced").glob("*"):
                    if not os.path.lexists(parent / old.name):
                        os.rename(old, parent / old.name)
                shutil.rmtree(place)
            finally:
                os.close(lock)


def _place(temporary: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename it fails where something is
    except FileExistsError:
        raise FileExistsError(f"{path} has come to exist meanwhile: nothing is replaced") from None
    except OSError:  # a file system without links: the name is taken first, then given its content
        with path.open("xb"):
            pass
        os.replace(temporary, path)


def _refuse_full_disk(paths: Sequence[Path], error: Exception) -> None:
    """Raises OSError that names the files, if that error comes of a full disk."""
    number = error.errno if isinstance(error, OSError) and error.errno in DISK_FULL else None
    if number is None and any(words in str(error) for words in DISK_FULL_WORDS):
        number = errno.ENOSPC
    if number is not None:
        names = ", ".join(map(str, paths[:3])) + ", ..." * (len(paths) > 3)
        raise OSError(number, f"{os.strerror(number)}: {names} cannot be written") from error
