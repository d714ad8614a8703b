"""Steps in which a denoiser computes its first block alone: first-block cache.

From one step to the next, what the blocks add to their tokens changes little. What the first block adds tells
how little: where its relative L1 distance from what it added when the other blocks were last computed,

    mean |now - then| / mean |then|

is below a threshold, they are left out, and what they added then is added again. The first step of a run and
the last are always computed.

Each branch of the guidance has a memory of its own and is decided by itself; images that run together are
decided together, by the one that changed most. All of it belongs to one call, and networks keep nothing.

B images   N tokens   D width
Source: the first-block cache of ParaAttention (`para_attn/first_block_cache/utils.py`), which takes the
relative L1 distance from TeaCache, arXiv 2411.19108. For a UNet, DeepCache, arXiv 2312.00858.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


class StepCache:
    """The steps of one run, and in how many of them the blocks were computed.

    threshold: None, where all are; otherwise above 0.
    """

    def __init__(self, threshold: float | None, num_steps: int):
        self.threshold, self.num_steps = threshold, num_steps
        self.step = -1
        self.ran: set[int] = set()  # steps in which a branch's blocks were computed
        self.reused: set[int] = set()  # steps in which those of a branch were not

    def begin(self, step: int) -> None:
        self.step = step

    @property
    def computed(self) -> int:
        """Of the steps so far, those that were computed for all branches, or for one of them."""
        return self.step + 1 - len(self.reused - self.ran)

    @property
    def is_last(self) -> bool:
        return self.step == self.num_steps - 1

    def branch(self) -> "BranchCache | None":
        """What a branch of the guidance, or a part of its images, is to remember; None where nothing is."""
        return None if self.threshold is None else BranchCache(self)


class BranchCache:
    """What is remembered of one branch: `first`, what the first block added when the others were last
    computed, and `rest`, what came of these then."""

    rest: Tensor

    def __init__(self, steps: StepCache):
        self.steps = steps
        self.first: Tensor | None = None

    def is_due(self, first: Tensor) -> bool:
        """Whether the other blocks are to be computed in this step, and `rest` to be set anew.

        first (B, ...): what the first block adds in this step.
        """
        steps = self.steps
        assert steps.threshold is not None
        due = steps.is_last or self.first is None or not distance(first, self.first) < steps.threshold
        if due:
            self.first = first
        (steps.ran if due else steps.reused).add(steps.step)
        return due


def as_argument(caches: Iterable[BranchCache | None]) -> dict[str, list[BranchCache]]:
    """Those of the branches of a step, as networks take them; nothing in a run without."""
    found = [cache for cache in caches if cache is not None]
    return {"caches": found} if found else {}


def distance(now: Tensor, then: Tensor) -> float:
    """Relative L1 distance of each image, the largest. (B, ...) both; NaN where `then` is all zero."""
    now, then = now.float().flatten(1), then.float().flatten(1)
    return ((now - then).abs().mean(1) / then.abs().mean(1)).max().item()


def finished(
    caches: Sequence[BranchCache],
    before: Sequence[Tensor],
    begun: Sequence[Tensor],
    others: Callable[[list[int]], list[Tensor]],
) -> list[Tensor]:
    """Tokens (B, N, D) of each branch after all blocks, of which the first made `begun` of `before`.

    others: what the other blocks make of the branches of these numbers.
    """
    due = [i for i, cache in enumerate(caches) if cache.is_due(begun[i] - before[i])]
    ended = dict(zip(due, others(due), strict=True))
    for i, tokens in ended.items():
        caches[i].rest = tokens - begun[i]
    return [ended[i] if i in ended else begun[i] + cache.rest for i, cache in enumerate(caches)]
