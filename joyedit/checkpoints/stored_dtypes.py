"""What the numbers of a weight file are, and which of them fill a network.

Weights are of floating point. Plain fp8, one number for each weight, is read as bf16, which holds each of
its values. What needs scales to be read is known by the tensors that stand beside the weights: ComfyUI's
forms are read, see `quantised_files`, and all others are refused by their names.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

FP8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)

# End of a tensor's name -> the format whose scales it holds; the first that is found.
QUANTISED = {
    "quant_state.bitsandbytes__nf4": "NF4 of bitsandbytes",
    "quant_state.bitsandbytes__fp4": "FP4 of bitsandbytes",
    ".absmax": "4-bit weights of bitsandbytes",
    ".SCB": "int8 of bitsandbytes",
    ".wscales": "SVDQuant of nunchaku",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 with a scale for each block",
    ".weight._scale": "quanto",
    ".weight_scale": "fp8 or int8 with scales and no comfy_quant that says how",
}
PACKED = ".qweight"  # the one of them that stands for the weights themselves


def refuse_quantised(names: Iterable[str]) -> None:
    """Raises ValueError naming the format, for a file of weights that need scales to be read."""
    held = list(names)
    for mark, kind in QUANTISED.items():
        found = [name for name in held if name.endswith(mark)]
        if found:
            raise ValueError(
                f"this is {kind} ({found[0]}, {len(found)} such tensors), which is not read here: take the "
                "file in bf16, fp16, fp32, plain fp8, or ComfyUI's scaled fp8 or int8"
            )


def refuse_integers(
    sources: Mapping[str, Iterable[str]], stored: Mapping[str, torch.dtype], network: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for integers, truth values or complex numbers where a network has weights.

    sources: name of a network's tensor -> the file's tensors that it is made from.
    """
    for name, made_from in sources.items():
        if network[name].is_floating_point():
            for source in made_from:
                if not stored[source].is_floating_point:
                    kind = str(stored[source]).removeprefix("torch.")
                    raise ValueError(
                        f"{source} is stored as {kind}: weights of floating point are needed for {name}; if "
                        "the file is quantised, take the one that is not"
                    )


def widened(tensor: Tensor) -> Tensor:
    """The tensor, of the same values in bf16 if it is of fp8, with which torch computes next to nothing."""
    return tensor.to(torch.bfloat16) if tensor.dtype in FP8 else tensor
