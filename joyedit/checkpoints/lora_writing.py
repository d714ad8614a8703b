"""Writing LoRA files in the names that other programs read.

    comfyui    diffusion_model.<layer>.lora_A.weight, .lora_B.weight; .alpha where the strength is not 1
    kohya      lora_unet_<layer, _ for .>.lora_down.weight, .lora_up.weight, .alpha
    diffusers  transformer.<layer>.lora_A.weight, .lora_B.weight; strengths in the header, as PEFT has them

<layer> is our name, which is the Diffusers checkpoint's; of ChronoEdit in the first two WAN's own, as ComfyUI
and musubi-tuner have it. For ComfyUI, layers of Stable Diffusion's UNet and of a text encoder are written in
kohya's names, which it reads. Whole differences are `.diff`, those of biases `.diff_b`.

Source: ComfyUI `comfy/lora.py`; kohya-ss sd-scripts `networks/lora.py`; diffusers `loaders/lora_base.py`.
"""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joyedit.checkpoints.lora_files import METADATA_KEY, Changes
from joyedit.checkpoints.lora_settings import Settings
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.checkpoints.writing import write_safetensors

LORA_LAYOUTS = ("comfyui", "diffusers", "kohya")

Roles = dict[str, Tensor]  # of one layer: down, up, alpha, diff, diff_b, up_bias, as `lora_files` calls them
Layers = dict[tuple[str, str], Roles]  # (network, our name of a layer or parameter) -> what is for it

ENDS = {
    "comfyui": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight"},
}
FOREIGN = {"chronoedit_dit": "original"}  # table of a network -> its layout with the names of other programs
ARCHITECTURES = {"joyimage_mmdit": "joyai-image-edit", "chronoedit_dit": "chronoedit"}
STABLE_DIFFUSION = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512"}  # by the prompt's width


def usual_layout(networks: Mapping[str, Network]) -> str:
    """In which a new adapter is written, unless it is said."""
    return "kohya" if any(network.table == "sd_unet" for network in networks.values()) else "comfyui"


def spelled_lora(
    layers: Layers, to: str, networks: Mapping[str, Network], settings: Mapping[str, Settings] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what its header has to say of their strengths.

    networks: those that have the layers, of which only the names matter. settings: by network, what says the
    strength of a layer that has no alpha of its own. Raises ValueError for another layout.
    """
    if to not in LORA_LAYOUTS:
        raise ValueError(f"to={to!r}: adapters are written as {', '.join(LORA_LAYOUTS)}")
    foreign = {name: foreign_names(network) for name, network in networks.items()}
    state: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, tuple[int, float]]] = {}  # network -> layer -> rank and alpha
    for (network, layer), roles in layers.items():
        roles, kohya = dict(roles), to == "kohya" or (to == "comfyui" and not_by_comfyui(networks[network]))
        name = foreign[network].get(layer, layer)
        if to == "diffusers":
            base, ends = f"{network}.{layer}", ENDS["diffusers"]
        elif kohya:
            prefix = "lora_te_text_model_" if network == "text_encoder" else "lora_unet_"
            base, ends = prefix + name.replace(".", "_"), ENDS["kohya"]
        else:
            base, ends = f"diffusion_model.{name}", ENDS["comfyui"]
        alpha = roles.pop("alpha", None)
        if "down" in roles:
            rank = len(roles["down"])
            strength = (settings or {}).get(network, Settings()).strength(layer, rank)
            value = rounded(strength * rank) if alpha is None else alpha.item()
            ranks.setdefault(network, {})[layer] = rank, value
            if to != "diffusers" and (kohya or value != rank):
                state[f"{base}.alpha"] = torch.tensor(value, dtype=torch.float32) if alpha is None else alpha
            if to != "diffusers" and "up_bias" in roles:
                shift = roles.pop("up_bias").float() * (value / rank)
                roles["diff_b"] = shift + roles["diff_b"].float() if "diff_b" in roles else shift
        for role, tensor in roles.items():
            state[f"{base}.{ends.get(role, role)}"] = tensor
    return state, header_of(ranks, to)


def not_by_comfyui(network: Network) -> bool:
    """Whether ComfyUI knows a network's layers, by the names that they have here, as kohya spells them."""
    return network.table not in ARCHITECTURES


def foreign_names(network: Network) -> dict[str, str]:
    """Our names of layers and parameters -> those of other programs, where they differ."""
    wanted = FOREIGN.get(network.table)
    layout = next((one for one in network.layouts() if one.name == wanted), None)
    if layout is None:
        return {}
    found = {
        ours: name for name, ours in layout.renames([name for name, _ in network.named_parameters()]).items()
    }
    return {ours.removesuffix(".weight"): name.removesuffix(".weight") for ours, name in found.items()}


def rounded(value: float) -> float:
    """To fp32, in which alphas are written: what is 16 but for its last bits is 16."""
    return torch.tensor(value, dtype=torch.float32).item()


def header_of(ranks: Mapping[str, Mapping[str, tuple[int, float]]], to: str) -> dict[str, str]:
    """Rank and alpha as the program of a layout looks for them."""
    settings: dict[str, Any] = {}
    for network, layers in ranks.items():
        (rank, alpha), _ = collections.Counter(layers.values()).most_common(1)[0]
        settings[f"{network}.r"], settings[f"{network}.lora_alpha"] = rank, alpha
        settings[f"{network}.rank_pattern"] = {n: r for n, (r, _) in layers.items() if r != rank}
        settings[f"{network}.alpha_pattern"] = {n: a for n, (_, a) in layers.items() if a != alpha}
        settings[f"{network}.target_modules"] = sorted(layers)
    if to == "diffusers":
        return {METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)} if settings else {}
    found = [pair for layers in ranks.values() for pair in layers.values()]
    if not found:
        return {}
    (rank, alpha), _ = collections.Counter(found).most_common(1)[0]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }


def provenance(networks: Mapping[str, Network], base: str, trigger: str) -> dict[str, str]:
    """What a new adapter's header says of what it is for. base: name and revision of the model it was trained
    on; trigger: words that call it, if any."""
    facts = {"modelspec.sai_model_spec": "1.0.0"}
    for network in networks.values():
        width = getattr(network.config, "context_dim", 0)
        if name := ARCHITECTURES.get(network.table) or (width and STABLE_DIFFUSION.get(width)):
            facts["modelspec.architecture"] = f"{name}/lora"
    facts |= {"joyedit.base": base} if base else {}
    return facts | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def layers_of_changes(changes: Mapping[str, Changes], networks: Mapping[str, Network]) -> Layers:
    """An adapter as it runs, layer by layer. A difference is written with its strength."""
    layers: Layers = {}
    for network, found in changes.items():
        shapes = {name: parameter.shape for name, parameter in networks[network].named_parameters()}
        for tensor, deltas in found.items():
            layer, _, leaf = tensor.rpartition(".")
            place = (network, layer if leaf in ("weight", "bias") else tensor)
            roles, shape = layers.setdefault(place, {}), shapes[tensor]
            for delta in deltas:
                if delta.up is not None:
                    ones = (1,) * (len(shape) - 2)
                    roles["down"] = delta.down.reshape(-1, *shape[1:])
                    roles["up"] = delta.up.reshape(*delta.up.shape[:2], *ones)
                    value = rounded(delta.scale * len(roles["down"]))
                    roles["alpha"] = torch.tensor(value, dtype=torch.float32)
                    continue
                role = "diff_b" if leaf == "bias" else "diff"
                whole = delta.down if delta.scale == 1 else delta.down.float() * delta.scale
                roles[role] = roles[role] + whole.reshape(shape) if role in roles else whole.reshape(shape)
    return layers


def write_lora(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool = True
) -> Path:
    """Write the tensors of an adapter, whole or not at all. Returns the file. Raises FileExistsError for one
    that is there, without `force`."""
    with replacing(path, force=force) as temporary:
        held = TensorFiles.of({key: tensor.detach() for key, tensor in state.items()})
        write_safetensors(temporary, held, {"format": "pt", **metadata})
    return path
