"""A step of training beside diffusers and PEFT: seconds and memory.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.training [--quick] [--device cuda]

Both sides train the same small network with the same random weights on the same input: adapters of rank 32
on the layers of attention, or all weights; with and without gradient checkpointing; AdamW in fp32. First the
gradients are compared: a row whose sides differ is not measured. Then steps are timed in turns. Memory is
what a step adds, at the most, to what is held before it: weights, moments and the adapters are there then. On
a CPU it is the resident set, with a C library that gives freed memory back at once; on a GPU what PyTorch has
handed out.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.side_by_side import RESULTS, check, machine, rounded, version, write
from joyedit.checkpoints.network import Network, load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.lora import Adapters
from joyedit.memory.budget import ProcessRoom, resident_bytes
from joyedit.memory.pages import give_back_unused
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel

RANK, PAIRS, TOLERANCE = 32, 7, 1e-4
PAIRS_OF_BYTES = 2
SMALL_PIECE, LARGE_PIECE = 2**16, 2**25  # bytes from which the C library asks the system for each piece
ATTENTION = {
    "joyimage": ["img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj"],
    "chronoedit": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    "diffedit": ["to_q", "to_k", "to_v", "to_out.0"],
}
PREFIX = {"joyimage": "transformer", "chronoedit": "transformer", "diffedit": "unet"}


def joyimage(quick: bool) -> tuple[Any, type[Network], tuple[Tensor, ...], str]:
    """The reference, our class, what both are called with, and what that is in words."""
    width, side, words = (96, 4, 9) if quick else (384, 20, 64)
    config = dict(
        hidden_size=width,
        num_attention_heads=width // 32,
        num_layers=2 if quick else 6,
        text_dim=width,
        rope_dim_list=[8, 12, 12],
    )
    reference = diffusers.JoyImageEditTransformer3DModel.from_config(config)
    given = drawn(1, 2, 16, 1, side, side), torch.tensor([501.0]), drawn(1, words, width)
    tokens = 2 * (side // 2) ** 2
    shape = f"{config['num_layers']} blocks of width {width}, {tokens} image and {words} text tokens"
    return reference, JoyImageEditTransformer3DModel, given, shape


def chronoedit(quick: bool) -> tuple[Any, type[Network], tuple[Tensor, ...], str]:
    heads, side = (2, 4) if quick else (12, 20)
    config = dict(
        patch_size=[1, 2, 2],
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=36,
        out_channels=16,
        text_dim=256,
        freq_dim=64,
        ffn_dim=heads * 86,
        num_layers=2 if quick else 6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=64,
        added_kv_proj_dim=heads * 32,
        rope_max_seq_len=64,
    )
    reference = diffusers.ChronoEditTransformer3DModel.from_config(config)
    given = (drawn(1, 36, 2, side, side), torch.tensor([501.0]), drawn(1, 512, 256), drawn(1, 257, 64))
    tokens = 2 * (side // 2) ** 2
    shape = f"{config['num_layers']} blocks of width {heads * 32}, {tokens} video, 512 text, 257 image tokens"
    return reference, ChronoEditTransformer3DModel, given, shape


def diffedit(quick: bool) -> tuple[Any, type[Network], tuple[Tensor, ...], str]:
    widths, side = ([32, 64], 8) if quick else ([64, 128, 256], 32)
    attended = len(widths) - 1
    config = dict(
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D"] * attended + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attended,
        layers_per_block=2,
        sample_size=side,
        cross_attention_dim=256,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    reference = diffusers.UNet2DConditionModel.from_config(config)
    given = drawn(1, 4, side, side), torch.tensor([501.0]), drawn(1, 77, 256)
    shape = f"levels of width {', '.join(map(str, widths))}, latents of {side} x {side}, 77 text tokens"
    return reference, UNet2DConditionModel, given, shape


SYSTEMS: dict[str, Callable[[bool], Any]] = {
    "joyimage": joyimage, "chronoedit": chronoedit, "diffedit": diffedit,
}  # fmt: skip


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape)


def filled(reference: nn.Module) -> nn.Module:
    """Random weights of the scale that keeps activations finite; norms near 1, no table at zero."""
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=float(parameter.mean().round()), std=0.1)
    return reference


def read_from(reference: Any, kind: type[Network]) -> Any:
    """Ours, with the same weights in memory of its own."""
    config = kind.Config.from_dict(json.loads(reference.to_json_string()))
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    return load_network(kind, config, TensorFiles.of(state))


class Side:
    """One of the two: a network, what of it trains by our names, and its optimiser."""

    def __init__(self, network: Any, parameters: dict[str, nn.Parameter], given: tuple[Tensor, ...]):
        self.network, self.parameters, self.given = network, parameters, given
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)

    def gradients(self) -> dict[str, Tensor]:
        self.loss().backward()
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()
        }
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def loss(self) -> Tensor:
        return self.network(*self.given)[0].square().mean()

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def sides(
    system: str, full: bool, recomputed: bool, quick: bool, device: torch.device
) -> tuple[Side, Side, str]:
    """The reference's, ours, and the shape in words."""
    torch.manual_seed(0)
    reference, kind, given, shape = SYSTEMS[system](quick)
    filled(reference)
    ours = read_from(reference, kind).to(device)
    reference, given = reference.to(device), tuple(tensor.to(device) for tensor in given)
    if full:
        theirs = dict(reference.requires_grad_(True).named_parameters())
        own = dict(ours.requires_grad_(True).named_parameters())
    else:
        reference.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION[system], init_lora_weights=False),
            reference,
        )
        own = Adapters({PREFIX[system]: ours}).add_lora(RANK)
        theirs = dict(reference.named_parameters())
        names = {n: n.removeprefix(f"{PREFIX[system]}.").replace(".weight", ".default.weight") for n in own}
        theirs = {ours_: theirs[name] for ours_, name in names.items()}
        for name, p in own.items():
            p.data = theirs[name].data.clone()
    if recomputed:
        reference.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    reference.train()  # without it, diffusers keeps everything
    return Side(reference, {n: theirs[n] for n in own}, given), Side(ours, dict(own), given), shape


def apart(theirs: Side, ours: Side) -> float:
    """The largest difference of a gradient, relative to the largest number in its tensor; of tensors that
    have next to no gradient, as the bias of a key, in all of them."""
    wanted, found = theirs.gradients(), ours.gradients()
    largest = {name: float(tensor.abs().max()) for name, tensor in wanted.items()}
    least = 1e-5 * max(largest.values())
    return max(
        float((found[name] - tensor).abs().max()) / max(largest[name], least)
        for name, tensor in wanted.items()
    )


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """While the block runs, glibc gives the memory of each larger piece back when it is freed."""
    libc, threshold = ctypes.CDLL(None), -3
    libc.mallopt(threshold, SMALL_PIECE)
    try:
        yield
    finally:
        libc.mallopt(threshold, LARGE_PIECE)


def added(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that `run` adds, at the most, to what is held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    give_back_unused()
    before, room = resident_bytes(), ProcessRoom(2**60)
    room.forget()
    run()
    return room.most() - before


def timed(run: Callable[[], None], device: torch.device) -> float:
    before = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def measure(system: str, full: bool, recomputed: bool, quick: bool, device: torch.device) -> dict[str, Any]:
    """One row. Raises UnequalResults where the two sides do not train the same way."""
    theirs, ours, shape = sides(system, full, recomputed, quick, device)
    off = check(apart(theirs, ours), TOLERANCE)
    theirs.step(), ours.step()
    seconds, memory = [], []
    for i in range(1 if quick else PAIRS):
        order = (theirs, ours) if i % 2 == 0 else (ours, theirs)
        times = {id(side): timed(side.step, device) for side in order}
        seconds.append((times[id(theirs)], times[id(ours)]))
    with giving_back() if device.type == "cpu" else contextlib.nullcontext():
        theirs.step(), ours.step()
        for _ in range(1 if quick else PAIRS_OF_BYTES):
            memory.append((added(theirs.step, device), added(ours.step, device)))
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in ours.network.parameters()),
        "trained": sum(p.numel() for p in ours.parameters.values()),
        "difference": off,
        **{f"seconds_{name}": statistics.median(pair[i] for pair in seconds)
           for i, name in enumerate(("reference", "ours"))},
        "time_ratio": statistics.median(a / b for a, b in seconds),
        **{f"bytes_{name}": statistics.median(pair[i] for pair in memory)
           for i, name in enumerate(("reference", "ours"))},
        "memory_ratio": statistics.median(a / b for a, b in memory),
        "pairs": seconds,
        "pairs_of_bytes": memory,
    }  # fmt: skip


def name_of(system: str, full: bool, recomputed: bool) -> str:
    return f"{system}, {'full' if full else 'lora'}{', checkpointing' if recomputed else ''}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, not how fast")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, help="default: results/training.json of a whole full run")
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": {**machine(), "peft": version("peft")}, "rows": {}}
    report["machine"]["device"] = (
        torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else given.device.type
    )
    for system in given.only:
        for full in (False, True):
            for recomputed in (False, True):
                row = rounded(measure(system, full, recomputed, given.quick, given.device))
                name = name_of(system, full, recomputed)
                report["rows"][name] = row
                ratios = f"time {row['time_ratio']:.2f}x memory {row['memory_ratio']:.2f}x"
                print(f"{name:<32} {ratios}, gradients apart {row['difference']:.0e}", flush=True)
                gc.collect()
    whole = not given.quick and given.only == list(SYSTEMS)
    if (path := given.out or (RESULTS / "training.json" if whole else None)) is not None:
        write(path, report)


if __name__ == "__main__":
    main()
