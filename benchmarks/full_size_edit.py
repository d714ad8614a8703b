"""The process that `full_size.py` measures: loads what is in a folder, edits, and says what it is doing.

Its argument is JSON: folder, pipeline, parts (of the networks those that are there), memory, size, steps,
embeddings (a file: written where there is no transformer, read where there is no text encoder), record (a
file for what two blocks of each large network got and gave). On standard output come lines of JSON: {"stage":
name} when a stage begins, {"seconds": ...} and so on at the end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import joyedit
from joyedit.memory import BlockStreaming, blocks_of, tensors_of
from joyedit.memory.budget import resident_bytes

PROMPT, NEGATIVE = "Make the red bowl blue, and leave the rest as it is.", ""
NETWORKS = ("transformer", "text_encoder", "image_encoder", "vae")
RECORDED = ("transformer", "text_encoder")  # of whose blocks two are recorded


class Stages:
    """Which stage is on: each network's first call begins one."""

    def __init__(self):
        self.current, self.began = "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        if name == self.current:
            return
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.began
        self.current, self.began = name, now
        print(json.dumps({"stage": name}), flush=True)

    def watch(self, pipe: Any) -> None:
        starts = {"text_encoder": "text", "image_encoder": "text", "transformer": "denoise"}
        for part, name in starts.items():
            network = getattr(pipe, part, None)
            for module in () if network is None else network.modules():
                module.register_forward_pre_hook(lambda module, args, name=name: self.begin(name))
        if pipe.vae is not None:
            pipe.vae.encoder.register_forward_pre_hook(lambda module, args: self.begin("text"))
            pipe.vae.decoder.register_forward_pre_hook(lambda module, args: self.begin("decode"))


class Recorded:
    """What two blocks of each network got and gave when they were called first."""

    def __init__(self):
        self.calls: list[dict[str, Any]] = []

    def watch(self, part: str, network: nn.Module) -> None:
        sizes = {block: sum(t.nbytes for t in tensors_of(block)) for block in blocks_of(network)}
        blocks = [block for block, nbytes in sizes.items() if nbytes > max(sizes.values()) / 2]
        names = {module: name for name, module in network.named_modules()}
        for block in (blocks[len(blocks) // 2], blocks[-1]):
            block.register_forward_hook(self.hook(part, names[block]), with_kwargs=True)

    def hook(self, part: str, name: str) -> Any:
        def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if all((call["part"], call["block"]) != (part, name) for call in self.calls):
                copies = copied((args, kwargs, output))
                self.calls.append(dict(zip(("args", "kwargs", "output"), copies, strict=True)))
                self.calls[-1] |= {"part": part, "block": name}

        return note


def copied(value: Any) -> Any:
    """Tensors in tuples, lists and dicts, in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (tuple, list)) else value


def photograph(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def embed(pipe: Any, photo: Image.Image) -> dict[str, Tensor]:
    """What a call takes in the place of a prompt."""
    if "image_encoder" in pipe.parts:
        positive, negative = pipe.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512)
        seen = pipe.encode_image([photo])
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative, "image_embeds": seen}
    with torch.no_grad():
        positive, negative = pipe._embed_prompts([[PROMPT], [NEGATIVE]], [photo], 4096)
    return {
        "prompt_embeds": positive.embeds,
        "prompt_embeds_mask": positive.mask,
        "negative_prompt_embeds": negative.embeds,
        "negative_prompt_embeds_mask": negative.mask,
    }


def edit(pipe: Any, photo: Image.Image, said: dict[str, Any], steps: int, note: Any) -> np.ndarray:
    size = {} if "processor" in pipe.parts else {"height": photo.height, "width": photo.width}
    result = pipe(
        image=photo,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        callback_on_step_end=note,
        **size,
        **said,
    )
    return np.asarray(result[0])


def disk_bytes() -> int:
    """What this process has read from disks."""
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(words["read_bytes"])


def main(given: dict[str, Any]) -> None:
    stages, recorded = Stages(), Recorded()
    interpreter = resident_bytes()
    absent = {
        name: None
        for name in NETWORKS
        if name not in given["parts"] and name in getattr(joyedit, given["pipeline"]).parts
    }
    stages.begin("load")
    pipe = joyedit.load(given["folder"], device="cpu", memory=given["memory"], **absent)
    pipe.set_progress_bar_config(disable=True)
    stages.watch(pipe)
    for part in RECORDED:
        if getattr(pipe, part) is not None:
            recorded.watch(part, getattr(pipe, part))
    photo = photograph(*given["size"])
    ends, staying = [], []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        streaming = BlockStreaming.of(pipe.transformer)
        staying.append(sorted(streaming.passing.staying) if streaming else None)
        return tensors

    report: dict[str, Any] = {"interpreter": interpreter}
    if pipe.transformer is None:
        embeddings = embed(pipe, photo)
        torch.save(embeddings, given["embeddings"])
        assert all(one.isfinite().all() for one in embeddings.values())
    else:
        said = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
        if pipe.text_encoder is None:
            said = torch.load(given["embeddings"], weights_only=True)
        picture = edit(pipe, photo, said, given["steps"], note)
        assert np.isfinite(picture).all() and picture.std() > 0.01
        blocks = [sum(t.nbytes for t in tensors_of(block)) for block in blocks_of(pipe.transformer)]
        moved = [sum(n for i, n in enumerate(blocks) if i not in (stay or ())) for stay in staying]
        report |= {
            "picture": [float(picture.mean()), float(picture.std())],
            "blocks_staying": [None if stay is None else len(stay) for stay in staying],
            "bytes_moved": moved,
            "seconds_of_later_steps": [b - a for a, b in zip(ends, ends[1:], strict=False)],
        }
    stages.begin("end")
    report |= {"seconds": stages.seconds, "disk_read": disk_bytes()}
    print(json.dumps(report), flush=True)
    torch.save(recorded.calls, given["record"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
