"""Whole checkpoints: which pipeline a folder, file or Hub repository holds, how it is opened and saved."""

from joyedit.loading.layouts import load as load
from joyedit.loading.layouts import pipeline_name as pipeline_name
from joyedit.loading.layouts import read_made_for as read_made_for
from joyedit.loading.layouts import save_checkpoint as save_checkpoint
