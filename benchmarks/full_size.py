"""Edits by networks of the released sizes within a small part of the memory that they take.

Checkpoints with the released settings and seeded random weights are written, one model's files at a time, and
deleted after; free disk space is looked at first. A process of its own then makes a guided edit on the CPU
under a budget of memory (`full_size_edit.py`), while this one looks every 20 ms at what it holds: VmRSS, and
the anonymous and the mapped part of it. What two blocks of each large network gave is compared with a block
that is built apart from the file's bytes: in fp32, as a relative error, and as it is stored, bit by bit.

    python -m benchmarks.full_size --place DIR [--models joyimage ...] [--depth 0.1] [--memory 6G]
    python -m benchmarks.full_size --place DIR --timing

A model whose files together are large runs as two processes, so that they need not be on the disk at the same
time: the first reads the prompt, the second edits by what the first has made of it.

--depth: the share of the layers. --width: what the widths are divided by. --timing: blocks that come from
their file at every step against blocks that stay, in pairs, see `streaming_speed.py`.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import joyedit
from benchmarks import streaming_speed
from benchmarks.estimates import PARTS
from benchmarks.random_checkpoint import SPECIAL_TOKENS, WORDS, byte_processor, unigram_tokenizer
from benchmarks.random_weights import part_bytes, read_module, read_stored, write_part
from benchmarks.side_by_side import RESULTS, machine, rounded, write
from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.network import Network, build_on_meta
from joyedit.checkpoints.sizes import parse_size
from joyedit.media.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.media.images import buckets
from joyedit.models.joyimage_mmdit import JoyImageEditConfig
from joyedit.quantised import QuantisedLinear
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler

OUT = RESULTS / "full_size.json"
ROOT = Path(__file__).resolve().parents[1]
SAMPLED = 0.02  # seconds
FREE = 10**9  # bytes of the disk that are left alone
FIELDS = {"rss": "VmRSS", "anonymous": "RssAnon", "mapped": "RssFile"}
TOLERANCE = 0.02  # relative error of a block in bf16 against fp32


class Model(NamedTuple):
    """processes: the networks that each of them has. forms: how a network is stored, if not in bf16."""

    pipeline: str
    processes: tuple[tuple[str, ...], ...]
    forms: Mapping[str, str] = {}


MODELS = {
    "joyimage": Model("JoyImageEditPipeline", (("text_encoder",), ("transformer", "vae"))),
    "joyimage-int8": Model(
        "JoyImageEditPipeline", (("transformer", "text_encoder", "vae"),), {"transformer": "int8_convrot"}
    ),
    "chronoedit": Model(
        "ChronoEditPipeline",
        (("text_encoder", "image_encoder"), ("transformer", "vae")),
        {"vae": "float32"},
    ),
}
# Settings that are widths, or numbers of layers.
WIDE = (
    *("hidden_size", "num_attention_heads", "text_dim", "intermediate_size", "num_key_value_heads"),
    *("num_heads", "out_hidden_size", "vocab_size", "d_model", "d_ff", "ffn_dim", "image_dim"),
    *("added_kv_proj_dim", "base_dim"),
)
DEEP = ("num_layers", "num_hidden_layers", "depth")


def shrunk(config: Any, depth: float, width: int) -> Any:
    """A config with a share of the layers, at least four, and a part of the width."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = config[field.name]
        if field.name in WIDE and value is not None:
            changes[field.name] = max(value // width, 1)
        elif field.name in DEEP:
            changes[field.name] = max(round(value * depth), min(value, 4))
        elif field.name == "deepstack_visual_indexes":
            layers = max(round(config.depth * depth), 4)
            changes[field.name] = tuple(i * layers // config.depth for i in value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = shrunk(value, depth, width)
    return config.replace(**changes)


class Checkpoint:
    """The files of a model in `folder`, of which those of the networks come and go."""

    def __init__(self, folder: Path, model: Model, depth: float, width: int, edge: int):
        self.folder, self.model = folder, model
        self.classes: dict[str, type[Network]] = {
            part: getattr(joyedit, name) for part, name in PARTS[model.pipeline].items()
        }
        self.configs = {part: shrunk(cls.Config(), depth, width) for part, cls in self.classes.items()}
        index: dict[str, Any] = {"_class_name": model.pipeline}
        index |= {part: ["diffusers", cls.__name__] for part, cls in self.classes.items()}
        if model.pipeline == "JoyImageEditPipeline":
            tokenizer, processor = byte_processor(folder / "tokenizer")
            ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
            self.configs["text_encoder"] = self.configs["text_encoder"].replace(
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
            )
            scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.5)
            others: dict[str, Any] = {"tokenizer": tokenizer, "processor": processor}
            index["buckets"] = [list(size) for size in buckets(edge)]
        else:
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            )
            others = {
                "tokenizer": unigram_tokenizer(WORDS),
                "image_processor": CLIPImageProcessor(CLIPImageConfig(size=224, crop_size=(224, 224))),
            }
        for name, part in {**others, "scheduler": scheduler}.items():
            part.save_pretrained(folder / name)
            index[name] = [part.library, type(part).__name__]
        write_json(folder / "model_index.json", index)
        for part, config in self.configs.items():
            saved = build_on_meta(self.classes[part], config).to(self.dtype(part)).config_to_save()
            (folder / part).mkdir()
            write_json(folder / part / "config.json", saved)

    def dtype(self, part: str) -> torch.dtype:
        return torch.float32 if self.model.forms.get(part) == "float32" else torch.bfloat16

    def form(self, part: str) -> str | None:
        return "int8_convrot" if self.model.forms.get(part) == "int8_convrot" else None

    def nbytes(self, part: str) -> int:
        return part_bytes(self.classes[part], self.configs[part], self.dtype(part), self.form(part))

    def write(self, part: str, seed: int) -> int:
        cls, config = self.classes[part], self.configs[part]
        return write_part(self.folder / part, cls, config, self.dtype(part), seed, self.form(part))

    def weights(self, part: str) -> Path:
        return self.folder / part / f"{self.classes[part].weights_stem}.safetensors"


def check_room(place: Path, needed: int, what: str) -> None:
    """Raises OSError where the disk has not so many bytes."""
    free = shutil.disk_usage(place).free - FREE
    if needed > free:
        raise OSError(
            f"{place} has {max(free, 0) / 1e9:.1f} GB to give, and the files of {what} take "
            f"{needed / 1e9:.1f} GB: name another --place, or a smaller --depth"
        )


class Peaks:
    """The most that a process was seen to hold in each stage."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.stage, self.peaks, self.samples, self.report = "start", {}, 0, {}
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.listen, self.look)]
        for thread in self.threads:
            thread.start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            self.stage = said.get("stage", self.stage)
            if "seconds" in said:
                self.report = said

    def look(self) -> None:
        path = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            with contextlib.suppress(OSError, KeyError):
                lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
                held = {name: int(lines[field].split()[0]) * 1024 for name, field in FIELDS.items()}
                peak = self.peaks.setdefault(self.stage, dict.fromkeys(FIELDS, 0))
                peak |= {name: max(peak[name], nbytes) for name, nbytes in held.items()}
                self.samples += 1
            time.sleep(SAMPLED)


def pages_are_taken() -> bool:
    """Whether this system takes pages from processes that have not looked at them for a while (DAMON with
    `pageout`): what is seen of a process is then less than it would be elsewhere."""
    kernel = Path("/sys/kernel/mm/damon/admin/kdamonds")
    running = [path.parent for path in kernel.glob("*/state") if path.read_text().strip() == "on"]
    schemes = (path for one in running for path in one.glob("contexts/*/schemes/*/action"))
    return any(path.read_text().strip() == "pageout" for path in schemes)


def measured(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run `full_size_edit.py`. Raises RuntimeError when it fails."""
    words = [sys.executable, "-m", "benchmarks.full_size_edit", json.dumps(settings)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        peaks = Peaks(process)
        process.wait()
        for thread in peaks.threads:
            thread.join()
    finally:
        process.kill()
        process.wait()
    if process.returncode or not peaks.report:
        raise RuntimeError(f"the edit failed ({process.returncode})")
    stages = {name: peak for name, peak in peaks.peaks.items() if name not in ("start", "end")}
    return {
        "peak": {name: max(stage[name] for stage in stages.values()) for name in FIELDS},
        "stages": stages,
        "samples": peaks.samples,
        **peaks.report,
    }


@torch.no_grad()
def compared(checkpoint: Checkpoint, call: Mapping[str, Any]) -> dict[str, Any]:
    """One recorded call of a block against blocks that are built of the file's bytes: one that computes in
    fp32, and one as it is stored. Raises RuntimeError when they do not agree."""
    part, name, path = call["part"], call["block"], checkpoint.weights(call["part"])
    plain = build_on_meta(checkpoint.classes[part], checkpoint.configs[part])
    block = plain.get_submodule(name).requires_grad_(False).eval()
    block.load_state_dict(read_module(path, name), assign=True)
    wide = first(block(*in_fp32(call["args"]), **in_fp32(call["kwargs"])))
    given = first(call["output"])
    error = ((given.float() - wide).norm() / wide.norm()).item()
    state, groups = read_stored(path, name)
    block = block.to("meta")
    for layer, group in groups.items():
        linear = block.get_submodule(layer)
        assert isinstance(linear, torch.nn.Linear)
        QuantisedLinear.replace(linear, torch.int8, linear.out_features, group, given.dtype)
    block.load_state_dict(state, assign=True)
    equal = torch.equal(first(block(*call["args"], **call["kwargs"])), given)
    if not error <= TOLERANCE or not equal:
        raise RuntimeError(f"{part}.{name}: error {error:.1e} against fp32, bits equal: {equal}")
    return {
        "block": f"{part}.{name}",
        "relative_error": float(f"{error:.3g}"),
        "bits_equal": equal,
        "largest": float(f"{wide.abs().max().item():.3g}"),
    }


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def in_fp32(value: Any) -> Any:
    """The same arguments, numbers of floating point in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_fp32(one) for key, one in value.items()}
    return type(value)(map(in_fp32, value)) if isinstance(value, (tuple, list)) else value


def run(name: str, place: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """All processes of one model."""
    model = MODELS[name]
    with folder_in(place) as folder:
        edge = settings.size
        checkpoint = Checkpoint(folder / "model", model, settings.depth, settings.width, edge)
        processes = []
        whole = tuple(part for parts in model.processes for part in parts)
        for parts in [whole] if settings.whole else model.processes:
            check_room(place, sum(map(checkpoint.nbytes, parts)), f"{name} ({', '.join(parts)})")
            began = time.perf_counter()
            written = {part: checkpoint.write(part, seed) for seed, part in enumerate(parts)}
            seconds = time.perf_counter() - began
            given = {
                "folder": str(folder / "model"),
                "pipeline": model.pipeline,
                "parts": parts,
                "memory": settings.memory,
                "size": [edge, edge],
                "steps": settings.steps,
                "embeddings": str(folder / "embeddings.pt"),
                "record": str(folder / "calls.pt"),
            }
            estimate = estimated(folder / "model", settings)
            found = measured(given)
            calls = torch.load(folder / "calls.pt", weights_only=True)
            blocks = [compared(checkpoint, call) for call in calls]
            before = {"weights": written, "seconds_to_write": seconds, "estimate": estimate}
            processes.append({**before, **found, "blocks": blocks})
            print(json.dumps({name: rounded(processes[-1])}), flush=True)
            for part in parts:
                checkpoint.weights(part).unlink()
    return {
        "layers": checkpoint.configs["transformer"].num_layers,
        "memory": parse_size(settings.memory) if settings.memory else None,
        "size": [edge, edge],
        "steps": settings.steps,
        "peak": max(process["peak"]["rss"] for process in processes),
        "system_takes_pages": pages_are_taken(),
        "processes": processes,
    }


def estimated(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """What `joyedit estimate` says of the whole edit, from the files that are there and the settings of the
    other networks."""
    size = {"height": settings.size, "width": settings.size}
    found = joyedit.estimate(folder, device="cpu", steps=settings.steps, memory=settings.memory, **size)
    return {"peak": dict(found.peak), "smallest": found.smallest, "bytes_per_step": found.bytes_per_step}


@contextlib.contextmanager
def folder_in(place: Path) -> Iterator[Path]:
    """A new folder that is gone at the end, also where the program is told to stop."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="joyedit-full-size-", dir=place) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--place", type=Path, help="where the files go for a while; default: the system's")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--depth", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--whole", action="store_true", help="one process, with all files at a time")
    parser.add_argument("--width", type=int, default=1, help="what the widths are divided by")
    parser.add_argument("--memory", default="6G", help="the budget; none: no budget")
    parser.add_argument("--size", type=int, default=256, help="pixels of both sides")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--timing", action="store_true", help="blocks that stream against blocks that stay")
    parser.add_argument("--layers", type=int, default=5, help="with --timing")
    parser.add_argument("--pairs", type=int, default=9, help="with --timing")
    parser.add_argument("--out", type=Path, default=OUT, help="results are added to those in it")
    given = parser.parse_args(arguments)
    given.memory = None if given.memory == "none" else given.memory
    if not 0 < given.depth <= 1 or given.width < 1:
        parser.error("--depth must be above 0 and at most 1, --width at least 1")
    if not Path("/proc/self/status").is_file():
        sys.exit("what a process holds is read from /proc: this needs Linux")
    place = given.place or Path(tempfile.gettempdir())
    try:
        if given.timing:
            config = JoyImageEditConfig(num_layers=given.layers)
            nbytes = part_bytes(joyedit.JoyImageEditTransformer3DModel, config, torch.bfloat16)
            check_room(place, nbytes, "the timing")
            with folder_in(place) as folder:
                found = streaming_speed.measure(folder, given.layers, given.pairs)
            add(given.out, "streaming", found)
            return
        for name in given.models:
            add(given.out, name, {**run(name, place, given), "machine": machine()})
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{error}")


def add(path: Path, name: str, row: dict[str, Any]) -> None:
    """Put one row into a file of results."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write(path, {**results, name: rounded(row)})


if __name__ == "__main__":
    main()
