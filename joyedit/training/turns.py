"""The turns of a training: one before each step, and one more after the last, to look at what there is.

    with Stopping() as stopping:
        for turn in turns(run, steps, stopping):
            if turn.due(every):
                ...                      # now and then, and after the last step: validate, draw
            if turn.saves(save_every):
                run.save()
            if turn.ends:
                break
            run.set_rate(...)            # one step
            loss.backward()
            run.update(clip)
            run.log(loss=...)

A run that goes on begins with the turn that it was saved in, and nothing is due in it for a second time.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from tqdm.auto import tqdm

from joyedit.training.run import Run, Stopping

log = logging.getLogger("joyedit")


class Turn(NamedTuple):
    """step: how many are done. last: no more is to be done. stopped: the process was asked to end. seen: a
    state was saved in this turn, after all else that was due."""

    step: int
    last: bool
    stopped: bool
    seen: bool

    def due(self, every: int) -> bool:
        """Whether it is time for what comes every so many steps, and after the last one; 0: never."""
        return every > 0 and not self.seen and (self.last or self.step % every == 0)

    def saves(self, every: int) -> bool:
        """Whether it is time to save, which it also is before the process ends."""
        return self.step > 0 and not self.seen and (self.stopped or self.due(every))

    @property
    def ends(self) -> bool:
        return self.last or self.stopped


def turns(run: Run, steps: int, stopping: Stopping, disable_progress: bool | None = False) -> Iterator[Turn]:
    """Turns until `steps` are done, or the process is asked to end; to be left when one `ends`."""
    seen = run.resumed
    bar = tqdm(total=steps, initial=run.step, desc=run.folder.name, disable=disable_progress)
    with bar:
        while True:
            stopped = stopping.agree()
            if stopped:
                log.info("stopped after %d steps: the same command goes on", run.step)
            yield Turn(run.step, run.step >= steps, stopped, seen)
            seen = False
            bar.update()
