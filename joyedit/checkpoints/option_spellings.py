"""What users of diffusers add to `from_pretrained` and `save_pretrained`, and what becomes of each word.

Words that ask for nothing here are accepted with the values that mean so; another value is refused, with what
to do instead.
"""

from collections.abc import Mapping
from typing import Any

import torch

from joyedit.checkpoints.config import nearest

# Loading: word -> why a value other than None and False cannot be served.
WITHOUT_VALUE: Mapping[str, str] = {
    "trust_remote_code": "the code of a repository is never run",
    "custom_pipeline": "the code of a repository is never run: import a pipeline of your own",
    "custom_revision": "the code of a repository is never run",
    "quantization_config": "weights are held in float32, float16 or bfloat16",
    "output_loading_info": "loading refuses files that do not fit, and says what is missing",
    "ignore_mismatched_sizes": "loading refuses files that do not fit; new_parameters= names what is yours",
    "from_flax": "Flax weights are not read",
    "from_tf": "TensorFlow weights are not read",
    "use_onnx": "ONNX weights are not read",
    "use_flashpack": "flashpack files are not read",
    "dduf_file": "DDUF files are not read: unpack it, a zip archive, into a folder",
    "weights_name": "weights have their usual names; variant= chooses among them",
    "proxies": "set HTTPS_PROXY in the environment",
    "mirror": "set HF_ENDPOINT in the environment",
    "offload_folder": "offload='sequential' keeps the weights in main memory, mapped from their files",
    "offload_state_dict": "offload='sequential' keeps the weights in main memory, mapped from their files",
    "max_memory": "offload='model' or 'sequential' bounds what is on the device",
    "attn_implementation": "joyedit.ops.backend() chooses the kernels",
    "parallel_config": "a network runs on one device",
    "return_unused_kwargs": "an unknown word is an error",
    "hotswap": "load adapters side by side, then set_adapters(name)",
}

# Saving: word -> the values that mean what is done here, and what to do for another.
SAVING: Mapping[str, tuple[tuple, str]] = {
    "safe_serialization": ((True, None), "pickles are not written: torch.save(x.state_dict(), file)"),
    "push_to_hub": (
        (False, None),
        "save, then huggingface_hub.upload_folder(folder_path=..., repo_id=...)",
    ),
    "is_main_process": ((True, None), "call it in the main process alone"),
    "save_function": ((None,), "files are safetensors, written to a temporary name and moved into place"),
    "use_flashpack": ((False, None), "files are safetensors"),
    "state_dict": ((None,), "load_state_dict it first"),
    "save_peft_format": ((True, None), "adapters are in PEFT's names"),
}


def check_saving(options: Mapping[str, Any], accepted: tuple[str, ...] = ()) -> None:
    """The further arguments of a `save_pretrained`. accepted: those that it takes itself, for the message.

    Raises ValueError for a value that cannot be served, TypeError for a word that nobody knows.
    """
    for name, value in options.items():
        if name not in SAVING:
            known = sorted({*SAVING, *accepted})
            raise TypeError(f"unknown argument {name!r}{nearest(name, known)}; accepted: {known}")
        values, instead = SAVING[name]
        if not any(value is one for one in values):
            raise ValueError(f"{name}={value!r}: {instead}")


def check_without_value(name: str, value: Any) -> None:
    """Raises ValueError for a value of a word of `WITHOUT_VALUE` that asks for something."""
    if value is not None and value is not False:
        raise ValueError(f"{name}={value!r}: {WITHOUT_VALUE[name]}")


def parse_device_map(value: Any) -> torch.device | None:
    """The one device that a `device_map` names: "cuda", "cuda:1", 0, {"": "cpu"}, ...; "auto" is the
    accelerator if there is one. Raises ValueError for several devices, or one that is not there."""
    if isinstance(value, Mapping):
        devices = {str(device) for device in value.values()}
        if len(devices) != 1:
            raise ValueError(f"device_map={dict(value)!r}: a network runs on one device")
        value = next(iter(value.values()))
    if value is None:
        return None
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if value == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map={value!r}: write 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; where memory is short, "
            "offload='model' or 'sequential'"
        ) from None
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ValueError(f"device_map={value!r}: this PyTorch finds no such device")
    return device
