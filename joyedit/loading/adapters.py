"""Adapters from file to file: the same factors in the names of another program.

No checkpoint is read. Which layer a key names is looked up in the names of the released networks, built
without weights, with as many blocks as the file speaks of.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from joyedit.checkpoints.lora_files import METADATA_KEY, keys_by_layer, looks_like
from joyedit.checkpoints.lora_settings import Settings
from joyedit.checkpoints.lora_writing import LORA_LAYOUTS, Layers, spelled_lora, write_lora
from joyedit.checkpoints.network import Network, build_on_meta
from joyedit.checkpoints.safetensors_files import metadata_json, safetensors_header
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel

MOST_BLOCKS = 512
MOST_TEXT_LAYERS = 24  # of the text encoders of Stable Diffusion
# UNets of four levels: the released one, and one with transformers in all places that others may have them
# in. By the original code's names an upsampler's number depends on whether there is one before it.
UNETS = (
    UNet2DConditionConfig(),
    UNet2DConditionConfig(
        down_block_types=("CrossAttnDownBlock2D",) * 4, up_block_types=("CrossAttnUpBlock2D",) * 4
    ),
)


def convert_lora(source: Path, target: Path, to: str, *, force: bool = False) -> Path:
    """Write the adapter of a safetensors file to another, in the names of `to` (see `lora_writing`). Returns
    `target`.

    Raises ValueError, with nothing written, for a layout or a kind of adapter that is not known, for keys
    that no network has, and where target is no safetensors file; FileExistsError for one that is there,
    without `force`.
    """
    if to not in LORA_LAYOUTS:
        raise ValueError(f"to={to!r}: adapters are written as {', '.join(LORA_LAYOUTS)}")
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"{target}: an adapter is written to a file, whose name ends in .safetensors")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{source} and {target} are the same file: choose another DST")
    files = TensorFiles([source])
    try:
        networks, keys = layers_in(files)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    header = safetensors_header(source).get("__metadata__", {})
    settings = metadata_json(source, METADATA_KEY)
    layers: Layers = {
        place: {role: files[key] for role, key in roles.items()} for place, roles in keys.items()
    }
    stated = {network: Settings.of(settings, network) for network in networks}
    state, strengths = spelled_lora(layers, to, networks, stated)
    kept = {key: text for key, text in header.items() if key not in ("format", METADATA_KEY)}
    return write_lora(target, state, {**kept, **strengths}, force=force)


def layers_in(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Network], dict[tuple[str, str], dict[str, str]]]:
    """The networks that an adapter is for, on the meta device, and `keys_by_layer`. Raises ValueError for
    keys that name nothing in them."""
    left = list(tensors)
    for networks in systems(blocks_in(tensors)):
        keys, unmatched = keys_by_layer(tensors, networks)
        if keys and not unmatched:
            return networks, keys
        left = min(left, unmatched, key=len)
    raise ValueError(
        f"{len(left)} keys name no layer known here ({', '.join(left[:4])}); {looks_like(tensors)}"
    )


def systems(blocks: int) -> Iterator[dict[str, Network]]:
    """The networks of each system that adapters are for. blocks: how many each transformer has."""
    joyimage, chronoedit = JoyImageEditConfig(num_layers=blocks), ChronoEditConfig(num_layers=blocks)
    yield {"transformer": build_on_meta(JoyImageEditTransformer3DModel, joyimage)}
    yield {"transformer": build_on_meta(ChronoEditTransformer3DModel, chronoedit)}
    text = CLIPTextConfig(num_hidden_layers=MOST_TEXT_LAYERS)
    for config in UNETS:
        unet = build_on_meta(UNet2DConditionModel, config)
        yield {"unet": unet, "text_encoder": build_on_meta(CLIPTextModel, text)}


def blocks_in(keys: Iterable[str]) -> int:
    """How many blocks the keys speak of. Raises ValueError for more than any network has."""
    numbers = [int(n) for key in keys for n in re.findall(r"blocks[._](\d{1,6})[._]", key)]
    count = 1 + max(numbers, default=0)
    if count > MOST_BLOCKS:
        raise ValueError(f"a key speaks of block {count - 1}: no network known here has so many")
    return count
