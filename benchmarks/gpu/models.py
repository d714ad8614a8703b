"""The three small models of the package: the same edit, from the same seed, on the device and on the CPU.

What is compared are the latents at the end of the loop, the pixels, and DiffEdit's mask; once in fp32 on both
sides, and once in half precision on the device. From the end of a loop's first step to the end of its last,
a call that waits for the device is an error: no step of a pipeline may. (The first may: kernels are loaded,
and constants copied.) A dry run makes the edit on the CPU twice.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor

import joyedit
from benchmarks.gpu.setting import Row, Setting
from joyedit.command.demo import SCENES

# Root mean square differences of pixels in [0, 1] that are still the same picture: 50 dB in fp32; in half
# precision 10 dB below what the models keep on a CPU. A mask is cut at a threshold, and the rest follows it.
SAME = {"joyimage": 3e-3, "chronoedit": 3e-3, "diffedit": 3e-2}
ALIKE = {"joyimage": 2e-2, "chronoedit": 3e-2, "diffedit": 1e-1}
MASK = 0.02  # the share of a mask's elements that may differ
STEPS = {"joyimage": 4, "chronoedit": 4, "diffedit": 10}


class Different(Exception):
    """The edits are not the same."""


class Callback:
    """callback_on_step_end: keeps the latents, and forbids to wait for the device between steps."""

    latents: Tensor

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, pipe: Any, step: int, timestep: Tensor, tensors: Mapping[str, Tensor]) -> None:
        self.latents = tensors["latents"]
        self.forbid(step + 1 < pipe.num_timesteps)

    def forbid(self, waiting: bool) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if waiting else "default")

    def __enter__(self) -> "Callback":
        return self

    def __exit__(self, *error: object) -> None:
        self.forbid(False)


def rows(setting: Setting) -> Iterator[Row]:
    for system in STEPS:
        yield f"tiny-{system}: fp32", partial(measure, setting, system, torch.float32, SAME[system])
        yield f"tiny-{system}: bf16", partial(measure, setting, system, torch.bfloat16, ALIKE[system])


def measure(setting: Setting, system: str, dtype: torch.dtype, allowed: float) -> dict[str, Any]:
    steps = 2 if setting.dry else STEPS[system]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here = edited(system, setting.device, dtype, steps)
    there = edited(system, torch.device("cpu"), torch.float32, steps)
    found: dict[str, Any] = {"steps": steps}
    for name, wanted in there.items():
        difference = (here[name] - wanted).abs()
        found[name] = {"largest": difference.max().item(), "rms": difference.square().mean().sqrt().item()}
    if not found["pixels"]["rms"] <= allowed:
        raise Different(f"of the pixels {found['pixels']['rms']:.1e} is more than {allowed:.0e}: {found}")
    if "mask" in found and (here["mask"] != there["mask"]).double().mean() > MASK:
        raise Different(f"the masks differ: {found}")
    return found


def edited(system: str, device: torch.device, dtype: torch.dtype, steps: int) -> dict[str, Tensor]:
    """What an edit of the demo leaves: latents, pixels in [0, 1], a mask where there is one; in float64."""
    pipe = joyedit.load(f"tiny-{system}", device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    edit = json.loads((SCENES / "demo.json").read_text(encoding="utf-8"))[system][0]
    with PIL.Image.open(SCENES / f"{system}-{edit['name']}.png") as opened:
        photo = opened.convert("RGB")
    with Callback(device) as callback:
        results = EDITORS[system](pipe, photo, edit, steps, callback)
    results = {"latents": callback.latents, **results}
    return {name: torch.as_tensor(value).cpu().double() for name, value in results.items()}


def edit_by_instruction(pipe: Any, photo: Any, edit: Any, steps: int, callback: Callback) -> dict[str, Any]:
    """JoyImage's, guided, which the small model can do without."""
    out = pipe(
        photo,
        edit["instruction"],
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(edit["seed"]),
        output_type="pt",
        callback_on_step_end=callback,
    )
    return {"pixels": out.images}


def edit_by_film(pipe: Any, photo: Any, edit: Any, steps: int, callback: Callback) -> dict[str, Any]:
    """ChronoEdit's, guided too."""
    out = pipe(
        photo,
        edit["instruction"],
        height=photo.height,
        width=photo.width,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(edit["seed"]),
        output_type="pt",
        callback_on_step_end=callback,
    )
    return {"pixels": out.frames}


def edit_by_captions(pipe: Any, photo: Any, edit: Any, steps: int, callback: Callback) -> dict[str, Any]:
    """DiffEdit's, by its three calls: two of them are loops."""
    source, target, generator = edit["source"], edit["target"], torch.Generator().manual_seed(edit["seed"])
    mask = pipe.generate_mask(
        photo,
        target_prompt=target,
        source_prompt=source,
        num_inference_steps=steps,
        generator=generator,
    )
    shared = {"num_inference_steps": steps, "callback_on_step_end": callback}
    levels = pipe.invert(source, photo, **shared).latents
    out = pipe(target, mask, levels, negative_prompt=source, output_type="pt", **shared)
    return {"pixels": out.images, "mask": mask}


EDITORS = {"joyimage": edit_by_instruction, "chronoedit": edit_by_film, "diffedit": edit_by_captions}
