"""ComfyUI's files: one for each network, in a folder for each kind, in names that changed over time.

JoyAI's were published as

    joy_image_edit_bf16, qwen3vl_joyimage_bf16, joy_image_edit_vae
    joyai_image_edit_bf16, qwen_3vl_8b_joyimage_bf16, wan_2.1_vae             below split_files/
    joyai_image_edit[_plus]_int8_convrot, qwen3vl_8b_joyimage_edit[_plus]_int8_convrot, wan_2.1_vae

Folders of any of them open, and folders that hold the files themselves. Where several files of one network
lie side by side, those are left aside that are by their names another model's or quantised; `variant` asks
for one.

Source: the Hub repositories of jdopensource and Comfy-Org.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from joyedit.checkpoints.hub import WEIGHT_SUFFIXES

COMFYUI_FOLDERS = {  # part -> folder
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "image_encoder": "clip_vision",
}
SPLIT = "split_files"
NAMES = {  # of JoyAI's files that lie in no such folder
    "transformer": r"joy(ai)?_image_edit(_plus)?(_(bf16|fp8|int8).*)?",
    "text_encoder": r"qwen_?3_?vl.*_joyimage.*",
    "vae": r"(joy(ai)?_image_edit|wan_2\.1)_vae.*",
}
QUANTISED = re.compile(r"int8|int4|fp8|fp4|mxfp|nf4|q\d_|gguf")
PUBLISHED = {  # part -> name of the quantised file, layout in it
    "transformer": ("joyai_image_edit{plus}_{form}", "comfyui"),
    "text_encoder": ("qwen3vl_8b_joyimage_edit{plus}_{form}", "diffusers"),
    "vae": ("wan_2.1_vae", "original"),
}


def comfyui_files(listing: Sequence[str]) -> dict[str, list[str]]:
    """The weight files of each part: those in ComfyUI's folders, or else those that have JoyAI's names."""
    found: dict[str, list[str]] = {}
    weights = [PurePosixPath(file) for file in listing if file.endswith(WEIGHT_SUFFIXES)]
    for part, folder in COMFYUI_FOLDERS.items():
        places = (folder, f"{SPLIT}/{folder}")
        if inside := [str(file) for file in weights if str(file.parent) in places]:
            found[part] = inside
    if "transformer" in found:
        return found
    at_top = [file for file in weights if str(file.parent) == "."]
    named = {part: [str(f) for f in at_top if re.fullmatch(name, f.stem)] for part, name in NAMES.items()}
    return {part: files for part, files in named.items() if files} if named["transformer"] else found


def is_comfyui(listing: Sequence[str]) -> bool:
    tops = (COMFYUI_FOLDERS["transformer"], f"{SPLIT}/{COMFYUI_FOLDERS['transformer']}")
    in_folders = any(file.startswith(f"{top}/") for file in listing for top in tops)
    return in_folders or "transformer" in comfyui_files(listing)  # others have a folder vae, too


def choose_file(name: str, part: str, files: Sequence[str], plus: bool | None, variant: str | None) -> str:
    """The one file of a part among `files` of the checkpoint called `name`. plus: whether Edit-Plus is
    wanted, None where there are no two models. Raises FileNotFoundError, saying how to choose, where it is
    not one."""
    left = list(files)
    if plus is not None and len(left) > 1:
        left = [file for file in left if is_called_plus(file) == plus] or left
    if variant is not None:
        left = [file for file in left if PurePosixPath(file).stem.endswith(variant)] or left
    elif len(left) > 1:
        left = [file for file in left if not QUANTISED.search(PurePosixPath(file).stem.lower())] or left
    if len(left) != 1:
        advice = f'; pass variant="{PurePosixPath(left[0]).stem}", or {part}= with a path' if left else ""
        folder = COMFYUI_FOLDERS[part]
        raise FileNotFoundError(
            f"{name}/{folder}: wanted exactly one weight file, found {left or 'none'}{advice}"
        )
    return left[0]


def is_called_plus(file: str) -> bool:
    return "plus" in Path(file).name.lower()
