"""Writing JoyAI-Image in the layouts of others: JD's own release, and ComfyUI's folders.

What says how the weights are to be read is written before them: a folder that breaks off lacks weights
and does not open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.checkpoints.writing import write_pickle
from joyedit.loading.comfyui import COMFYUI_FOLDERS, PUBLISHED
from joyedit.quantised import quantisable

ORIGINAL_TEXT_ENCODER = "JoyAI-Image-Und"


def write_comfyui(
    networks: Mapping[str, Network],
    folder: Path,
    plus: bool,
    quantize: str | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """One file for each network, which has the name of its part and the pipeline's, or, of what is quantised,
    the published one; see `comfyui_tensors`."""
    for part, network in networks.items():
        stem = f"{part}_joyimage{'_plus' * plus}"
        if quantize:
            stem = PUBLISHED[part][0].format(plus="_plus" * plus, form=quantize)
        place = folder / COMFYUI_FOLDERS[part]
        _write_unreleased_config(network, place)
        save_tensors(place, stem, comfyui_tensors(part, network, quantize), 10**15, metadata=metadata)


def comfyui_tensors(part: str, network: Network, quantize: str | None = None) -> TensorFiles:
    """What is written of a network. quantize: "int8_convrot" for the linear layers of transformer and text
    encoder, whose names are then those of the published files."""
    if not quantize:
        return network.tensors().spelled(_layout(network, "comfyui"))
    layout = _layout(network, PUBLISHED[part][1])
    names = layout.renames(sorted(quantisable(network)))
    return as_int8_convrot(network.tensors().spelled(layout), list(names))


def write_original(pipe: Any, folder: Path, metadata: Mapping[str, str] | None) -> None:
    """infer_config.py, one pickle for transformer and VAE, a transformers folder for the text encoder."""
    config = pipe.transformer.config
    names = {
        "num_attention_heads": "heads_num",
        "num_layers": "mm_double_blocks_depth",
        "text_dim": "text_states_dim",
    }
    params = {names.get(key, key): value for key, value in config.to_dict().items()}
    with replacing(folder / "infer_config.py") as temporary:
        temporary.write_text(
            "class JoyAIImageInferConfig:\n"
            f"    dit_arch_config = {{'params': {params!r}}}\n"
            f"    scheduler_arch_config = {{'params': {{'num_train_timesteps': "
            f"{pipe.scheduler.config.num_train_timesteps}, 'shift': {pipe.scheduler.config.shift}}}}}\n",
            encoding="utf-8",
        )
    _write_unreleased_config(pipe.vae, folder / "vae")
    pipe.processor.save_pretrained(folder / ORIGINAL_TEXT_ENCODER)
    for part, name in (("transformer", "transformer.pth"), ("vae", "Wan2.1_VAE.pth")):
        with replacing(folder / part / name) as temporary:
            network = pipe.components[part]
            write_pickle(temporary, network.tensors().spelled(_layout(network, "original")))
    pipe.text_encoder.save_pretrained(folder / ORIGINAL_TEXT_ENCODER, metadata=metadata)


def _write_unreleased_config(network: Network, folder: Path) -> None:
    if network.config != type(network).Config():
        write_json(folder / "config.json", network.config_to_save())


def _layout(network: Network, name: str) -> Any:
    """The network's layout of that name; networks that have none keep their own names there."""
    layouts = network.layouts()
    return next((one for one in layouts if one.name == name), layouts[0])
