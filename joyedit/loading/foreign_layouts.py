"""Writing JoyAI-Image in the layouts of others: JD's own release, and ComfyUI's folders.

What says how the weights are to be read is written before them: a folder that breaks off lacks weights
and does not open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.checkpoints.writing import write_pickle

ORIGINAL_TEXT_ENCODER = "JoyAI-Image-Und"
COMFYUI_FOLDERS = {  # part -> folder
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "image_encoder": "clip_vision",
}


def write_comfyui(pipe: Any, folder: Path, name: str, metadata: Mapping[str, str] | None) -> None:
    """One file for each network, which has the name of its part and the pipeline's."""
    for part, network in pipe.networks.items():
        place = folder / COMFYUI_FOLDERS[part]
        _write_unreleased_config(network, place)
        save_tensors(place, f"{part}_{name}", _tensors(network, "comfyui"), 10**15, metadata=metadata)


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
            write_pickle(temporary, _tensors(pipe.components[part], "original"))
    pipe.text_encoder.save_pretrained(folder / ORIGINAL_TEXT_ENCODER, metadata=metadata)


def _write_unreleased_config(network: Network, folder: Path) -> None:
    if network.config != type(network).Config():
        write_json(folder / "config.json", network.config_to_save())


def _tensors(network: Network, name: str) -> TensorFiles:
    """The weights in the layout of that name; networks that have none keep their own names there."""
    layouts = network.layouts()
    return network.tensors().spelled(next((one for one in layouts if one.name == name), layouts[0]))
