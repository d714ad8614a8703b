"""Parts and settings of pipelines: parts that are None, pipelines made from others, config and other
spellings of diffusers; a subclass of DiffEdit that has a step of its own."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import joyedit
from joyedit.pipelines.made_for import MadeFor

PHOTO = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
SYSTEMS = ("joyimage", "diffedit", "chronoedit")


@pytest.fixture(scope="module")
def loaded():
    found = {system: joyedit.load(f"tiny-{system}", device="cpu", dtype="float32") for system in SYSTEMS}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def without(pipe, *names):
    return type(pipe).from_pipe(pipe, **dict.fromkeys(names))


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.slow
def test_joyimage_runs_from_embeddings_and_embeds_alone(loaded):
    pipe = loaded["joyimage"]
    call = {"image": PHOTO, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    wanted = pipe(prompt="Make it red.", generator=seeded(), **call).images
    embedded = {}
    encoder = without(pipe, "transformer", "vae")
    crop = joyedit.images.resize_center_crop(PHOTO, *pipe.choose_size([PHOTO], None, None))
    for name, text in (("prompt", "Make it red."), ("negative_prompt", "")):
        embeds, mask = encoder.encode_prompt_multiple_images(text, images=crop)
        embedded |= {f"{name}_embeds": embeds, f"{name}_embeds_mask": mask}
    painter = without(pipe, "text_encoder", "tokenizer", "processor")
    made = painter(generator=seeded(), **embedded, **call).images
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)  # both prompts were read at once there
    with pytest.raises(ValueError, match="needs text_encoder and tokenizer and processor, and .* has none"):
        painter(prompt="x", **call)
    with pytest.raises(ValueError, match="needs text_encoder and tokenizer"):
        painter.encode_prompt("x")
    with pytest.raises(ValueError, match="needs transformer.*assign pipe.transformer"):
        encoder(prompt="x", **call)
    blind = without(pipe, "vae")
    with pytest.raises(ValueError, match="needs vae"):
        blind(prompt="x", **call)
    latents = blind(prompt="red", num_inference_steps=1, generator=seeded(), output_type="latent").images
    again = pipe(prompt="red", num_inference_steps=1, generator=seeded(), output_type="latent").images
    assert torch.equal(latents, again)
    with pytest.raises(ValueError, match="needs vae"):
        blind(prompt="red", num_inference_steps=1)
    blind.vae = pipe.vae
    assert blind(prompt="red", num_inference_steps=1).images


def test_chronoedit_runs_from_embeddings_and_embeds_alone(loaded):
    pipe = loaded["chronoedit"]
    call = {
        "height": 64,
        "width": 96,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "output_type": "latent",
    }
    wanted = pipe(PHOTO, "Make it red.", generator=seeded(), **call).frames
    encoder = without(pipe, "transformer", "vae")
    positive, negative = encoder.encode_prompt("Make it red.", max_sequence_length=512)
    seen = encoder.encode_image(PHOTO)
    painter = without(pipe, "text_encoder", "tokenizer", "image_encoder", "image_processor")
    embedded = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "image_embeds": seen}
    assert torch.equal(painter(PHOTO, generator=seeded(), **embedded, **call).frames, wanted)
    for lacking, name in (("prompt_embeds", "text_encoder"), ("negative_prompt_embeds", "text_encoder")):
        given = {key: value for key, value in embedded.items() if key != lacking}
        with pytest.raises(ValueError, match=f"needs {name} and tokenizer"):
            painter(PHOTO, "x" if lacking == "prompt_embeds" else None, **given, **call)
    with pytest.raises(ValueError, match="needs image_encoder and image_processor"):
        painter(PHOTO, prompt_embeds=positive, negative_prompt_embeds=negative, **call)
    with pytest.raises(ValueError, match="needs transformer and vae"):
        encoder(PHOTO, "x", **call)
    with pytest.raises(ValueError, match="needs image_encoder"):
        painter.encode_image(PHOTO)


def test_diffedit_runs_from_embeddings_and_embeds_alone(loaded):
    pipe = loaded["diffedit"]
    steps = {"num_inference_steps": 3, "guidance_scale": 2.0}
    encoder = without(pipe, "unet", "vae")
    positive, negative = encoder.encode_prompt("a red circle")
    painter = without(pipe, "text_encoder", "tokenizer")
    embedded = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    levels = painter.invert(image=PHOTO, **embedded, **steps).latents
    assert torch.equal(levels, pipe.invert("a red circle", PHOTO, **steps).latents)
    mask = torch.ones(levels.shape[-2:])
    wanted = pipe("a red circle", mask, levels, output_type="latent", **steps).images
    denoiser = without(pipe, "text_encoder", "tokenizer", "vae")
    call = {"mask_image": mask, "image_latents": levels, **embedded, **steps}
    assert torch.equal(denoiser(output_type="latent", **call).images, wanted)
    assert torch.equal(denoiser.invert(image=levels[:, -1], **embedded, **steps).latents, levels)
    with pytest.raises(ValueError, match="needs vae"):
        denoiser(**call)
    with pytest.raises(ValueError, match="needs vae"):
        denoiser.invert(image=PHOTO, **embedded, **steps)
    with pytest.raises(ValueError, match="needs vae"):
        denoiser.decode_latents(levels[:, -1])
    with pytest.raises(ValueError, match="needs text_encoder and tokenizer"):
        painter.invert("a red circle", PHOTO, **steps)
    with pytest.raises(ValueError, match="needs text_encoder and tokenizer"):
        painter.invert(image=PHOTO, prompt_embeds=positive, **steps)
    for method in (encoder.invert, encoder.generate_mask, encoder.edit, encoder):
        words = {} if method in (encoder.invert, encoder) else {"source_prompt": "a", "target_prompt": "b"}
        words = words or {"prompt": "a"}
        given = {"mask_image": mask, "image_latents": levels} if method is encoder else {}
        with pytest.raises(ValueError, match="needs unet"):
            method(image=levels[:, -1], **words, **given)
    mask_call = {"source_prompt": "a red circle", "target_prompt": "a blue circle", "num_maps_per_mask": 1}
    latents = without(pipe, "vae").generate_mask(
        image=levels[:, -1], generator=seeded(), **mask_call, **steps
    )
    same = pipe.generate_mask(image=levels[:, -1], generator=seeded(), **mask_call, **steps)
    assert np.array_equal(latents, same)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_none_stays_so_on_disk(loaded, tmp_path, system):
    pipe = loaded[system]
    part = without(pipe, "text_encoder")
    assert part.components["text_encoder"] is None and part.device == pipe.device
    part.to(torch.float32)
    part.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None] and not (tmp_path / "saved" / "text_encoder").exists()
    opened = type(pipe).from_pretrained(tmp_path / "saved", text_encoder=None)
    assert opened.text_encoder is None
    with pytest.raises(ValueError, match="lists no 'text_encoder': pass text_encoder="):
        type(pipe).from_pretrained(tmp_path / "saved")
    (tmp_path / "whole").mkdir()
    pipe.save_pretrained(tmp_path / "whole")
    assert joyedit.load(tmp_path / "whole", device="cpu", text_encoder=None).text_encoder is None
    with pytest.raises(TypeError, match="scheduler is a NoneType"):
        without(pipe, "scheduler")
    bare = without(pipe, *pipe.networks)
    assert bare.device == torch.device("cpu") and bare.dtype == torch.float32


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_pipeline_made_from_another_has_its_settings(loaded, caplog, system):
    pipe = loaded[system]
    quirk = sorted(pipe.quirk_names)[0]
    first = type(pipe).from_pipe(pipe, reference_quirks=[quirk])
    first.set_progress_bar_config(disable=False, desc="mine")
    again = type(pipe).from_pipe(first)
    assert again.quirks == {quirk} and again.made_for == pipe.made_for != MadeFor()
    assert again.components == pipe.components and again.progress_bar(1).desc.startswith("mine")
    assert again.config == pipe.config

    made = type(pipe)(**pipe.components)  # as diffusers' users do: what the parts were loaded with goes along
    assert made.made_for == pipe.made_for and made.config == pipe.config and not made.quirks
    assert not caplog.text
    if system == "joyimage":
        first.buckets = [(32, 32)]
        assert type(pipe).from_pipe(first).buckets == [(32, 32)]
        assert type(pipe).from_pipe(pipe, buckets=[(64, 64)]).buckets == [(64, 64)]
    with pytest.raises(TypeError, match="sampler"):
        type(pipe).from_pipe(pipe, sampler=1)


def test_the_config_of_a_pipeline(loaded):
    config = loaded["diffedit"].config
    assert config["_class_name"] == "StableDiffusionDiffEditPipeline"
    assert config["unet"] == config.unet == ("diffusers", "UNet2DConditionModel")
    assert config.requires_safety_checker is loaded["diffedit"].requires_safety_checker
    assert config.safety_checker == (None, None)
    with pytest.raises(AttributeError, match="config has no 'speed'"):
        _ = config.speed
    assert [tuple(size) for size in loaded["joyimage"].config.buckets] == loaded["joyimage"].buckets
    assert loaded["chronoedit"].config.transformer[1] == "ChronoEditTransformer3DModel"


def test_image_processors_and_numpy_to_pil_are_those_of_diffusers(loaded):
    pipe = loaded["diffedit"]
    factor = pipe.vae_scale_factor
    mine, theirs = pipe.image_processor, VaeImageProcessor(vae_scale_factor=factor)
    photo = PHOTO.resize((99, 70))
    pixels = mine.preprocess(photo)
    torch.testing.assert_close(pixels, theirs.preprocess(photo))
    torch.testing.assert_close(mine.preprocess(photo, 32, 48), theirs.preprocess(photo, 32, 48))
    for kind in ("np", "pt", "latent"):
        found, wanted = mine.postprocess(pixels, kind), theirs.postprocess(pixels, kind)
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert mine.postprocess(pixels)[0].tobytes() == theirs.postprocess(pixels)[0].tobytes()
    array = mine.postprocess(pixels, "np")
    for one in (array, array[0], array[..., :1]):
        pairs = zip(pipe.numpy_to_pil(one), theirs.numpy_to_pil(one), strict=True)
        assert all(a.tobytes() == b.tobytes() and a.mode == b.mode for a, b in pairs)
    assert torch.equal(mine.numpy_to_pt(array), theirs.numpy_to_pt(array))
    assert np.array_equal(mine.pt_to_numpy(pixels), theirs.pt_to_numpy(pixels))
    assert loaded["joyimage"].image_processor.config.vae_scale_factor == 8
    assert loaded["chronoedit"].image_processor is loaded["chronoedit"].components["image_processor"]


class LeftHalf(joyedit.StableDiffusionDiffEditPipeline):
    """A fork that knows where to edit."""

    def generate_mask(self, image=None, **call):
        heat = super().generate_mask(image, **call)
        heat[:] = 0
        heat[..., : heat.shape[-1] // 2] = 1
        return heat


class Forgetful(joyedit.StableDiffusionDiffEditPipeline):
    """A fork that starts from less."""

    def invert(self, *args, **call):
        latents, images = super().invert(*args, **call)
        return joyedit.DiffEditInversionPipelineOutput(latents * 0.5, images)


class Bright(joyedit.StableDiffusionDiffEditPipeline):
    """A fork whose denoising ends otherwise."""

    def __call__(self, *args, **call):
        images, flagged = super().__call__(*args, **call)
        return joyedit.StableDiffusionPipelineOutput(images + 1, flagged)


def test_an_edit_is_made_of_the_steps_of_a_subclass(loaded):
    def edit(kind):
        pipe = kind.from_pipe(loaded["diffedit"])
        call = {"num_inference_steps": 3, "num_maps_per_mask": 1, "output_type": "latent"}
        return pipe.edit(PHOTO, "a red circle", "a blue circle", generator=seeded(), **call)

    plain = edit(joyedit.StableDiffusionDiffEditPipeline)
    half = edit(LeftHalf)
    columns = half.mask.shape[-1] // 2
    assert (half.mask[..., :columns] == 1).all() and not half.mask[..., columns:].any()
    assert not np.array_equal(half.mask, plain.mask) and half.heat_map.max() == 1
    assert not torch.equal(edit(Forgetful).images, plain.images)
    assert torch.equal(edit(Bright).images, plain.images + 1)


def test_an_edit_is_the_three_methods_one_after_the_other(loaded):
    pipe = loaded["diffedit"]
    generator, steps = seeded(), {"num_inference_steps": 4, "inpaint_strength": 0.75}
    whole = pipe.edit(
        PHOTO, "a red circle", "a blue circle", generator=seeded(), eta=0.5, output_type="latent", **steps
    )
    words = {"source_prompt": "a red circle", "target_prompt": "a blue circle"}
    heat = pipe.generate_mask(PHOTO, generator=generator, num_inference_steps=4, output_type="heat", **words)
    levels = pipe.invert("a red circle", PHOTO, guidance_scale=1.0, generator=generator, **steps)
    call = {"prompt": "a blue circle", "negative_prompt": pipe.made_for.call["negative_prompt"], "eta": 0.5}
    made = pipe(
        mask_image=heat > 0.5,
        image_latents=levels.latents,
        generator=generator,
        output_type="latent",
        **call,
        **steps,
    )
    assert np.array_equal(whole.heat_map, heat) and torch.equal(whole.images, made.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_dtype_is_that_of_all_but_what_the_reference_loads_in_fp32(loaded, system, dtype):
    """diffusers' own `to` casts these too, and warns that `from_pretrained(torch_dtype=)` does not: here both
    keep them."""
    pipe = copy.deepcopy(loaded[system])
    pipe.to(dtype=dtype)
    assert pipe.dtype == dtype and {network.dtype for network in pipe.networks.values()} == {dtype}
    for network in pipe.networks.values():
        theirs = getattr(diffusers, type(network).__name__, None)
        kept = getattr(theirs, "_keep_in_fp32_modules", None) or ()
        for name, parameter in network.named_parameters():
            stays = not set(kept).isdisjoint(name.split("."))
            assert parameter.dtype == (torch.float32 if stays else dtype), name
    assert {p.dtype for p in pipe.to(torch.float32).networks["vae"].parameters()} == {torch.float32}
