"""Reading a LoRA file: which tensors of which networks it changes, and by what.

Files differ in how they spell a layer. A network's key tables know all spellings of its tensors; each is
looked up here with dots (Diffusers, PEFT, the original codes) and with underscores (kohya, musubi), after
the prefixes that say which network is meant, so that a name either is that of a layer or is reported. What a
key ends in tells its role:

    down up      lora_A lora_B, lora_down lora_up, lora.down lora.up, lora_linear_layer.down, to_q_lora.down
    alpha        a number; the strength is alpha / r, and 1 where there is none
    diff diff_b  a whole weight or bias, to be added as it is; lora_B.bias likewise, times alpha / r
    diff_m       the same for the modulation of a block or head of WAN
    w_norm b_norm  the same for a norm, as LyCORIS writes them

D_in, D_out widths of a layer; a convolution's channels and kernel count as one   r rank
Source: diffusers `loaders/lora_conversion_utils.py`; kohya-ss sd-scripts; PEFT; LyCORIS `modules/full.py`,
`modules/norms.py`; the published files.
"""

import dataclasses
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.lora_settings import Settings, is_number
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.safetensors_files import metadata_json
from joyedit.checkpoints.tensor_files import TensorFiles

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
USUAL_NAMES = (WEIGHT_NAME, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
METADATA_KEY = "lora_adapter_metadata"  # in the header of files that diffusers wrote

DENOISERS = ("unet", "transformer")
TEXT = ("text_encoder",)

# Prefix of a layer's name -> the networks that it may mean; None: any.
PREFIXES: Mapping[str, tuple[str, ...] | None] = {
    "base_model.model.": None,
    "module.": None,  # of distributed training
    "_orig_mod.": None,  # of torch.compile
    "unet.": DENOISERS,
    "transformer.": ("transformer",),
    "pipe.dit.": ("transformer",),
    "dit.": ("transformer",),
    "text_encoder.": TEXT,
    "model.diffusion_model.": DENOISERS,
    "diffusion_model.": DENOISERS,
    "cond_stage_model.transformer.": TEXT,
    "lora_unet__": DENOISERS,
    "lora_unet_": DENOISERS,
    "lycoris_": DENOISERS,
    "lora_transformer_": ("transformer",),
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
}

# End of a key -> its role. PEFT may write an adapter's name before the last component.
ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_A(\.[^.]+)?\.weight", "down"),
        (r"\.lora_B(\.[^.]+)?\.weight", "up"),
        (r"\.lora_B(\.[^.]+)?\.bias", "up_bias"),
        (r"\.(lora_down|lora\.down|lora_linear_layer\.down)\.weight", "down"),
        (r"\.(lora_up|lora\.up|lora_linear_layer\.up)\.weight", "up"),
        (r"\.alpha", "alpha"),
        (r"\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
    )
)
# The first LoRAs named the attention processor's layers, not the network's.
PROCESSOR = re.compile(r"(?P<path>.+?)(\.processor)?\.to_(?P<part>[qkv]|out)_lora\.(?P<role>down|up)\.weight")

# A block's modulation is a parameter of its own: what it is called where `.diff_m` is written for it.
MODULATIONS = ("modulation", "scale_shift_table")

REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding_": "a LoRA of an embedding",
    "oft_": "OFT",
    "ia3_": "IA3",
}

# What keys look like -> whose they are; the first that is found.
FAMILIES = (
    (r"single_transformer_blocks|single_blocks", "FLUX or HunyuanVideo"),
    (
        r"joint_blocks|(^|\.|lora_unet_)transformer_blocks[._]\d+[._]attn[._]add_",
        "Stable Diffusion 3 or Qwen-Image",
    ),
    (r"lora_te2_|text_encoder_2\.|add_embedding|label_emb", "Stable Diffusion XL"),
    (r"(attentions|_blocks|block)[._]\d+([._]1)?[._]transformer_blocks[._][1-9]", "Stable Diffusion XL"),
    (r"double_blocks[._]\d+[._](attn[._])?(img|txt)_attn_qkv", "JoyAI-Image-Edit"),
    (r"(^|\.|lora_unet_)blocks[._]\d+[._](self_attn|cross_attn|attn[12]|ffn)[._]", "WAN (ChronoEdit)"),
    (r"((down|up|input|output)_blocks|mid_block|middle_block)[._]", "Stable Diffusion"),
    (r"lora_te1?_|text_model", "a CLIP text encoder"),
)
CONTEXT_FACTOR = re.compile(r"attn2[._](processor[._])?to_k[._].*(lora_A|down)\b")
CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclasses.dataclass(eq=False)
class Delta:
    """What is added to a weight or bias: scale * up @ down, or scale * down where there is no up.

    up (D_out, r, ...), down (r, ...), of a convolution with its kernel; without up, down (D_out, D_in), a
    bias being one column. In the file's dtype, or parameters in training; on the device of their last use.
    """

    down: Tensor
    up: Tensor | None
    scale: float

    def factors_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """down (r, D_in) and up (D_out, r), there."""
        self._come(device)
        assert self.up is not None
        return self.down.flatten(1), self.up.flatten(1)

    def add_to(self, total: Tensor, strength: float) -> Tensor:
        """total (D_out, D_in) + strength * delta, in the dtype of total."""
        factor = strength * self.scale
        if self.up is None:
            self._come(total.device)
            return torch.add(total, self.down.to(total.dtype), alpha=factor)
        down, up = self.factors_on(total.device)
        return torch.addmm(total, up.to(total.dtype), down.to(total.dtype), alpha=factor)

    def _come(self, device: torch.device) -> None:
        if self.down.device == device:
            return
        if isinstance(self.down, nn.Parameter) and self.up is not None:
            # An optimiser has them: they stay themselves.
            self.up.data = self.up.data.to(device)
            self.down.data = self.down.data.to(device)
            return
        self.up = None if self.up is None else self.up.to(device)
        self.down = self.down.to(device)  # last: another thread then finds both there


Changes = dict[str, list[Delta]]  # name of a network's tensor -> what an adapter adds to it


def open_lora(
    source: str | Path, weight_name: str | None, subfolder: str, options: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The tensors of a file, of a file in a folder, or of one in a Hub repository, and its metadata: the rank
    and alpha that Diffusers and PEFT keep beside the factors."""
    parsed = LoadOptions.parse(options, also=("adapter_name", "weight_name", "subfolder"))
    origin = Origin(str(source), **parsed.origin)
    path = origin.fetch_file(subfolder, weight_name, USUAL_NAMES)
    if parsed.use_safetensors and path.suffix != ".safetensors":
        raise FileNotFoundError(f"{path} is a pickle, and use_safetensors=True refuses those")
    files = TensorFiles([path])
    if path.stem == "adapter_model":
        name = "adapter_config.json"
        if not Path(source).is_file() and posixpath.join(subfolder, name) in origin.listing():
            origin.fetch_file(subfolder, name, ())
        beside = path.with_name(name)
        return files, read_json(beside) if beside.is_file() else {}
    return files, metadata_json(path, METADATA_KEY) if path.suffix == ".safetensors" else {}


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], networks: Mapping[str, Network]
) -> tuple[dict[str, Changes], tuple[str, ...]]:
    """Changes by network, and the keys that no network has.

    Raises ValueError when nothing matches, for a factor without the other one, shapes that do not fit, and
    kinds of adapters that are not supported.
    """
    layers, unmatched = keys_by_layer(tensors, networks)
    parameters = {network: dict(module.named_parameters()) for network, module in networks.items()}
    settings = {network: Settings.of(metadata, network) for network in networks}
    changes: dict[str, Changes] = {}
    for (network, layer), roles in layers.items():
        parts = {role: tensors[key] for role, key in roles.items()}
        try:
            for tensor, delta in deltas_of(layer, parts, parameters[network], settings[network]):
                changes.setdefault(network, {}).setdefault(tensor, []).append(delta)
        except ValueError as error:
            raise ValueError(
                f"{', '.join(roles.values())}: {network}.{error}; {looks_like(tensors)}"
            ) from None
    if not changes:
        raise ValueError(_nothing_matches(tensors, networks))
    return changes, tuple(unmatched)


def keys_by_layer(
    keys: Iterable[str], networks: Mapping[str, Network]
) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """(network, our name of a layer) -> role -> key, and the keys that no network has. Raises ValueError for
    kinds of adapters that are not supported, and for two keys with one role."""
    keys = list(keys)
    for key in keys:
        if kind := next((kind for mark, kind in REFUSED.items() if mark in key), None):
            raise ValueError(
                f"this is {kind} ({key}), which is not supported: only LoRA and whole differences are"
            )
    spellings = layer_spellings(networks)
    layers: dict[tuple[str, str], dict[str, str]] = {}
    unmatched = []
    for key in keys:
        found = find_layer(key, spellings)
        if found is None:
            unmatched.append(key)
            continue
        layer, role = found
        roles = layers.setdefault(layer, {})
        if role in roles:
            raise ValueError(f"{roles[role]} and {key} are both the {role} of {'.'.join(layer)}")
        roles[role] = key
    for layer in [layer for layer, roles in layers.items() if set(roles) == {"alpha"}]:
        unmatched.append(layers.pop(layer)["alpha"])
    return layers, unmatched


def layer_spellings(networks: Mapping[str, Network]) -> dict[str, set[tuple[str, str]]]:
    """Spelling of a layer, or of a parameter that is not a weight or bias -> the (network, our name) that it
    means: as in every key table, without prefixes, and with underscores for dots."""
    table: dict[str, set[tuple[str, str]]] = {}
    for network, module in networks.items():
        ours = [name for name, _ in module.named_parameters()]
        pairs = [(name, name) for name in ours]
        for layout in module.layouts():
            pairs += layout.renames(ours).items()
        for spelled, name in pairs:
            leaf = name.rpartition(".")[2]
            if leaf in ("weight", "bias"):
                spelled, name = spelled.removesuffix(f".{leaf}"), name.removesuffix(f".{leaf}")
            for _, plain in readings(spelled):
                for form in (plain, plain.replace(".", "_")):
                    table.setdefault(form, set()).add((network, name))
    return table


def find_layer(key: str, spellings: Mapping[str, set[tuple[str, str]]]) -> tuple[tuple[str, str], str] | None:
    """(network, our name of the layer) and the role of a file's key."""
    for layer, role in parse_key(key):
        for allowed, plain in readings(layer):
            hits = {hit for hit in spellings.get(plain, ()) if allowed is None or hit[0] in allowed}
            if len(hits) > 1:
                raise ValueError(f"{key} may be any of {sorted(map('.'.join, hits))}")
            if hits:
                return hits.pop(), role
    return None


def readings(layer: str) -> Iterator[tuple[Sequence[str] | None, str]]:
    """A spelling as it is, then with one prefix after the other taken off, and the networks it then means."""
    allowed = None
    yield allowed, layer
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
        allowed = PREFIXES[prefix] or allowed
        yield allowed, layer


def parse_key(key: str) -> Iterator[tuple[str, str]]:
    """What the layer of a key may be called, and the role."""
    if match := PROCESSOR.fullmatch(key):
        for leaf in (f"to_{match['part']}", f"to_{match['part']}.0", f"{match['part']}_proj"):
            yield f"{match['path']}.{leaf}", match["role"]
    if key.endswith(".diff_m"):
        for leaf in MODULATIONS:
            for dot in "._":
                yield f"{key.removesuffix('.diff_m')}{dot}{leaf}", "diff"
    for pattern, role in ROLES:
        match = pattern.search(key)
        if match and match.end() == len(key):
            yield key[: match.start()].replace(".processor.", ".").replace("._orig_mod.", "."), role


def deltas_of(
    layer: str,
    parts: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    settings: Settings,
) -> Iterator[tuple[str, Delta]]:
    """The tensors of a layer that change, and by what. `parts`: role -> tensor. Raises ValueError, its text
    starting with the layer's name, for shapes that do not fit and factors that lack the other one."""
    name = layer if layer in parameters else f"{layer}.weight"
    weight, bias = parameters.get(name), parameters.get(f"{layer}.bias")
    if ("down" in parts) != ("up" in parts) or ("up_bias" in parts and "up" not in parts):
        raise ValueError(f"{layer}: the other factor is missing")
    for role, part in parts.items():
        if role != "alpha" and not part.is_floating_point():
            raise ValueError(f"{layer}: its {role} is of {part.dtype}, not of floating point")
    scale = 1.0
    if "down" in parts:
        up, down = parts["up"], parts["down"]
        if weight is None:
            raise ValueError(f"{name} does not exist, and factors are for it")
        if down.ndim < 2 or up.ndim < 2 or 0 in (*down.shape, *up.shape):
            raise ValueError(
                f"{layer}: up {tuple(up.shape)} and down {tuple(down.shape)} are no two matrices"
            )
        rank, shape = down.shape[0], tuple(weight.shape)
        if _trim(up.shape) != _trim((*shape[:1], rank)) or _trim(down.shape[1:]) != _trim(shape[1:]):
            raise ValueError(
                f"{name} is {shape}, and up {tuple(up.shape)} @ down {tuple(down.shape)} does not fit"
            )
        scale = _alpha(layer, parts["alpha"]) / rank if "alpha" in parts else settings.strength(layer, rank)
        yield name, Delta(down.reshape(rank, -1), up.reshape(-1, rank), scale)
    if "diff" in parts:
        yield name, _whole(name, parts["diff"], weight, 1.0)
    for role, factor in (("up_bias", scale), ("diff_b", 1.0)):
        if role in parts:
            yield f"{layer}.bias", _whole(f"{layer}.bias", parts[role], bias, factor)


def _alpha(layer: str, alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise ValueError(f"{layer}: its alpha has the shape {tuple(alpha.shape)}, must be one number")
    value = alpha.reshape(()).item()
    if not is_number(value):
        raise ValueError(f"{layer}: its alpha is {shown(value)}, must be a finite number")
    return value


def _whole(name: str, diff: Tensor, parameter: Tensor | None, scale: float) -> Delta:
    if parameter is None:
        raise ValueError(f"{name} does not exist, and a difference {tuple(diff.shape)} is for it")
    if _trim(diff.shape) != _trim(parameter.shape):
        raise ValueError(
            f"{name} is {tuple(parameter.shape)}, and a difference {tuple(diff.shape)} does not fit"
        )
    return Delta(diff.reshape(parameter.shape[0], -1), None, scale)


def _trim(shape: Sequence[int]) -> tuple[int, ...]:
    """Without trailing ones: a 1x1 convolution is a linear layer."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds factors of any network."""
    return any(True for key in keys for _ in parse_key(key))


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Whose adapter this is, going by the names and the width of the prompt; None where they tell nothing."""
    for pattern, family in FAMILIES:
        if any(re.search(pattern, key) for key in tensors):
            width = next((tensors[k].shape[-1] for k in tensors if CONTEXT_FACTOR.search(k)), 0)
            return CONTEXT_WIDTHS.get(width, family) if family == "Stable Diffusion" else family
    return None


def looks_like(tensors: Mapping[str, Tensor]) -> str:
    family = family_of(tensors)
    return (
        f"it looks like an adapter of {family}" if family else "it does not look like any adapter known here"
    )


def _nothing_matches(tensors: Mapping[str, Tensor], networks: Mapping[str, Network]) -> str:
    keys = sorted(tensors)
    sample = ", ".join(keys[:3])
    if not is_lora(keys):
        return f"it holds no LoRA: none of its {len(keys)} keys names a factor ({sample})"
    wanted = ", ".join(f"{name} ({type(network).__name__})" for name, network in networks.items())
    return f"none of its {len(keys)} keys names a layer of {wanted}; {looks_like(tensors)} ({sample})"
