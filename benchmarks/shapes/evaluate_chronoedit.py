"""How well a small ChronoEdit edits: the last frame of its films, without and with temporal reasoning, and
the way there.

Edited pictures are judged as in `evaluate`. The way is compared with the drawn one, frame by frame: its key
frames, which a latent frame each codes, and those between, which only the autoencoder's temporal layers can
know. Beside it stand a film in which nothing happens, and the drawn film after a trip through the
autoencoder.

T latent frames   F = 1 + 4 (T - 1) frames
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.shapes import scenes
from benchmarks.shapes.evaluate import grid, held_out, in_other_words, judge, summarize
from benchmarks.shapes.wan_vae import to_tensor
from joyedit.media.images import to_output
from joyedit.pipelines.chronoedit import EDIT_FRAMES, REASONING_FRAMES, ChronoEditPipeline
from joyedit.pipelines.chronoedit_frames import FrameCoder

STEPS = 2
REASONING_STEPS = 1  # of these with the way, which is then dropped
GUIDANCE = 1.0
BATCH = 8
FILMS = 3  # of each kind, for the way


def evaluate(
    pipe: ChronoEditPipeline,
    count: int,
    counts: Sequence[int],
    kinds: Sequence[str],
    steps: int = STEPS,
    reasoning: int = REASONING_STEPS,
    wordings: bool = False,
) -> tuple[dict[str, Any], Image.Image]:
    """`count` held-out edits of each kind in scenes of `counts` shapes: scores of the model without and with
    temporal reasoning, of doing nothing and of the autoencoder; how near films are to the drawn ones; and
    with `wordings` the success (without temporal reasoning) in each of them.

    The picture shows some of the results with temporal reasoning."""
    edits = held_out(count, counts, kinds)
    targets = [scenes.draw(edit.target) for edit in edits]
    sides = {
        "model": run(pipe, edits, steps),
        "reasoning": run(pipe, edits, steps, reasoning),
        "nothing": [scenes.draw(edit.source) for edit in edits],
        "ceiling": [film[-1] for film in through_vae(pipe, [s[None] for s in targets])],
    }
    report: dict[str, Any] = {
        name: summarize(judge(e, r) for e, r in zip(edits, side, strict=True)) for name, side in sides.items()
    }
    some = [i for i in range(len(edits)) if i % count < FILMS]
    if wordings:
        report["wordings"] = in_other_words(edits, lambda told: run(pipe, told, steps))
    report["way"] = way([edits[i] for i in some], films(pipe, [edits[i] for i in some], steps), pipe)
    shown = [i for i in range(len(edits)) if i % count < 4]
    return report, grid([edits[i] for i in shown], [sides["reasoning"][i] for i in shown])


def run(
    pipe: ChronoEditPipeline, edits: Sequence[scenes.Edit], steps: int, reasoning: int = 0
) -> list[np.ndarray]:
    """The edited pictures, each (H, W, 3) in [0, 1]; edit number i is drawn from seed i. `reasoning`: the
    steps in which the way to it is thought of."""
    frames = REASONING_FRAMES if reasoning else EDIT_FRAMES
    return [film[-1] for film in _films(pipe, edits, steps, frames, reasoning, only_last_frame=True)]


def films(pipe: ChronoEditPipeline, edits: Sequence[scenes.Edit], steps: int) -> list[np.ndarray]:
    """Whole films, each (F, H, W, 3)."""
    return _films(pipe, edits, steps, REASONING_FRAMES, steps)


def _films(
    pipe: ChronoEditPipeline,
    edits: Sequence[scenes.Edit],
    steps: int,
    frames: int,
    reasoning: int,
    only_last_frame: bool = False,
) -> list[np.ndarray]:
    results: list[np.ndarray] = []
    for start in range(0, len(edits), BATCH):
        part = edits[start : start + BATCH]
        out = pipe(
            [Image.fromarray(scenes.to_levels(scenes.draw(edit.source))) for edit in part],
            [edit.instruction for edit in part],
            height=scenes.SIZE,
            width=scenes.SIZE,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
            enable_temporal_reasoning=reasoning > 0,
            num_temporal_reasoning_steps=reasoning,
            only_last_frame=only_last_frame,
        )
        assert isinstance(out.frames, np.ndarray)
        results += list(out.frames)
    return results


@torch.no_grad()
def through_vae(pipe: ChronoEditPipeline, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Clips (F, H, W, 3) encoded and decoded."""
    coder = FrameCoder(pipe.vae)
    back = []
    for clip in clips:
        latents = pipe.vae.encode(to_tensor(clip[None]).to(pipe.vae.device)).latent_dist.mode()
        normalised = (latents - coder.mean.to(latents)) / coder.std.to(latents)
        back.append(to_output(coder.decode(normalised)[0].transpose(0, 1), "np"))
    return back


def way(
    edits: Sequence[scenes.Edit], results: Sequence[np.ndarray], pipe: ChronoEditPipeline
) -> dict[str, Any]:
    """PSNR in dB of films against the drawn ones, mean over them: of each key frame, and of all frames but
    these. Beside them those of a film in which nothing happens, and of the drawn one through the autoencoder.
    """
    drawn = [scenes.clip(edit, len(film)) for edit, film in zip(edits, results, strict=True)]
    still = [np.broadcast_to(clip[:1], clip.shape) for clip in drawn]
    sides = {"model": results, "nothing": still, "ceiling": through_vae(pipe, drawn)}
    report: dict[str, Any] = {"films": len(edits)}
    for name, side in sides.items():
        error = np.stack([np.square(a - b).mean((1, 2, 3)) for a, b in zip(side, drawn, strict=True)])
        psnr = (-10 * np.log10(error + 1e-10)).mean(0)  # (F)
        is_key = np.arange(len(psnr)) % 4 == 0
        report[name] = {
            "key_frames": [round(float(v), 2) for v in psnr[is_key]],
            "between": round(float(psnr[~is_key].mean()), 2),
        }
    return report


def film_grid(edits: Sequence[scenes.Edit], results: Sequence[np.ndarray]) -> Image.Image:
    """Key frames of films, each above those of the drawn film."""
    rows = []
    for edit, film in zip(edits, results, strict=True):
        drawn = scenes.clip(edit, len(film), only=slice(None, None, 4))
        rows += [np.concatenate(list(frames), axis=1) for frames in (film[::4], drawn)]
    return Image.fromarray(scenes.to_levels(np.concatenate(rows)))
