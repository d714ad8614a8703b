"""Training in several processes: what one alone does, whichever number computes it, saves it and goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from joyedit.training import loop
from joyedit.training.settings import Settings
from tests.training.test_training import circles, settings  # noqa: F401


def trained(given: Settings, out: Path) -> Path:
    return loop.train(given, out, disable_progress=True)
