"""One edit in several processes, one for each GPU: the branches of the guidance are divided among them, and
the tokens of each branch.

    Mesh             cfg x sequence processes, and the groups in which they speak
    connect, meet    to the processes that torchrun started; the mesh of all of them
    divide, undo     a network's `denoise` among the processes of a mesh, from outside
    streams, film    what each process computes of a call: of the MMDiT, of ChronoEdit's transformer
    Ulysses          attention of all tokens, each process for some of the heads
    Exchange, Gather the two messages, with their gradients

A process has its share of the tokens of every segment (target, references, text), brings it through all
blocks and the head, and what they give is gathered before the guidance. Only attention needs the tokens of
others: two all-to-alls turn a share of the tokens with all heads into all tokens with a share of the heads,
and back. Keys have no order once they are rotated, so the shares stay as they come. How many tokens others
have follows from the shapes, so nobody asks. Text encoder and autoencoder run on every process: one that
waited for their results would do nothing meanwhile.

With gradients every process computes those of its share. They go out as many times too large as there are
processes, and come to every leaf (weight, factor of an adapter, input) as their mean, so that what a loss
computes beside the network is right as well.

B batch   N tokens, n those of a process   H heads   E head width   K processes of a sequence
Source: arXiv 2309.14509 (Ulysses); arXiv 2411.01738, section 4 (branches); picotron
`process_group_manager.py` for the one object that names every group.
"""

import dataclasses
import datetime
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from joyedit import ops
from joyedit.checkpoints.network import Network
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel, grids_of

PATIENCE = datetime.timedelta(days=1)  # one that reads, encodes or writes for hours has not failed
DIVISION = "division"  # the attribute of a divided network

Patches = list[Tensor]  # (B, n, P) of each branch: what the head gives for the tokens of a process
Denoise = Callable[..., list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """cfg x sequence processes, of which this one is `rank`; those of one branch follow one another.

    everyone: the group of all, through which the velocities go. together: of those that share this one's
    branch, through which attention goes. device: where this process computes.
    """

    cfg: int
    sequence: int
    rank: int
    everyone: Any = None
    together: Any = None
    device: torch.device = torch.device("cpu")

    @property
    def size(self) -> int:
        return self.cfg * self.sequence

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def branch(self) -> int:
        """Which part of the branches is this process's."""
        return self.rank // self.sequence

    @property
    def place(self) -> int:
        """Its place among those that share them."""
        return self.rank % self.sequence

    def counts(self, tokens: int) -> list[int]:
        """How many of these each process of a sequence has: as even as can be, the first ones have more."""
        whole, rest = divmod(tokens, self.sequence)
        return [whole + (place < rest) for place in range(self.sequence)]

    def share(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of this process."""
        return x.split(self.counts(x.shape[dim]), dim)[self.place]

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Which part of the mesh computes each branch: neighbours stay together, and the most costly part is
        as cheap as can be. One branch alone is computed by all."""
        if self.cfg == 1 or len(costs) == 1:
            return [self.branch] * len(costs)
        cut = min(range(1, len(costs)), key=lambda i: max(sum(costs[:i]), sum(costs[i:])))
        return [int(i >= cut) for i in range(len(costs))]

    def any(self, flag: bool, *facts: Any) -> bool:
        """Whether it is so on any process. Raises ValueError where `facts` are not the same on all."""
        known = zlib.crc32(repr(facts).encode())
        held = torch.tensor([int(flag), known, -known], dtype=torch.int64, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.everyone)
        found, most, least = held.tolist()
        if most != -least:
            raise ValueError(
                f"the {self.size} processes were not called with the same: every process of a mesh makes the "
                f"same calls with the same arguments and seeds (this one, {self.rank}, has {facts})"
            )
        return bool(found)

    def same_draws(self) -> None:
        """Global generators as the first process has them, so that all draw what it would."""
        states = [torch.get_rng_state()]
        if on_gpu := self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        for i, state in enumerate(states):
            held = state.to(self.device)
            dist.broadcast(held, group_src=0, group=self.everyone)
            states[i] = held.cpu()
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state(states[1], self.device)


def connect(device: torch.device, **options: Any) -> None:
    """Join the processes that torchrun started, unless a group is there already. options: of
    `init_process_group`."""
    if dist.is_initialized():
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(backend_of(device), timeout=PATIENCE, **options)


def backend_of(device: torch.device) -> str:
    """What carries messages from main memory and, of an accelerator, from its own."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def checked(network: Any, cfg: int, sequence: int) -> Network:
    """The network. Raises ValueError for one that cannot be divided, or not so."""
    for name, value in (("cfg", cfg), ("sequence", sequence)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number from 1")
    if cfg > 2:
        raise ValueError(f"cfg={cfg}: must be 1 or 2, guidance has two branches")
    divisible: Any = tuple(PLANS)
    if not isinstance(network, divisible):
        kinds = " and ".join(kind.__name__ for kind in PLANS)
        raise ValueError(f"a {type(network).__name__} cannot be divided among processes, only {kinds}")
    check_heads(network.config.num_attention_heads, sequence)
    return network


def check_heads(heads: int, sequence: int) -> None:
    if heads % sequence:
        fitting = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        raise ValueError(f"sequence={sequence} does not divide the {heads} heads of attention: {fitting} do")


def meet(cfg: int, sequence: int, device: torch.device) -> Mesh:
    """The mesh of all processes of the group that is there, else of those that torchrun started. Raises
    ValueError for more or fewer, and for a device that is another process's."""
    from torch.distributed.device_mesh import init_device_mesh

    started = int(os.environ.get("WORLD_SIZE") or 1)
    if (count := dist.get_world_size() if dist.is_initialized() else started) != cfg * sequence:
        raise ValueError(
            f"a mesh of cfg={cfg} x sequence={sequence} is {cfg * sequence} processes, not {count}: start "
            f"them with `torchrun --nproc-per-node {cfg * sequence}`"
        )
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and local is not None:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index != int(local) and torch.cuda.device_count() > 1:  # else it sees its own alone
            raise ValueError(
                f"the pipeline is on cuda:{index}, and this is process {local} of its machine: load it with "
                f"device='cuda:{local}'"
            )
    connect(device)
    made = init_device_mesh(device.type, (cfg, sequence), mesh_dim_names=("cfg", "sequence"))
    return Mesh(cfg, sequence, dist.get_rank(), dist.group.WORLD, made.get_group("sequence"), device)


def mesh_of(network: nn.Module | None) -> Mesh | None:
    """That among whose processes the network is divided."""
    division = getattr(network, DIVISION, None)
    return None if division is None else division.mesh


def divide(network: Network, mesh: Mesh) -> None:
    """From now on the processes of the mesh compute the network's `denoise` together. Each calls the network
    with whole tensors, and gets whole ones."""
    undo(network)
    plan = next(plan for kind, plan in PLANS.items() if isinstance(network, kind))
    for module in attending(network) if mesh.sequence > 1 else ():
        module.attend = ulysses = Ulysses(mesh)
        for name in ("forward", "forward_target"):
            if (method := getattr(type(module), name, None)) is not None:
                setattr(module, name, ulysses.told(method.__get__(module), name == "forward_target"))
    division = Division(mesh)
    network.__dict__ |= {DIVISION: division, "denoise": plan(network, division)}


def undo(network: nn.Module) -> None:
    """Let this process compute the network alone, as before `divide`."""
    for module in attending(network):
        module.attend = ops.attention
        for name in ("forward", "forward_target"):
            module.__dict__.pop(name, None)
    network.__dict__.pop("denoise", None)
    if (division := network.__dict__.pop(DIVISION, None)) is not None:
        division.forget()


def attending(network: nn.Module) -> list[Any]:
    """The attention over the tokens that are divided; what attends to others has its keys everywhere."""
    return [module for module in network.modules() if "attend" in vars(module)]


class Rows(NamedTuple):
    """How many tokens of a branch each process of a sequence has: of all, and of the target."""

    everything: list[int]
    target: list[int]


class Share(tuple):
    """Rotary tables of the tokens of this process; whoever gets them knows how many tokens the others have,
    also when blocks are computed once more for a gradient."""

    rows: Rows

    def __new__(cls, tables: Sequence[Tensor], rows: Rows) -> "Share":
        made = super().__new__(cls, tables)
        made.rows = rows
        return made


def streams(network: JoyImageEditTransformer3DModel, division: "Division") -> Denoise:
    """`denoise` of the MMDiT. Branches whose texts are of one length go through the blocks together."""
    mesh = division.mesh

    def denoise(branches, num_targets, vec, rope, grid, caches=None):
        refuse_caches(caches)
        branches, vec = entered((branches, vec))
        owners = mesh.owners([img.shape[0] * (img.shape[1] + txt.shape[1]) for img, txt in branches])
        lengths: dict[int, list[int]] = {}
        for i, (_, txt) in enumerate(branches):
            if owners[i] == mesh.branch:
                lengths.setdefault(txt.shape[1], []).append(i)
        target, tables = mesh.counts(num_targets), [segments(mesh, table, num_targets, 0) for table in rope]
        found: dict[int, Tensor] = {}
        for length, alike in lengths.items():
            counts = zip(
                target, mesh.counts(rope[0].shape[0] - num_targets), mesh.counts(length), strict=True
            )
            share = Share(tables, Rows([sum(each) for each in counts], target))
            own = [
                (segments(mesh, branches[i][0], num_targets, 1), mesh.share(branches[i][1])) for i in alike
            ]
            made = patches_of(network, own, target[mesh.place], vec, share, grid)
            found |= dict(zip(alike, made, strict=True))
        inputs = [vec, *(x for branch in branches for x in branch)]
        sizes = [len(img) for img, _ in branches]
        patches = division.gathered(found, owners, sizes, target, network.proj_out.out_features, inputs)
        return [network.unpatchify(x, grids_of(grid)[0]) for x in patches]

    return denoise


def film(network: ChronoEditTransformer3DModel, division: "Division") -> Denoise:
    """`denoise` of ChronoEdit's transformer. What its cross-attention reads is everywhere."""
    mesh = division.mesh

    def denoise(imgs, texts, image, vec, rope, grid, caches=None):
        refuse_caches(caches)
        imgs, texts, image, vec = entered((imgs, texts, image, vec))
        owners = mesh.owners([len(img) for img in imgs])
        own = [i for i, owner in enumerate(owners) if owner == mesh.branch]
        counts = mesh.counts(rope[0].shape[0])
        share = Share([mesh.share(table, 0) for table in rope], Rows(counts, counts))
        read = [texts[i] for i in own]
        made = patches_of(network, [mesh.share(imgs[i]) for i in own], read, image, vec, share, grid)
        found = dict(zip(own, made, strict=True))
        inputs, sizes = [vec, *tensors_in((imgs, texts, image))], [len(img) for img in imgs]
        patches = division.gathered(found, owners, sizes, counts, network.proj_out.out_features, inputs)
        return [network.unpatchify(x, grid) for x in patches]

    return denoise


PLANS: dict[type[nn.Module], Callable[[Any, "Division"], Denoise]] = {
    JoyImageEditTransformer3DModel: streams,
    ChronoEditTransformer3DModel: film,
}


def segments(mesh: Mesh, x: Tensor, num_targets: int, dim: int) -> Tensor:
    """This process's tokens of the target and of what follows it."""
    sizes = [num_targets, x.shape[dim] - num_targets]
    return torch.cat([mesh.share(segment, dim) for segment in x.split(sizes, dim)], dim)


def patches_of(network: Any, *arguments: Any) -> Patches:
    """What the network's own `denoise` gives before it is unpatchified."""
    network.__dict__["unpatchify"] = lambda patches, grid: patches
    try:
        return type(network).denoise(network, *arguments)
    finally:
        del network.__dict__["unpatchify"]


def refuse_caches(caches: Any) -> None:
    if caches is not None:
        raise ValueError("a divided network has no step cache: each process would decide by its own tokens")


def entered(nested: Any) -> Any:
    """The same tensors as nodes of the graph of their own: where gradients come together before they go on to
    leaves, so that these get theirs in the same order in every process."""
    if isinstance(nested, Tensor):
        return nested.view_as(nested)
    return tuple(map(entered, nested)) if isinstance(nested, (list, tuple)) else nested


def tensors_in(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for each in nested:
            yield from tensors_in(each)


class Ulysses:
    """Attention over the tokens of all processes of a sequence, in place of `ops.attention`."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.rows = Rows([], [])
        self.asks_target = False

    def told(self, method: Callable[..., Any], asks_target: bool) -> Callable[..., Any]:
        """A method of the attention, whose rotary tables say how many tokens there are."""

        def call(*args: Any) -> Any:
            self.rows = next(arg.rows for arg in args if isinstance(arg, Share))
            self.asks_target = asks_target
            return method(*args)

        return call

    def __call__(
        self, q: Tensor | Sequence[Tensor], k: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """q (B, n, H, E) and k, v of this process's tokens, each whole or in segments -> (B, n, H, E)."""
        keys = self.rows.everything
        queries = self.rows.target if self.asks_target else keys
        whole = [x if isinstance(x, Tensor) else torch.cat(tuple(x), dim=1) for x in (q, k, v)]
        all_q, all_k, all_v = self.to_heads(whole, [queries, keys, keys])
        return self.to_tokens(ops.attention(all_q, all_k, all_v), queries)

    def to_heads(self, tensors: Sequence[Tensor], rows: Sequence[list[int]]) -> list[Tensor]:
        """(B, n, H, E) each -> (B, N, H / K, E), in one message. rows: tokens of each on every process."""
        count = self.mesh.sequence
        b, _, heads, e = tensors[0].shape
        packed = [rearrange(x, "b n (k h) e -> k (b n h e)", k=count) for x in tensors]
        joined = torch.cat(packed, dim=1)  # (K, what each process gets)
        token = b * (heads // count) * e
        lengths = [[token * n for n in of_process] for of_process in zip(*rows, strict=True)]
        received = [sum(each) for each in lengths]
        sent = [joined.shape[1]] * count
        flat = Exchange.apply(joined.flatten(), sent, received, self.mesh.together)
        parts = [x.split(each) for x, each in zip(flat.split(received), lengths, strict=True)]
        shape = (b, -1, heads // count, e)
        return [torch.cat([x.view(shape) for x in each], dim=1) for each in zip(*parts, strict=True)]

    def to_tokens(self, x: Tensor, rows: list[int]) -> Tensor:
        """(B, N, H / K, E) -> (B, n, H, E)."""
        count = self.mesh.sequence
        b, _, heads, e = x.shape
        token = b * heads * e
        flat = torch.cat([part.flatten() for part in x.split(rows, dim=1)])
        own = [token * rows[self.mesh.place]] * count
        flat = Exchange.apply(flat, [token * n for n in rows], own, self.mesh.together)
        return rearrange(flat.view(count, b, -1, heads, e), "k b n h e -> b n (k h) e")


class Exchange(torch.autograd.Function):
    """An all-to-all: `sent` numbers go to each process of the group, `received` come from each."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = (received, sent, group)
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return Exchange.apply(grads[0], *ctx.back), None, None, None


class Division:
    """What becomes of the branches that the processes of a mesh have computed, and of their gradients."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.hooks = WeakIdKeyDictionary()

    def gathered(
        self,
        own: dict[int, Tensor],
        owners: list[int],
        sizes: list[int],
        counts: list[int],
        width: int,
        inputs: list[Tensor],
    ) -> Patches:
        """The patches (B, N, P) of all branches, in one message.

        own: those of this process by the number of the branch. owners: which part of the mesh has each
        branch. sizes: its samples; counts: tokens of each place. inputs: what all were computed from.
        """
        mesh, divided = self.mesh, len(set(owners)) > 1
        parts = range(mesh.cfg) if divided else [mesh.branch]
        members = [(part, place) for part in parts for place in range(mesh.sequence)]
        branches = {part: [i for i, owner in enumerate(owners) if owner == part] for part in parts}
        lengths = {
            (part, place): [sizes[i] * counts[place] * width for i in branches[part]]
            for part, place in members
        }
        rows = torch.cat([own[i].flatten() for i in branches[mesh.branch]])[None]
        if len(members) > 1:
            group, place = (mesh.everyone, mesh.rank) if divided else (mesh.together, mesh.place)
            longest = max(map(sum, lengths.values()))
            scale = mesh.size if divided else mesh.sequence
            anchors = [x for x in inputs if x.requires_grad]
            rows = Gather.apply(group, place, len(members), longest, scale, rows[0], *anchors)
        self.average_gradients_of(rows)
        pieces: dict[int, list[Tensor]] = {i: [] for i in range(len(owners))}
        for (part, place), row in zip(members, rows, strict=True):
            each = lengths[part, place]
            for i, piece in zip(branches[part], row[: sum(each)].split(each), strict=True):
                pieces[i].append(piece.view(sizes[i], counts[place], width))
        return [torch.cat(pieces[i], dim=1) for i in range(len(owners))]

    def average_gradients_of(self, result: Tensor) -> None:
        """What comes to the leaves that `result` was computed from is the mean over all processes."""
        waiting, seen = [result.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and leaf not in self.hooks:
                self.hooks[leaf] = leaf.register_hook(self.mean)
            waiting += [before for before, _ in node.next_functions]

    def mean(self, grad: Tensor) -> Tensor:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=self.mesh.everyone)
        return (total / self.mesh.size).to(grad.dtype)

    def forget(self) -> None:
        """Leave the leaves alone again."""
        for hook in self.hooks.values():
            hook.remove()


class Gather(torch.autograd.Function):
    """What each of `count` processes has, padded to the longest, on all of them: (count, longest). Each gets
    back the gradient of its own, `scale` times. The anchors are inputs that another process may have used:
    they get a gradient of nothing here, so that every process waits for the same ones."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Any,
        place: int,
        count: int,
        longest: int,
        scale: int,
        flat: Tensor,
        *anchors: Tensor,
    ) -> Tensor:
        ctx.place, ctx.length, ctx.scale = place, len(flat), scale
        ctx.anchors = [(x.shape, x.dtype, x.device) for x in anchors]
        out = flat.new_empty(count, longest)
        dist.all_gather([*out], F.pad(flat, (0, longest - len(flat))), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        own = grads[0][ctx.place, : ctx.length] * ctx.scale
        nothing = [torch.zeros(shape, dtype=dtype, device=at) for shape, dtype, at in ctx.anchors]
        return None, None, None, None, None, own, *nothing
