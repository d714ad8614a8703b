"""What a step cache leaves out, and what that costs: whole edits of the shipped small models.

Each model edits held-out scenes in fp32, one at a time, in more steps than it needs (in two, its own number,
there is nothing to leave out), exactly and at three thresholds. Of each: how many steps were computed, each
picture against the exact one, and how many are right by the rules of `shapes/evaluate.py`. Of the released
networks, how much of a step's operations is left, where the rest is reused.

    python -m benchmarks.step_cache [--edits 20] [--out FILE]
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quantised import MODELS, held_out, psnr
from benchmarks.shapes import evaluate, evaluate_chronoedit, evaluate_diffedit
from benchmarks.shapes.evaluate import judge
from benchmarks.side_by_side import RESULTS, machine
from joyedit.checkpoints.network import build_on_meta
from joyedit.estimates.counting import Counted
from joyedit.loading.layouts import load
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.step_cache import BranchCache, StepCache

THRESHOLDS = (0.05, 0.1, 0.2)
STEPS = {"tiny-joyimage": 10, "tiny-chronoedit": 10, "tiny-diffedit": 20}
STRENGTH = 0.8  # of DiffEdit: so much of its steps it inverts, and denoises


class Asked:
    """A pipeline whose calls have a step cache, and which notes how many steps each computed."""

    def __init__(self, pipe: Any, threshold: float | None):
        self.pipe, self.threshold = pipe, threshold
        self.computed: list[int] = []

    def __call__(self, *args: Any, **call: Any) -> Any:
        return self._noted(self.pipe, *args, **call)

    def edit(self, *args: Any, **call: Any) -> Any:
        return self._noted(self.pipe.edit, *args, **call)

    def _noted(self, function: Any, *args: Any, **call: Any) -> Any:
        result = function(*args, **call, step_cache=self.threshold)
        self.computed.append(self.pipe.steps_computed)
        return result


@contextlib.contextmanager
def one_film_at_a_time() -> Iterator[None]:
    batch, evaluate_chronoedit.BATCH = evaluate_chronoedit.BATCH, 1
    try:
        yield
    finally:
        evaluate_chronoedit.BATCH = batch


def pictures(name: str, pipe: Any, edits: Any) -> list[np.ndarray]:
    """Of each edit by itself, as a user makes it: images that run together are decided together."""
    steps = STEPS[name]
    if name == "tiny-diffedit":
        settings = {"num_inference_steps": steps, "inpaint_strength": STRENGTH}
        return [answer.picture for answer in evaluate_diffedit.run(pipe, edits, batch=1, **settings)]
    if name == "tiny-chronoedit":
        with one_film_at_a_time():
            return evaluate_chronoedit.run(pipe, edits, steps)
    return evaluate.run(pipe, edits, steps, batch=1)


def measure(name: str, count: int) -> dict[str, Any]:
    pipeline, _ = MODELS[name]
    pipe = load(name, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    edits, judged = held_out(pipeline, count)

    def right(results: list[np.ndarray]) -> float:
        return round(statistics.fmean(judge(e, r).ok for e, r in zip(judged, results, strict=True)), 3)

    plain = Asked(pipe, None)
    exact = pictures(name, plain, edits)
    report: dict[str, Any] = {
        "edits": len(judged),
        "steps": max(plain.computed),
        "right": right(exact),
        "thresholds": {},
    }
    for threshold in THRESHOLDS:
        asked = Asked(pipe, threshold)
        found = pictures(name, asked, edits)
        apart = [psnr(a, b) for a, b in zip(found, exact, strict=True)]
        report["thresholds"][str(threshold)] = row = {
            "computed": round(statistics.fmean(asked.computed), 2),
            "psnr": {"median": round(statistics.median(apart), 2), "least": round(min(apart), 2)},
            "right": right(found),
        }
        print(name, threshold, json.dumps(row), flush=True)
    return report


class Decided(BranchCache):
    """A branch that is due, or not, whatever changes."""

    def __init__(self, due: bool, rest: Tensor):
        super().__init__(StepCache(1.0, 1))
        self.due, self.rest = due, rest

    def is_due(self, first: Tensor) -> bool:
        return self.due


def joyimage(network: Any, due: bool) -> int:
    """1024 x 1024 pixels, one reference, prompts of 1,100 tokens."""
    tokens = network.embed_image(torch.empty(1, 1, 16, 1, 128, 128))
    text, vec = network.embed_text(torch.empty(1, 1100, 4096)), network.embed_time(torch.empty(1))[0]
    grid = (2, 64, 64)
    caches = [Decided(due, torch.empty_like(tokens)) for _ in range(2)]
    rope = network.rope(grid)
    with Counted(network.parameters()) as counted:
        network.predict_branches(tokens, tokens, [text, text], vec, rope, grid, caches)
    return counted.tally.operations


def chronoedit(network: Any, due: bool) -> int:
    """1280 x 720 pixels, five frames."""
    latents = torch.empty(1, 36, 2, 90, 160)
    vec, text = network.embed_time(torch.empty(1))[0], network.embed_text(torch.empty(1, 512, 4096))
    image, rope = network.embed_image(torch.empty(1, 257, 1280)), network.rope(network.token_grid(latents))
    caches = [Decided(due, torch.empty(1, 2 * 45 * 80, 5120)) for _ in range(2)]
    with Counted(network.parameters()) as counted:
        network.predict_branches(latents, vec, [text, text], image, rope, caches)
    return counted.tally.operations


def diffusion(network: Any, due: bool) -> int:
    """512 x 512 pixels."""
    time, context = network.embed_time(torch.empty(1))[0], network.embed_context(torch.empty(2, 77, 768))
    caches = [Decided(due, torch.empty(1, 640, 64, 64)) for _ in range(2)]
    with Counted(network.parameters()) as counted:
        network.predict(torch.empty(1, 4, 64, 64), time, context, 2, caches)
    return counted.tally.operations


RELEASED = {
    "JoyAI-Image-Edit": (JoyImageEditTransformer3DModel, joyimage),
    "ChronoEdit-14B": (ChronoEditTransformer3DModel, chronoedit),
    "Stable Diffusion 1.5": (UNet2DConditionModel, diffusion),
}


@torch.no_grad()
def left() -> dict[str, float]:
    """Of each released network, the share of a guided step's operations that a step has which reuses them."""
    shares = {}
    for name, (kind, step) in RELEASED.items():
        counts = []
        for due in (True, False):
            network = build_on_meta(kind, kind.Config())
            with torch.device("meta"):
                counts.append(step(network, due))
        shares[name] = round(counts[1] / counts[0], 3)
    return shares


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cache", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_cache" / "small_models.json")
    parser.add_argument("--edits", type=int, default=20, help="of each kind")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine(), "left": left()}
    report["models"] = {name: measure(name, given.edits) for name in given.models}
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
