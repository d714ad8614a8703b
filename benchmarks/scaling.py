"""What a denoising step takes on 1 to 8 GPUs, predicted: `python -m benchmarks.scaling`.

Nothing is timed. The released networks, without memory for their weights, go through the code that divides an
edit among processes (`joyedit/parallel.py`), as the first process of each mesh, which has the most tokens.
Every operation that it dispatches is counted, and its groups record every message that it sends. From
operations and bytes, as the makers' figures and the shares of them that are assumed have it, follows the time
of a guided step: nothing is sent while something is computed. `sent_by_formula` says what the messages must
come to; a test holds the record to it, and the record without memory to that of real processes.

K processes of a sequence   S tokens of a branch, of which M are the target's   D width
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from joyedit import ops, parallel
from joyedit.checkpoints.network import Network, build_on_meta
from joyedit.estimates.counting import Counted, Tally
from joyedit.estimates.machines import MACHINES, seconds_of
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel

# cfg x sequence
MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8))
TEXTS = (1100, 1060)  # tokens of an instruction with its photograph, and of none
PADDED, CLIP_TOKENS = 512, 257  # of ChronoEdit

# Of what the makers say of links this share is assumed, and a message takes this long to begin. Neither was
# measured.
LINK_SHARE = 0.7
BEGINNING = 20e-6


class Link(NamedTuple):
    """Bytes per second that a GPU sends to all others at once, and to one of them."""

    total: float
    pair: float


LINKS = {
    "A100": Link(300e9, 300e9),  # NVLink 3 and a switch
    "H100": Link(450e9, 450e9),
    "H200": Link(450e9, 450e9),
    "B200": Link(900e9, 900e9),
    "MI300X": Link(448e9, 64e9),  # seven links, one to each other
    "RTX 4090": Link(25e9, 25e9),  # PCIe 4, through main memory
}


class Recording(dist.ProcessGroup):
    """A group that notes the bytes of every message to other processes, and whether nothing happens then or
    `inner`, a real group, sends it."""

    def __init__(self, rank: int, count: int, inner: Any = None):
        super().__init__(rank, count)
        self.place, self.count, self.inner = rank, count, inner
        self.sent: list[int] = []

    def all_to_all_single(self, output: Tensor, input: Tensor, received: Any, sent: Any, options: Any) -> Any:
        others = sum(sent) - sent[self.place]
        self.sent.append(others * input.element_size())
        return self.inner and dist.all_to_all_single(output, input, received, sent, group=self.inner)

    alltoall_base = all_to_all_single  # as PyTorch called it until 2.12

    def allgather(self, outputs: Any, inputs: Any, options: Any) -> Any:
        (own,) = inputs
        self.sent.append((self.count - 1) * own.numel() * own.element_size())
        return self.inner and dist.all_gather(outputs[0], own, group=self.inner)


def recording(mesh: parallel.Mesh) -> parallel.Mesh:
    """The same mesh, whose groups record what they send."""
    everyone = Recording(mesh.rank, mesh.size, mesh.everyone)
    together = Recording(mesh.place, mesh.sequence, mesh.together)
    return parallel.Mesh(mesh.cfg, mesh.sequence, mesh.rank, everyone, together, mesh.device)


class Work(NamedTuple):
    """A step of one process: what it computes, and the bytes of its messages to each group."""

    tally: Tally
    together: list[int]
    everyone: list[int]

    def seconds(self, name: str, mesh: tuple[int, int]) -> tuple[float, float]:
        """Of computing and of sending."""
        link = LINKS[name]
        sending = sum(sent_in(count, mesh[1], link) for count in self.together)
        sending += sum(sent_in(count, mesh[0] * mesh[1], link) for count in self.everyone)
        return seconds_of(self.tally.calls, MACHINES[name]), sending


def sent_in(nbytes: int, count: int, link: Link) -> float:
    """Seconds of a message of so many bytes to all others of a group."""
    return BEGINNING + max(nbytes / link.total, nbytes / (count - 1) / link.pair) / LINK_SHARE


class Shape(NamedTuple):
    """What the messages of a step depend on. segments: tokens of the target, and of what stands beside it in
    every branch. texts: tokens of the text of each branch that are divided as well. patch: numbers that the
    head gives for a token. ends_in_target: whether only the target asks in the last layer."""

    segments: tuple[int, ...]
    texts: tuple[int, ...]
    width: int
    layers: int
    patch: int
    ends_in_target: bool


class Edit(NamedTuple):
    """network, config: of the transformer, in bf16. step: does what is done once in a run, and gives what a
    guided step does, to be called."""

    network: type[Network]
    config: Any
    step: Callable[[Any], Callable[[], list[Tensor]]]
    shape: Shape


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def joyimage(network: JoyImageEditTransformer3DModel) -> Callable[[], list[Tensor]]:
    """1024 x 1024 pixels, and one reference."""
    latents = empty(1, 1, network.config.in_channels, 1, 128, 128)
    frames, rows, columns = network.token_grid(latents)
    grid = (2 * frames, rows, columns)
    references, vec = network.embed_image(latents), network.embed_time(empty(1, dtype=torch.float32))
    texts = [network.embed_text(empty(1, count, network.config.text_dim)) for count in TEXTS]
    rope = network.rope(grid, "meta")

    def step() -> list[Tensor]:
        target = network.embed_image(latents)
        return network.predict_branches(target, references, texts, vec[0], rope, grid)

    return step


def film(frames: int) -> Callable[[ChronoEditTransformer3DModel], Callable[[], list[Tensor]]]:
    """1280 x 720 pixels."""

    def begun(network: ChronoEditTransformer3DModel) -> Callable[[], list[Tensor]]:
        latents = empty(1, network.config.in_channels, 1 + (frames - 1) // 4, 90, 160, dtype=torch.float32)
        vec = network.embed_time(empty(1, dtype=torch.float32))
        texts = [network.embed_text(empty(1, PADDED, network.config.text_dim)) for _ in range(2)]
        image = network.embed_image(empty(1, CLIP_TOKENS, network.config.image_dim))
        rope = network.rope(network.token_grid(latents), "meta")
        return lambda: network.predict_branches(latents, vec[0], texts, image, rope)

    return begun


def film_of(frames: int) -> Edit:
    config = ChronoEditConfig()
    shape = Shape((3600 * (1 + (frames - 1) // 4),), (0, 0), config.width, config.num_layers, 64, False)
    return Edit(ChronoEditTransformer3DModel, config, film(frames), shape)


EDITS = {
    "JoyAI-Image-Edit, 1024 x 1024": Edit(
        JoyImageEditTransformer3DModel,
        JoyImageEditConfig(),
        joyimage,
        Shape((4096, 4096), TEXTS, 4096, 40, 64, True),
    ),
    "ChronoEdit, 1280 x 720, 5 frames": film_of(5),
    "ChronoEdit, 1280 x 720, 29 frames": film_of(29),
}


def work_of(edit: Edit, cfg: int, sequence: int, rank: int = 0) -> Work:
    """Of one process of a mesh."""
    network: Any = build_on_meta(edit.network, edit.config).to(torch.bfloat16).requires_grad_(False)
    mesh = recording(parallel.Mesh(cfg, sequence, rank, device=torch.device("meta")))
    if mesh.size > 1:
        parallel.divide(network, mesh)
    counted = Counted(network.parameters(), ())
    with torch.no_grad(), ops.standing_for("cuda"), counted:
        step = edit.step(network)
        with counted.measure() as tally:
            step()
    return Work(tally, mesh.together.sent, mesh.everyone.sent)


def sent_by_formula(shape: Shape, cfg: int, sequence: int, rank: int = 0) -> int:
    """Bytes that a process sends to others in a step of one sample in bf16.

    A layer sends q, k and v of the process's tokens, K - 1 of their K parts, and what its heads gave for the
    tokens of others. The velocities go to all who need them, padded to the most that anyone has.
    """
    mesh = parallel.Mesh(cfg, sequence, rank)
    owners = mesh.owners([sum(shape.segments) + text for text in shape.texts])
    target, total = mesh.counts(shape.segments[0]), 0
    for text, owner in zip(shape.texts, owners, strict=True):
        divided = [mesh.counts(tokens) for tokens in (*shape.segments, text)]
        rows = [sum(each) for each in zip(*divided, strict=True)]
        for layer in range(shape.layers if owner == mesh.branch else 0):
            asking = target if shape.ends_in_target and layer == shape.layers - 1 else rows
            own, others = asking[mesh.place], sum(asking) - asking[mesh.place]
            total += shape.width // sequence * ((sequence - 1) * (own + 2 * rows[mesh.place]) + others)
    divided = len(set(owners)) > 1
    receivers, branches = (mesh.size, 1) if divided else (sequence, len(owners))
    return 2 * (total + (receivers - 1) * branches * target[0] * shape.patch)


def predicted() -> dict[str, Any]:
    """Edit -> mesh -> bytes of its messages, and for each GPU seconds of a step."""
    found: dict[str, Any] = {}
    for name, edit in EDITS.items():
        rows: dict[str, Any] = {}
        for mesh in MESHES:
            work = work_of(edit, *mesh)
            seconds = {gpu: work.seconds(gpu, mesh) for gpu in LINKS}
            rows["x".join(map(str, mesh))] = {
                "messages": len(work.together) + len(work.everyone),
                "bytes": sum(work.together) + sum(work.everyone),
                "operations": work.tally.operations,
                "computing": {gpu: round(each[0], 5) for gpu, each in seconds.items()},
                "sending": {gpu: round(each[1], 5) for gpu, each in seconds.items()},
            }
        found[name] = rows
    return found


def step_seconds(row: Mapping[str, Any], gpu: str) -> float:
    return row["computing"][gpu] + row["sending"][gpu]


def lines(found: Mapping[str, Any]) -> list[str]:
    made = []
    for name, rows in found.items():
        for gpu in LINKS:
            made.append(f"{name}, {gpu}")
            alone = step_seconds(rows["1x1"], gpu)
            for mesh, row in rows.items():
                cfg, sequence = map(int, mesh.split("x"))
                took = step_seconds(row, gpu)
                share = alone / took / (cfg * sequence)
                sending = f"{row['sending'][gpu]:7.3f} s of it sending {row['bytes'] / 1e9:6.2f} GB"
                made.append(
                    f"  cfg={cfg} sequence={sequence}  {took:8.3f} s a step, {sending}   "
                    f"{alone / took:5.2f}x   efficiency {share:4.0%}"
                )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args(arguments).out
    found = predicted()
    print("\n".join(lines(found)))
    if out:
        assumed = {"link_share": LINK_SHARE, "beginning": BEGINNING, "links": LINKS}
        content = {"assumed": assumed, "edits": found}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
