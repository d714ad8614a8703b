"""The networks of a training: encoders for its first pass, the denoiser for its second; what is written."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from joyedit.checkpoints.network import Network, build_on_meta, plan_network
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.replacing import replacing_folder
from joyedit.loading.layouts import load, open_unread
from joyedit.quantised import quantisable, quantised_weights
from joyedit.training.plan import Plan
from joyedit.training.settings import Settings

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
    written."""

    pipe: Any
    network: Any
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    plan: Plan

    def place(self, out: Path) -> Path:
        return out / (CHECKPOINT if self.settings.full else LORA)

    def write(self, out: Path) -> None:
        """What the parameters are now: an adapter, or the whole checkpoint. Replaces the last one whole."""
        if self.settings.full:
            write_checkpoint(out / CHECKPOINT, self.network, self.settings, self.plan)
        else:
            base = f"{self.settings.model} {self.plan.found['model']}"
            self.pipe.adapters.save_lora(out / LORA, base=base, trigger=self.settings.trigger or "")


def open_trained(settings: Settings, plan: Plan, device: torch.device) -> Trained:
    """Raises ValueError for a rank or targets that make no adapter."""
    system = plan.system
    base = base_of(settings, device)
    absent: dict[str, Any] = {
        name: None for name in system.encoders if name in plan.checkpoint.pipeline.parts
    }
    pipe = load(
        settings.model,
        device=device,
        dtype={"default": "auto", "vae": torch.float32, system.denoiser: BASES[base]},
        revision=settings.revision,
        memory=settings.memory,
        **absent,
    )
    network = getattr(pipe, system.denoiser)
    if base == "int8" and not quantised_weights(network):
        network = quantised(network)
        setattr(pipe, system.denoiser, network)
    if settings.full:
        network.requires_grad_(True)
        parameters = {f"{system.denoiser}.{name}": p for name, p in network.named_parameters()}
    else:
        parameters = pipe.adapters.add_lora(settings.rank, settings.alpha, settings.targets)
    if settings.checkpointing:
        network.enable_gradient_checkpointing()
    return Trained(quiet(pipe), network, parameters, settings, plan)


def base_of(settings: Settings, device: torch.device) -> str:
    """In what the weights that stay are held; those that are trained are in fp32."""
    return settings.base or ("fp32" if settings.full or device.type == "cpu" else "bf16")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantised(network: Network) -> Network:
    """The network with its linear layers in eight bits."""
    files = as_int8_convrot(network.tensors(), quantisable(network))
    made = plan_network(type(network), network.config, files, network.dtype).read()
    return made.to(network.device)


def write_checkpoint(place: Path, network: Network, settings: Settings, plan: Plan) -> None:
    """A folder that loads, in the dtypes of the base model; the other networks are copied the first time."""
    stored = plan.parts[plan.system.denoiser].network
    dtypes = {name: tensor.dtype for name, tensor in stored.state_dict().items()}
    made = build_on_meta(type(network), network.config)
    state = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in network.state_dict().items()}
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


def saved_name(plan: Plan, network: Network) -> str | None:
    return plan.checkpoint.pipeline.saved_as.get(type(network).__name__)
