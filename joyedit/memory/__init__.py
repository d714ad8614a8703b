"""Where weights are while they wait, and while they are run: see `visits.py` and `streaming.py`."""

from joyedit.memory.budget import MARGIN, Watched, room_on
from joyedit.memory.pages import in_a_file
from joyedit.memory.shrinking import refuse_shrunk
from joyedit.memory.smallest import enough_for_work, least_budget
from joyedit.memory.streaming import BlockStreaming, blocks_of, load_of, stream_blocks, tensors_of
from joyedit.memory.visits import at_rest, visit

__all__ = [
    "MARGIN",
    "BlockStreaming",
    "Watched",
    "at_rest",
    "blocks_of",
    "enough_for_work",
    "in_a_file",
    "least_budget",
    "load_of",
    "refuse_shrunk",
    "room_on",
    "stream_blocks",
    "tensors_of",
    "visit",
]
