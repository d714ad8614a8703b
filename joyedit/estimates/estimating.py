"""`joyedit.estimate`: which machine an edit needs, and how long it takes there, before anything is loaded.

The networks are built without memory from configs and headers (`parts.py`), the stages of an edit are run on
them and counted (`stages.py`, `counting.py`), and what is held at the same time is added up here, for each
way to place weights: all where it is computed; one network at a time; or blocks that come one after the other
within a budget (`joyedit/memory/streaming.py`).

On a GPU a pipeline holds all its weights from the start. On a CPU they are pages of mapped files, which come
when they are read; what is not stored as it is held takes memory from the start.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from joyedit import ops
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.quantised_files import QUANTISE
from joyedit.checkpoints.sizes import parse_size, written_size
from joyedit.estimates.machines import MACHINES, Machine, machine_called, seconds_of
from joyedit.estimates.parts import Part, open_parts
from joyedit.estimates.stages import DECODE, DENOISE, TEXT, Size, Visit, run
from joyedit.loading.layouts import ALIKE, Checkpoint, find_checkpoint
from joyedit.media.images import nearest_bucket
from joyedit.memory import MARGIN
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.placement import accelerator_device

STAGES = (TEXT, DENOISE, DECODE)
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# Beside what is estimated: on a GPU what the driver's context takes, on a CPU Python with its libraries.
RESERVED = {"cuda": 600 * 2**20, "cpu": 300 * 2**20}
LARGEST_SIDE, MOST_FRAMES, MOST_STEPS = 8192, 257, 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an edit takes. Bytes, operations (a multiplication and its addition are two), and seconds.

    weights: of each network as it is held. disk: of all files. peak: of each stage, what is held at most,
    without the interpreter. bytes_per_step, operations_per_step: moved and computed by one guided step.
    seconds: of a whole edit on `machine`. fits: GB of memory -> with which flags it is enough, None where it
    is not. smallest: the least `memory` that works. times: seconds on the machines that are known.
    """

    model: str
    pipeline: str
    device: str
    size: Size
    machine: str
    smallest: int
    weights: Mapping[str, int]
    disk: int
    peak: Mapping[str, int]
    bytes_per_step: int
    operations_per_step: int
    seconds: float
    fits: Mapping[str, str | None]
    times: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        names = ("weights", "disk", "peak", "bytes_per_step", "operations_per_step", "seconds", "fits")
        return {name: dict(v) if isinstance(v := getattr(self, name), Mapping) else v for name in names}


def estimate(
    model: str | Path = "tiny-joyimage",
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    dtype: str | torch.dtype | Mapping[str, Any] = "auto",
    memory: int | str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    tflops: float | None = None,
    bandwidth: float | None = None,
    pipeline: str | None = None,
    **files: Any,
) -> Estimate:
    """What an edit by `model` will take, from its configs and the headers of its weight files.

    model, pipeline, dtype: as in `joyedit.load`; model may also be a folder that holds configs alone.
    height, width: both or neither; else the size that the model was made for. frames: of ChronoEdit, 1 + 4k.
    steps: None, as the pipeline by itself. memory: a budget, as in `joyedit.load`. quantize: "int8_convrot",
    as if `joyedit convert --quantize` had written the files.
    device: "cuda" or "cpu", where it is to be computed; "auto" is where `joyedit.load` would, here.
    tflops, bandwidth: of the machine, 10**12 operations in half precision and 10**9 bytes per second; None:
    those of this machine's GPU if they are known, or of a usual one.
    files: revision, token, cache_dir, local_files_only, variant, as in `joyedit.load`.

    Raises FileNotFoundError, ValueError or TypeError for what does not fit, by its name.
    """
    kind = device_kind(device)
    budget = None if memory is None else parse_size(memory)
    if quantize is not None and quantize not in QUANTISE:
        raise ValueError(f"quantize={shown(quantize, 40)}: must be one of {', '.join(QUANTISE)}")
    name, machine = chosen_machine(tflops, bandwidth)
    options = LoadOptions.parse({"dtype": dtype, **files})
    source = {key: value for key, value in options.origin.items() if key != "force_download"}
    found = find_checkpoint(model, pipeline, **source)
    options.check_parts(found.pipeline.parts)
    if quantize is not None and found.class_name not in ALIKE:
        raise ValueError(f"quantize={quantize!r} is for JoyAI-Image: {model} is of a {found.class_name}")
    plan = Plan.make(found, options, (height, width, frames, steps), kind, quantize is not None)
    smallest = plan.smallest()
    if budget is not None and budget < smallest:
        enough = f"memory={written_size(smallest)!r}"
        raise ValueError(
            f"memory={memory!r} is too little for this edit: the smallest that works is {enough}"
        )
    fits = {str(size): plan.flags(size, quantize) for size in CARDS}
    if None in fits.values() and quantize is None and found.class_name in ALIKE:
        smaller = Plan.make(found, options, (height, width, frames, steps), kind, True)
        lacking = [size for size in CARDS if fits[str(size)] is None]
        fits |= {str(size): smaller.flags(size, QUANTISE[0]) for size in lacking}
    each = plan.of_a_step()
    return Estimate(
        str(model),
        found.class_name,
        kind,
        plan.size,
        name,
        smallest,
        {part: one.nbytes for part, one in plan.parts.items()},
        sum(part.disk for part in plan.parts.values()),
        {stage: plan.peak(stage, budget) for stage in STAGES},
        each.bytes if each else 0,
        each.operations if each else 0,
        plan.seconds(machine, budget),
        fits,
        {known: plan.seconds(one, budget) for known, one in MACHINES.items()},
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of a checkpoint, and the visits of an edit. kind: of the device."""

    parts: Mapping[str, Part]
    visits: Sequence[Visit]
    size: Size
    kind: str

    @classmethod
    def make(
        cls, found: Checkpoint, options: LoadOptions, asked: Sequence[Any], kind: str, quantised: bool
    ) -> "Plan":
        with ops.standing_for(kind):
            parts = open_parts(found, options)
            if quantised:
                parts = {name: part.quantised() for name, part in parts.items()}
            size = size_of(found, parts, *asked)
            mapped = [name for name, part in parts.items() if part.mapped]
            visits = run(found.class_name, {name: part.network for name, part in parts.items()}, size, mapped)
        return cls(parts, visits, size, kind)

    @functools.cached_property
    def whole(self) -> list[int]:
        """What each visit takes when nothing is moved: its work beside all weights; on a CPU, beside those
        of mapped files that were read until then, and what was freed and kept."""
        if self.kind != "cpu":
            weights = sum(part.moved for part in self.parts.values())
            return [weights + visit.tally.peak for visit in self.visits]
        read, found = set(), []
        in_memory = sum(part.nbytes for part in self.parts.values() if not part.mapped)
        for visit in self.visits:
            read |= visit.tally.read
            most = visit.tally.reading
            if visit.times > 1:  # from the second time on all of it was read before
                in_files = sum(part.read_of(read) for part in self.parts.values() if part.mapped)
                most = max(most, in_files + visit.tally.peak)
            found.append(in_memory + most)
        return found

    @functools.cached_property
    def streamed(self) -> list[tuple[int, int]]:
        """What each visit takes when blocks come one after the other, at the least, and at the most, with all
        that stay: on a CPU beside the one that runs, on a GPU beside two buffers. What is read of a mapped
        file beside its blocks stays on a CPU."""
        read: set[int] = set()
        found = []
        for visit in self.visits:
            part, tally, stay = self.parts[visit.part], visit.tally, sum(self.staying(visit))
            read |= tally.read
            if self.kind == "cpu":
                held = sum(one.rest_of(read) for one in self.parts.values())
                least, most = held + tally.passing, held + tally.peak + stay
            else:
                held = part.moved - sum(part.blocks)
                least = held + tally.peak + 2 * max(part.blocks, default=0)
                most = least + stay
            found.append((least, max(least, most)))
        return found

    def staying(self, visit: Visit) -> list[int]:
        """Bytes of the blocks that stay if there is room: those that are called again for no more than
        before."""
        return [nbytes for nbytes, count in visit.tally.blocks.values() if visit.times * count > 1]

    def smallest(self) -> int:
        """The least budget that works."""
        beside = RESERVED["cpu"] if self.kind == "cpu" else 0
        return math.ceil((max(least for least, _ in self.streamed) + beside) / (1 - MARGIN))

    def room(self, budget: int) -> int:
        """What of a budget is there for the networks and their work."""
        return int(budget * (1 - MARGIN)) - (RESERVED["cpu"] if self.kind == "cpu" else 0)

    def peak(self, stage: str, budget: int | None = None) -> int:
        """The most that is held in a stage."""
        mine = [(i, visit) for i, visit in enumerate(self.visits) if visit.stage == stage]
        if budget is None:
            return max((self.whole[i] for i, _ in mine), default=0)
        return max((self.filled(i, self.room(budget)) for i, _ in mine), default=0)

    def filled(self, i: int, room: int) -> int:
        """What visit `i` takes when as many blocks stay as there is room for."""
        held, most = self.streamed[i]
        for nbytes in self.staying(self.visits[i]):
            held += nbytes if held + nbytes <= min(room, most) else 0
        return held

    def flags(self, gigabytes: int, quantize: str | None) -> str | None:
        """With which flags an edit fits into so much memory; None if with none."""
        words = [f"--quantize {quantize}"] if quantize else []
        total = gigabytes * 2**30
        free = int((total - RESERVED[self.kind]) * (1 - MARGIN))
        alone = max(self.parts[visit.part].moved + visit.tally.peak for visit in self.visits)
        budget = gigabytes - 1  # GiB: some is the system's
        if max(self.peak(stage) for stage in STAGES) <= free:
            return " ".join(words)
        if self.kind != "cpu" and alone <= free:
            return " ".join([*words, "--offload model"])
        if self.smallest() <= budget * 2**30:
            return " ".join([*words, f"--memory {budget}G"])
        return None

    def of_a_step(self) -> Any:
        return next((visit.tally for visit in self.visits if visit.is_step), None)

    def seconds(self, machine: Machine, budget: int | None) -> float:
        """Of a whole edit. With a budget, the blocks that do not stay are fetched while others compute."""
        total = 0.0
        for i, visit in enumerate(self.visits):
            once = seconds_of(visit.tally.calls, machine)
            if budget is not None and self.kind != "cpu":
                part = self.parts[visit.part]
                stay = self.filled(i, self.room(budget)) - self.streamed[i][0]
                once = max(once, max(sum(part.blocks) - stay, 0) / machine.link)
            total += visit.times * once
        return total


def device_kind(device: str) -> str:
    if device == "auto":
        return "cpu" if accelerator_device() is None else "cuda"
    if device not in RESERVED:
        raise ValueError(f"device={shown(device, 40)}: must be auto, {' or '.join(RESERVED)}")
    return device


def chosen_machine(tflops: float | None, bandwidth: float | None) -> tuple[str, Machine]:
    """The machine to compute the time for, and its name."""
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and (isinstance(value, bool) or not math.isfinite(value) or value <= 0):
            raise ValueError(f"{name}={value!r}: must be a positive number")
    name = machine_called(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    known = MACHINES[name]
    if tflops is None and bandwidth is None:
        return name, known
    matrix = known.matrix if tflops is None else tflops * 1e12
    return "as given", known._replace(
        matrix=matrix, bandwidth=known.bandwidth if bandwidth is None else bandwidth * 1e9
    )


def size_of(
    found: Checkpoint,
    parts: Mapping[str, Part],
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
) -> Size:
    """The size of an edit; what was not asked for, as the model was made for it. Raises ValueError for what
    the networks do not take."""
    index = index_of(found)
    made_for = MadeFor.from_index(index, found.origin.name)
    film = found.class_name == "ChronoEditPipeline"
    if (height is None) != (width is None):
        raise ValueError("give both height and width, or neither")
    usual = usual_size(found, parts, made_for.basesize, index.get("buckets"))
    height, width = (height, width) if height is not None and width is not None else usual
    multiple = 8 if "unet" in parts else 16
    for name, value in (("height", height), ("width", width)):
        if not is_count(value, LARGEST_SIDE) or value % multiple:
            wanted = f"must be a multiple of {multiple}, at most {LARGEST_SIDE}"
            raise ValueError(f"{name}={shown(value, 40)}: {wanted}")
    frames = (5 if film else 1) if frames is None else frames
    if not is_count(frames, MOST_FRAMES):
        raise ValueError(f"frames={shown(frames, 40)}: must be a whole number from 1 to {MOST_FRAMES}")
    if film and (frames % 4 != 1 or frames < 5) or not film and frames != 1:
        wanted = "5, 9, 13, ..." if film else "1, as pictures are made"
        raise ValueError(f"frames={frames}: must be {wanted}")
    default = 40 if found.class_name in ALIKE else 50
    steps = int(made_for.call.get("num_inference_steps", default)) if steps is None else steps
    if not is_count(steps, MOST_STEPS):
        raise ValueError(f"steps={shown(steps, 40)}: must be a whole number from 1 to {MOST_STEPS}")
    return Size(height, width, frames, steps, made_for.call.get("guidance_scale", math.inf) > 1)


def is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def index_of(found: Checkpoint) -> Mapping[str, Any]:
    """What model_index.json says; nothing where there is none."""
    name = "model_index.json"
    return read_json(found.origin.fetch([name]) / name) if name in found.listing else {}


def usual_size(
    found: Checkpoint, parts: Mapping[str, Part], basesize: int | None, buckets: Any
) -> tuple[int, int]:
    if buckets:
        return nearest_bucket(1, 1, [(int(h), int(w)) for h, w in buckets])
    if basesize is not None:
        return basesize, basesize
    if "unet" in parts:
        edge = parts["unet"].network.config.sample_size * 8
        return edge, edge
    return (720, 1280) if found.class_name == "ChronoEditPipeline" else (1024, 1024)
