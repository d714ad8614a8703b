"""The networks of a training: encoders for its first pass, the denoiser for its second; what is written."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from joyedit.checkpoints.network import Network, PlannedNetwork, build_on_meta, plan_network
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.replacing import replacing_folder
from joyedit.checkpoints.tensor_files import Entry, TensorFiles
from joyedit.loading.layouts import load, open_unread
from joyedit.quantised import quantisable, quantised_weights
from joyedit.training.plan import Plan
from joyedit.training.processes import ALONE, Processes
from joyedit.training.settings import Settings
from joyedit.training.sharding import Divided, Rows, fill, gathered_for_a_while, shard
from joyedit.training.states import SHARDS, Pieces, cut, open_saved, shape_of

LORA, CHECKPOINT = "lora.safetensors", "checkpoint"
BASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def open_encoders(settings: Settings, plan: Plan, device: torch.device) -> Any:
    """The pipeline without its denoiser. The autoencoder is in fp32: latents are what is aimed at."""
    without: dict[str, Any] = {plan.system.denoiser: None}
    pipe = load(
        settings.model,
        device=device,
        dtype={"default": "auto", "vae": torch.float32},
        revision=settings.revision,
        memory=settings.memory,
        **without,
    )
    return quiet(pipe)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The pipeline without text encoders, its denoiser, what of it is trained, by name, and how it is
    written. divided: of several processes that train all weights, whose rows `parameters` are then."""

    pipe: Any
    network: Any
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    plan: Plan
    processes: Processes = ALONE
    divided: Divided | None = None

    @property
    def rows(self) -> Mapping[str, Rows]:
        return {} if self.divided is None else self.divided.rows

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """While the block runs, nothing is kept for a gradient."""
        with torch.no_grad(), gathered_for_a_while(self.network, self.processes):
            yield

    def average_gradients(self) -> None:
        """Of several processes: that of each parameter becomes the mean of theirs. Of divided ones it is."""
        if self.divided is not None:
            self.divided.take_gradients()
        common = [p for name, p in self.parameters.items() if name not in self.rows]
        self.processes.average_([p.grad for p in common if p.grad is not None])

    def place(self, out: Path) -> Path:
        return out / (CHECKPOINT if self.settings.full else LORA)

    def write(self, out: Path) -> None:
        """What the parameters are now: an adapter, or the whole checkpoint. Replaces the last one whole. Of
        divided parameters, what was saved of them last is written."""
        if self.processes.first:
            if self.divided is not None:
                self._write_checkpoint(out, saved_weights(self, out))
            elif self.settings.full:
                self._write_checkpoint(out, self.network.state_dict())
            else:
                base = f"{self.settings.model} {self.plan.found['model']}"
                self.pipe.adapters.save_lora(out / LORA, base=base, trigger=self.settings.trigger or "")
        self.processes.wait()

    def _write_checkpoint(self, out: Path, weights: Mapping[str, Tensor]) -> None:
        write_checkpoint(out / CHECKPOINT, self.network, weights, self.settings, self.plan)


def open_trained(
    settings: Settings, plan: Plan, device: torch.device, processes: Processes = ALONE
) -> Trained:
    """Raises ValueError for a rank or targets that make no adapter."""
    system = plan.system
    base = base_of(settings, device)
    parts: dict[str, Any] = {name: None for name in system.encoders if name in plan.checkpoint.pipeline.parts}
    if processes.several:
        parts[system.denoiser] = None
    int8 = base == "int8" and not processes.several
    pipe = load(
        settings.model,
        device="cpu" if int8 else device,  # in eight bits it is half as large
        dtype={"default": "auto", "vae": torch.float32, system.denoiser: BASES[base]},
        revision=settings.revision,
        memory=None if int8 else settings.memory,
        **parts,
    )
    if processes.several:
        setattr(pipe, system.denoiser, open_divided(settings, plan, device, processes))
    elif int8:
        if not quantised_weights(getattr(pipe, system.denoiser)):
            setattr(pipe, system.denoiser, quantised(getattr(pipe, system.denoiser)))
        pipe.to(device) if settings.memory is None else pipe.set_memory(settings.memory, device)
    network = getattr(pipe, system.denoiser)
    divided = None
    if settings.full:
        network.requires_grad_(True)
        parameters = {f"{system.denoiser}.{name}": p for name, p in network.named_parameters()}
        if processes.several:
            divided = Divided(parameters)
            parameters |= divided.own_rows
    else:
        parameters = pipe.adapters.add_lora(settings.rank, settings.alpha, settings.targets)
    if settings.checkpointing and not processes.several:
        network.enable_gradient_checkpointing()
    return Trained(quiet(pipe), network, parameters, settings, plan, processes, divided)


def open_divided(settings: Settings, plan: Plan, device: torch.device, processes: Processes) -> Network:
    """The denoiser, of which each process reads some rows: never is it whole in the memory of one."""
    denoiser, base = plan.system.denoiser, base_of(settings, device)
    options: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    network = getattr(open_unread(settings.model, dtype=BASES[base], **options), denoiser)
    if base == "int8" and not quantised_weights(network):
        network = as_int8(network, BASES[base]).opened(unread=True)
    network.requires_grad_(settings.full)
    if settings.checkpointing:
        network.enable_gradient_checkpointing()
    shard(network, processes, device, computed_in(settings, device))
    fill(network, device)
    return network


def computed_in(settings: Settings, device: torch.device) -> torch.dtype | None:
    """In what divided weights are gathered that are held in fp32; None: as they are held."""
    return torch.bfloat16 if settings.full and settings.base is None and device.type != "cpu" else None


def base_of(settings: Settings, device: torch.device) -> str:
    """In what the weights that stay are held; those that are trained are in fp32."""
    return settings.base or ("fp32" if settings.full or device.type == "cpu" else "bf16")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantised(network: Network) -> Network:
    """The network with its linear layers in eight bits."""
    return as_int8(network, network.dtype).read().to(network.device)


def as_int8(network: Network, dtype: torch.dtype) -> PlannedNetwork:
    files = as_int8_convrot(network.tensors(), quantisable(network))
    return plan_network(type(network), network.config, files, dtype)


def saved_weights(trained: Trained, out: Path) -> TensorFiles:
    """The denoiser's, averaged if they are averaged, out of the last state: each when it is asked for."""
    saved = open_saved(out / SHARDS)
    prefix = f"{trained.plan.system.denoiser}."
    entries: dict[str, Entry] = {}
    for name, pieces in (saved.average or saved.parameters).items():
        read = functools.partial(whole, pieces)
        entries[name.removeprefix(prefix)] = (shape_of(pieces), pieces[0][1].dtype, read)
    return TensorFiles([]).replaced(entries)


def whole(pieces: Pieces, once: bool = False) -> Tensor:
    return cut(pieces, None)


def write_checkpoint(
    place: Path, network: Network, weights: Mapping[str, Tensor], settings: Settings, plan: Plan
) -> None:
    """A folder that loads, in the dtypes of the base model; the other networks are copied the first time."""
    stored = plan.parts[plan.system.denoiser].network
    kind = type(stored)
    dtypes = {name: tensor.dtype for name, tensor in stored.state_dict().items()}
    made = build_on_meta(kind, network.config)
    if isinstance(weights, TensorFiles):
        made.unread = cast(weights, dtypes)
    else:
        state = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in weights.items()}
        made.load_state_dict(state, assign=True)
    if place.is_dir():
        made.save_pretrained(place / plan.system.denoiser, class_name=saved_name(plan, made))
        return
    made.came_with = getattr(network, "came_with", {})
    options = {} if settings.revision is None else {"revision": settings.revision}
    whole = open_unread(settings.model, components={plan.system.denoiser: made}, **options)
    whole.made_for = plan.made_for.taught(example.pair.prompt for example in plan.examples)
    with replacing_folder(place) as folder:
        whole.save_pretrained(folder)


def cast(files: TensorFiles, dtypes: Mapping[str, torch.dtype]) -> TensorFiles:
    """In these dtypes, when they are read."""

    def reading(name: str) -> Callable[..., Tensor]:
        return lambda once=False: files[name].to(dtypes[name])

    return files.replaced({name: (files.shapes[name], dtypes[name], reading(name)) for name in files})


def saved_name(plan: Plan, network: Network) -> str | None:
    return plan.checkpoint.pipeline.saved_as.get(type(network).__name__)
