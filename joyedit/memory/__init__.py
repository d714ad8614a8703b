"""Where weights are while they wait, and while they are run: see `visits.py` and `streaming.py`."""

from joyedit.memory.budget import MARGIN, room_on
from joyedit.memory.pages import in_a_file
from joyedit.memory.streaming import BlockStreaming, blocks_of, stream_blocks, tensors_of
from joyedit.memory.visits import at_rest, visit

__all__ = [
    "MARGIN",
    "BlockStreaming",
    "at_rest",
    "blocks_of",
    "in_a_file",
    "room_on",
    "stream_blocks",
    "tensors_of",
    "visit",
]
