"""Weight files that have become shorter since they were mapped.

Reading what is not there any more ends the process: the system sends a signal that Python cannot turn into an
error. So a call looks at the files before it begins.
"""

from collections.abc import Iterable

from joyedit.checkpoints.network import Network
from joyedit.memory.pages import is_mapped, mapped_ranges
from joyedit.memory.streaming import tensors_of


def refuse_shrunk(networks: Iterable[Network]) -> None:
    """Raises ValueError naming the file. One that another has taken the place of is still there as it was."""
    for network in networks:
        for path, before in network.mapped_files.items():
            try:
                now = path.stat()
            except OSError:  # removed: what is mapped stays
                continue
            same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if same and now.st_size < before.st_size and _maps(network, before.st_ino):
                raise ValueError(
                    f"{path} has become shorter since its weights were loaded, from {before.st_size:,} to "
                    f"{now.st_size:,} bytes: load the model again from a file that is whole"
                )


def _maps(network: Network, inode: int) -> bool:
    """Whether weights are pages of that file: they may have been copied to elsewhere since."""
    ranges = mapped_ranges(inode)
    return any(is_mapped(tensor.data, ranges) for tensor in tensors_of(network) if not tensor.is_meta)
