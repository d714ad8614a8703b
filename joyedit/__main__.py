"""`python -m joyedit`."""

import sys

from joyedit.cli import main

sys.exit(main())
