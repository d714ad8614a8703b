"""Where weights are while they wait, and while they are run: see `visits.py` and `streaming.py`."""

from joyedit.memory.budget import room_on
from joyedit.memory.pages import in_a_file
from joyedit.memory.streaming import BlockStreaming, stream_blocks
from joyedit.memory.visits import at_rest, visit

__all__ = ["BlockStreaming", "at_rest", "in_a_file", "room_on", "stream_blocks", "visit"]
