"""`python -m joyedit.convert SRC DST`, the same as `joyedit convert SRC DST`."""

import sys

from joyedit.command.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
