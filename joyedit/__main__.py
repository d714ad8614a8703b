"""`python -m joyedit`."""

import sys

from joyedit.command.cli import main

sys.exit(main())
