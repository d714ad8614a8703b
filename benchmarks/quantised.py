"""What eight bits cost: bytes, errors of each network, and of whole edits of the shipped small models.

Each model runs in fp32, with the linear layers of its repeated blocks as they are and in each quantised form,
so that what differs is the form alone; and once more with activations rounded to eight bits, too, as
`int8_products("fast")` does. Of a network: how far its weights, and the output of its last block
in a first step on the same input, are from those in fp32, as a ratio of norms. Of edits: held-out scenes,
each form's picture against the one in fp32, and how many are right by the rules of `shapes/evaluate.py`.
The bytes of the released networks are counted from their settings.

    python -m benchmarks.quantised [--edits 40] [--kitchen] [--out FILE]

--kitchen compares numbers, scales and weights with those of the package comfy-kitchen, if it is installed.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes.evaluate import COUNTS, EVALUATIONS, judge
from benchmarks.side_by_side import RESULTS, machine
from joyedit.checkpoints.network import Network, build_on_meta, plan_network
from joyedit.checkpoints.network_spellings import repeated_blocks
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.eight_bits import quantise
from joyedit.loading.layouts import load
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.models.umt5 import UMT5EncoderModel
from joyedit.quantised import QuantisedWeight, int8_products, quantisable, quantised_weights

MODELS = {
    "tiny-joyimage": ("JoyImageEditPipeline", ("transformer", "text_encoder")),
    "tiny-chronoedit": ("ChronoEditPipeline", ("transformer", "text_encoder", "image_encoder")),
    "tiny-diffedit": ("StableDiffusionDiffEditPipeline", ("unet", "text_encoder")),
}
FORMS = ("int8_convrot", "fp8")
# The same weights, multiplied in eight bits: by the definition in PyTorch, as the kernel does it.
FAST = "int8_convrot, fast"
LARGEST_FP8 = 448.0
RELEASED = (
    JoyImageEditTransformer3DModel,
    Qwen3VLForConditionalGeneration,
    ChronoEditTransformer3DModel,
    UMT5EncoderModel,
)


def as_scaled_fp8(tensors: TensorFiles, names: set[str]) -> TensorFiles:
    """As ComfyUI's files of 2025: one scale for each weight, and a mark."""
    state: dict[str, Tensor] = {name: tensors[name] for name in tensors}
    for name in names:
        weight = state[name].float()
        scale = weight.abs().max() / LARGEST_FP8
        state[name] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
    return TensorFiles.of(state)


def in_form(network: Network, form: str) -> Network:
    """The network with its blocks' products in that form, computing in fp32."""
    tensors, names = TensorFiles.of(network.state_dict()), quantisable(network)
    made = as_scaled_fp8(tensors, names) if form == "fp8" else as_int8_convrot(tensors, names)
    return plan_network(type(network), network.config, made, torch.float32).read()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def weight_error(network: Network, plain: Network) -> float:
    """Over all its quantised weights together."""
    state = plain.state_dict()
    pairs = [(w.to(torch.float32), state[name]) for name, w in quantised_weights(network).items()]
    error = sum((a - b).square().sum() for a, b in pairs)
    return (error / sum(b.square().sum() for _, b in pairs)).sqrt().item()


class _Seen(Exception):
    pass


def first_output(network: Network, run: Any) -> Tensor:
    """What the last block that is used gives in the first pass; the run ends at a second one."""
    found: dict[int, Tensor] = {}

    def keep(block: Any, args: Any, output: Any) -> None:
        if id(block) in found:
            raise _Seen
        found[id(block)] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [block.register_forward_hook(keep) for block in repeated_blocks(network)]
    with contextlib.suppress(_Seen):
        run()
    for hook in hooks:
        hook.remove()
    return list(found.values())[-1]


def nbytes(network: Network, dtype: torch.dtype) -> int:
    """In a file whose other weights are in `dtype`."""
    weights = quantised_weights(network)
    floats = {name: p for name, p in network.named_parameters() if name not in weights}
    wide = {name for name in floats if network.stays_fp32(name) or name.endswith("weight_scale")}
    own = sum(p.numel() * (4 if name in wide else dtype.itemsize) for name, p in floats.items())
    return own + sum(weight.stored.nbytes for weight in weights.values())


def pictures(pipeline: str, pipe: Any, edits: Any) -> list[np.ndarray]:
    module = importlib.import_module(EVALUATIONS[pipeline][0])
    if pipeline == "StableDiffusionDiffEditPipeline":
        return [answer.picture for answer in module.run(pipe, edits)]
    return module.run(pipe, edits, module.STEPS)


def held_out(pipeline: str, count: int) -> tuple[Any, list[Any]]:
    """What the model is asked, and what each result is judged as."""
    module, kinds = EVALUATIONS[pipeline]
    if pipeline == "StableDiffusionDiffEditPipeline":
        cases = importlib.import_module(module).held_out(count)
        return cases, [case.edit for case in cases]
    edits = importlib.import_module("benchmarks.shapes.evaluate").held_out(count, COUNTS, kinds)
    return edits, edits


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a - b).mean() + 1e-12))


def measure(name: str, count: int) -> dict[str, Any]:
    """One small model: each network, then whole edits with all of them in a form."""
    pipeline, parts = MODELS[name]
    pipe = load(name, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    plain = {part: pipe.components[part] for part in parts}
    edits, judged = held_out(pipeline, count)
    results = pictures(pipeline, pipe, edits)
    report: dict[str, Any] = {
        "edits": len(judged),
        "right": round(statistics.fmean(judge(e, r).ok for e, r in zip(judged, results, strict=True)), 3),
        "forms": {},
    }
    for form in (*FORMS, FAST):
        stack = contextlib.ExitStack()
        stack.enter_context(int8_products("fast" if form == FAST else "exact"))
        made = {part: in_form(network, form) for part, network in plain.items()}
        row: dict[str, Any] = {"networks": {}}
        for part, network in made.items():
            outputs = []
            for one in (network, plain[part]):
                setattr(pipe, part, one)
                outputs.append(first_output(one, functools.partial(pictures, pipeline, pipe, edits[:1])))
            row["networks"][part] = {
                "bytes": nbytes(network, torch.bfloat16),
                "bytes_bf16": nbytes(plain[part], torch.bfloat16),
                "weights": float(f"{weight_error(network, plain[part]):.3g}"),
                "output": float(f"{relative(*outputs):.3g}"),
            }
        for part, network in made.items():
            setattr(pipe, part, network)
        quantised = pictures(pipeline, pipe, edits)
        apart = [psnr(a, b) for a, b in zip(quantised, results, strict=True)]
        row["psnr"] = {
            "median": round(statistics.median(apart), 2),
            "least": round(min(apart), 2),
            "tenth": round(float(np.quantile(apart, 0.1)), 2),
        }
        right = (judge(e, r).ok for e, r in zip(judged, quantised, strict=True))
        row["right"] = round(statistics.fmean(right), 3)
        report["forms"][form] = row
        for part, network in plain.items():
            setattr(pipe, part, network)
        stack.close()
        print(name, form, json.dumps(row))
    return report


def released() -> dict[str, Any]:
    """Bytes of the released networks, of which no weight is read."""
    found = {}
    for cls in RELEASED:
        network = build_on_meta(cls, cls.Config())
        names, state = quantisable(network), network.state_dict()
        whole = sum(t.numel() * (4 if cls.stays_fp32(n) else 2) for n, t in state.items())
        held = sum(state[name].numel() for name in names)
        rows = sum(4 * len(state[name]) for name in names)
        found[cls.__name__] = {
            "parameters": sum(t.numel() for t in state.values()),
            "quantised": held,
            "bytes_bf16": whole,
            "bytes_int8_convrot": whole - held + rows,
            "bytes_fp8": whole - held + 4 * len(names),
        }
    return found


def outliers() -> dict[str, Any]:
    """Weights of the released size in which some inputs stand out, as they do in large networks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 4096, generator=generator)
    weight[:, torch.randint(4096, (8,), generator=generator)] *= 20
    scale = weight.abs().max() / LARGEST_FP8
    errors = {"fp8": relative((weight / scale).to(torch.float8_e4m3fn).float() * scale, weight)}
    for form, group in (("int8", 1), ("int8_convrot", 256)):
        stored, scale = quantise(weight, group)
        errors[form] = relative(
            QuantisedWeight(stored, scale, group, torch.float32).to(torch.float32), weight
        )
    return {form: float(f"{error:.3g}") for form, error in errors.items()}


def kitchen() -> Mapping[str, Any]:
    """Against comfy-kitchen: numbers, scales, and weights in fp32 and bf16."""
    reference = importlib.import_module("comfy_kitchen.backends.eager.quantization")
    torch.manual_seed(0)
    report: dict[str, Any] = {"version": importlib.metadata.version("comfy-kitchen")}
    for group in (16, 64, 256):
        weight = torch.randn(1024, 4096)
        weight[:, 7] *= 20
        stored, scale = quantise(weight, group)
        theirs, their_scale = reference.quantize_int8_convrot_weight(weight, group)
        meant = QuantisedWeight(stored, scale, group, torch.float32)
        wide = meant.to(torch.float32)
        their_wide = reference.dequantize_int8_convrot_weight(theirs, their_scale, group)
        half, their_half = meant.to(torch.bfloat16), their_wide.bfloat16()
        # Numbers near 0 are sums that nearly cancel: there a unit is less than the errors of the sum.
        large = their_wide.abs() > 1e-5 * their_wide.abs().max()
        units = (half.view(torch.int16).int() - their_half.view(torch.int16).int()).abs()[large]
        apart = (wide - their_wide).abs().max() / their_wide.abs().max()
        report[f"group {group}"] = {
            "equal_numbers": bool(torch.equal(stored, theirs)),
            "equal_scales": bool(torch.equal(scale, their_scale)),
            "fp32_over_largest": float(f"{apart.item():.3g}"),
            "bf16_units": int(units.max()),
        }
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantised" / "small_models.json")
    parser.add_argument("--edits", type=int, default=40, help="of each kind")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kitchen", action="store_true")
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine(), "released": released(), "outliers": outliers()}
    if given.kitchen:
        report["comfy_kitchen"] = kitchen()
    report["models"] = {name: measure(name, given.edits) for name in given.models}
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
