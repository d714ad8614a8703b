"""Whole DiffEdit runs against diffusers, on tiny random checkpoints that it saved and ours opens."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import DDIMInverseScheduler as ReferenceInverse
from diffusers import DDIMScheduler as ReferenceDDIM
from diffusers import PNDMScheduler as ReferencePNDM
from diffusers import StableDiffusionDiffEditPipeline as Reference
from diffusers import StableDiffusionPipeline as ReferencePlain
from diffusers import UNet2DConditionModel as ReferenceUNet
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker as ReferenceChecker,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTextConfig
from transformers import CLIPTextModel as ReferenceText
from transformers import CLIPTokenizer as ReferenceTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from joyedit.pipelines.diffedit import (
    BATCH_THRESHOLD,
    LATE_BLEND,
    PARTIAL_CLIP_SKIP,
    SAMPLED_INVERSION,
    SWAPPED_GUIDANCE,
    StableDiffusionDiffEditPipeline,
)

TOLERANCE = 1e-4  # of whole runs, absolute; images are in [0, 1], latents of the order of 1
NAMES = ["sd1", "sd2"]
DDIM = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
)
UNET = dict(
    block_out_channels=[16, 32],
    layers_per_block=1,
    sample_size=8,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    norm_num_groups=8,
)
VAE = dict(
    block_out_channels=[8, 16, 16],
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=4,
    sample_size=32,
)
TEXT = dict(intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77)
SOURCE, TARGET = "a bowl of fruits", "a BASKET of pears, on a table"


def filled(network, seed):
    """Random weights that keep the scale of what passes, biases and norms among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            wide = noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2 * noise
            parameter.copy_(1 + 0.2 * noise if is_norm else noise if "embedding" in name else wide)
    return network.eval()


def write_tokenizer(folder, pad):
    """The alphabet of CLIP's tokenizer, a few merges, and its two special tokens."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [("o", "f</w>"), ("b", "o"), ("bo", "w"), ("f", "r"), ("p", "e")]
    joined = [a + b for a, b in merges]
    tokens = [*letters, *(f"{a}</w>" for a in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return ReferenceTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def make_parts(name, folder):
    folder.mkdir()
    second = name == "sd2"
    width = 24 if second else 16
    tokenizer = write_tokenizer(folder, "!" if second else "<|endoftext|>")
    heads = [2, 4] if second else 4
    unet = dict(attention_head_dim=heads, use_linear_projection=second, cross_attention_dim=width)
    ddim = {**DDIM, "clip_sample": False, "prediction_type": "v_prediction" if second else "epsilon"}
    activation = "gelu" if second else "quick_gelu"
    text = CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), hidden_size=width, hidden_act=activation)
    return dict(
        vae=filled(ReferenceVAE(**VAE), 1),
        text_encoder=filled(ReferenceText(text), 2),
        tokenizer=tokenizer,
        unet=filled(ReferenceUNet(**UNET, **unet), 3),
        scheduler=ReferenceDDIM(**ddim),
        safety_checker=None,
        feature_extractor=None,
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(folder, quirks=True, **parts):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(
        folder, dtype="float32", reference_quirks=quirks, **parts
    )
    return quiet(pipe)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each kind of checkpoint the reference's pipeline, and the folder that it saved itself to."""
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name in NAMES:
        parts = make_parts(name, root / f"tokenizer of {name}")
        inverse = ReferenceInverse.from_config(parts["scheduler"].config)
        pipe = Reference(**parts, inverse_scheduler=inverse, requires_safety_checker=False)
        pipe.save_pretrained(root / name)
        found[name] = quiet(pipe), root / name
    return found


@pytest.fixture(params=NAMES)
def both(request, made):
    """The reference and ours with all its defects, on the same weights."""
    reference, folder = made[request.param]
    return reference, opened(folder)


# For what goes through the parts of both alike; whole runs of the second are quick, too.
BOTH = pytest.mark.parametrize("both", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def pair(made):
    reference, folder = made["sd1"]
    return reference, opened(folder)


def photo(width=45, height=54, seed=0):
    """Smooth colour ramps with a rectangle; the sides are no multiples of what a latent stands for."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    ramps = np.stack([np.sin(x * a + y * b) for a, b in generator.uniform(1, 9, (3, 2))], axis=-1)
    pixels = np.uint8(127 + 120 * ramps)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = generator.integers(0, 255, 3)
    return Image.fromarray(pixels)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distance(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max())


def make_mask(pipe, seed=0, **call):
    call = {"image": photo(), "num_maps_per_mask": 3, "num_inference_steps": 8, **call}
    return pipe.generate_mask(generator=seeded(seed), **call)


def heat_of_reference(pipe, ratio=3.0, **call):
    """The mask, and the map that it is cut from, which the reference divides by what it clamped it to."""
    seen = []
    clamp = torch.Tensor.clamp

    def keep(self, *limits, **kwargs):
        result = clamp(self, *limits, **kwargs)
        if self.ndim == 3 and len(limits) == 2:
            seen.append(result / limits[1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp", keep)
        mask = make_mask(pipe, mask_thresholding_ratio=ratio, **call)
    return mask, seen[-1]


MASKS = {
    "defaults": dict(target_prompt=TARGET, source_prompt=SOURCE),
    "own negatives": dict(
        target_prompt=TARGET,
        source_prompt=SOURCE,
        target_negative_prompt="a dog",
        source_negative_prompt="snow and rain",
        guidance_scale=3.0,
    ),
    "a negative that is the other prompt": dict(
        target_prompt=TARGET, source_prompt=SOURCE, target_negative_prompt=SOURCE, guidance_scale=1.5
    ),
    "a batch": dict(
        image=[photo(), photo(seed=1)],
        target_prompt=[TARGET, "a dog"],
        source_prompt=[SOURCE, "a cat"],
        source_negative_prompt=["x", "y"],
    ),
    "one photograph for two prompts": dict(target_prompt=[TARGET, "a dog"], source_prompt=[SOURCE, "a cat"]),
    "strong noise, small ratio": dict(
        target_prompt=TARGET,
        source_prompt=SOURCE,
        mask_encode_strength=0.8,
        ratio=1.7,
        num_maps_per_mask=1,
    ),
    "latents": dict(
        image=torch.randn(1, 4, 9, 7, generator=seeded()), target_prompt=TARGET, source_prompt=SOURCE
    ),
}


@BOTH
@pytest.mark.parametrize("case", MASKS)
def test_masks_are_identical(both, case):
    reference, ours = both
    call = {"ratio": 3.0, **MASKS[case]}
    theirs, heat = heat_of_reference(reference, **call)
    call["mask_thresholding_ratio"] = call.pop("ratio")
    mask = make_mask(ours, **call)
    assert mask.dtype == theirs.dtype and mask.shape == theirs.shape
    assert distance(make_mask(ours, output_type="heat", **call), heat) <= TOLERANCE
    assert np.array_equal(mask, theirs)
    assert 0 < theirs.mean() < 0.9


def test_masks_with_generators_for_every_noise(pair):
    lists = [[seeded(s) for s in range(6)] for _ in pair]
    call = dict(
        image=[photo(), photo(seed=1)],
        target_prompt=[TARGET, "a dog"],
        source_prompt=[SOURCE, "a cat"],
        num_maps_per_mask=3,
        num_inference_steps=8,
    )
    theirs, mask = (p.generate_mask(generator=g, **call) for p, g in zip(pair, lists, strict=True))
    assert np.array_equal(mask, theirs) and mask.any()


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_prompts_are_embedded_alike(both, clip_skip):
    reference, ours = both
    encoder = reference.text_encoder
    if clip_skip:  # this release of transformers has no such attribute, which the reference needs here
        object.__setattr__(encoder, "text_model", encoder)
    long = "x " * 100 + SOURCE
    calls = [
        dict(prompt=SOURCE, num_images_per_prompt=2),
        dict(prompt=[SOURCE, TARGET, long], num_images_per_prompt=2, negative_prompt=["", "a", SOURCE]),
        dict(prompt=SOURCE, num_images_per_prompt=1, do_classifier_free_guidance=False),
        dict(prompt=None, prompt_embeds=torch.randn(2, 20, encoder.config.hidden_size)),
    ]
    try:
        for call in calls:
            call = {"num_images_per_prompt": 3, "do_classifier_free_guidance": True, **call}
            theirs = reference.encode_prompt(device="cpu", clip_skip=clip_skip, **call)
            found = ours.encode_prompt(clip_skip=clip_skip, **call)
            assert len(found) == len(theirs) == 2
            for a, b in zip(found, theirs, strict=True):
                assert (a is None) == (b is None)
                assert a is None or distance(a, b) <= 1e-5 * float(b.abs().max())
    finally:
        encoder.__dict__.pop("text_model", None)


INVERSIONS = {
    "defaults": dict(),
    "no guidance": dict(guidance_scale=1.0),
    "all steps, own negative": dict(inpaint_strength=1.0, guidance_scale=2.0, negative_prompt="a dog"),
    "truncated steps": dict(num_inference_steps=50, inpaint_strength=0.14),  # 7.000000000000001
    "regularised": dict(guidance_scale=1.0, num_reg_steps=2, lambda_auto_corr=5.0, num_inference_steps=4),
    "divergence alone": dict(guidance_scale=1.0, num_reg_steps=1, lambda_auto_corr=0.0),
    "correlation alone": dict(guidance_scale=1.0, num_reg_steps=1, lambda_kl=0.0, num_auto_corr_rolls=2),
    "a batch": dict(
        image=[photo(), photo(seed=1)], prompt=[SOURCE, "a cat"], num_reg_steps=1, guidance_scale=1.0
    ),
    "one photograph for two prompts": dict(prompt=[SOURCE, "a cat"]),
}


@BOTH
@pytest.mark.parametrize("case", INVERSIONS)
def test_inversions_are_equal(both, case):
    seen = [], []
    results = []
    for pipe, steps in zip(both, seen, strict=True):
        call = {"prompt": SOURCE, "image": photo(), "num_inference_steps": 5, **INVERSIONS[case]}
        call |= {"decode_latents": True, "output_type": "np", "generator": seeded(5)}
        call["callback"] = lambda i, t, x, steps=steps: steps.append((i, int(t), x.clone()))
        results.append(pipe.invert(**call))
    theirs, found = results
    scale = max(1.0, float(theirs.latents.abs().max()))
    assert distance(found.latents, theirs.latents) <= TOLERANCE * scale
    assert distance(found.images, theirs.images) <= TOLERANCE
    assert [step[:2] for step in seen[0]] == [step[:2] for step in seen[1]]
    assert distance(seen[1][-1][2], seen[0][-1][2]) <= TOLERANCE * scale
    assert float(np.std(theirs.images)) > 0.02  # an empty picture would prove nothing


def test_regularisation_with_guidance_where_the_reference_can(made):
    """Of a model that predicts noise it does not need x, which it has twice."""
    reference, folder = made["sd1"]
    ours = opened(folder)
    call = dict(prompt=SOURCE, image=photo(), num_inference_steps=3, num_reg_steps=2, guidance_scale=3.0)
    theirs, found = (p.invert(generator=seeded(1), **call).latents for p in (reference, ours))
    assert distance(found, theirs) <= TOLERANCE * max(1.0, float(theirs.abs().max()))


def levels_for(batch=1, steps=6, strength=0.7, size=(9, 7)):
    return torch.randn(batch, int(steps * strength), 4, *size, generator=seeded(11))


def mask_for(batch=1, size=(9, 7), seed=12):
    values = torch.rand(batch, 1, *size, generator=seeded(seed))
    return (values > 0.4).float()


CALLS = {
    "defaults": dict(),
    "as the guide": dict(negative_prompt=SOURCE),
    "no guidance": dict(guidance_scale=1.0),
    "fresh noise": dict(eta=0.6, negative_prompt="a dog"),
    "several of one prompt": dict(num_images_per_prompt=2, eta=1.0),
    "a batch": dict(prompt=[TARGET, "a dog"], negative_prompt=[SOURCE, "a cat"], mask_image=mask_for(2)),
    "one mask for two prompts": dict(prompt=[TARGET, "a dog"], num_images_per_prompt=2, eta=0.3),
    "all steps": dict(inpaint_strength=1.0, num_inference_steps=4),
    "an array as mask": dict(mask_image=mask_for()[0, 0].numpy()),
    "a soft mask": dict(mask_image=torch.rand(9, 7, generator=seeded(4))),
}


@BOTH
@pytest.mark.parametrize("case", CALLS)
def test_edits_are_equal(both, case):
    results, seen = [], ([], [])
    for pipe, steps in zip(both, seen, strict=True):
        call = {"prompt": TARGET, "num_inference_steps": 6, "inpaint_strength": 0.7, **CALLS[case]}
        batch = len(call["prompt"]) if isinstance(call["prompt"], list) else 1
        call.setdefault("mask_image", mask_for())
        call["mask_image"] = torch.as_tensor(call["mask_image"]).clone()  # the reference writes to it
        call["image_latents"] = levels_for(batch, call["num_inference_steps"], call["inpaint_strength"])
        call["callback"] = lambda i, t, x, steps=steps: steps.append((i, int(t), x.clone()))
        results.append(pipe(generator=seeded(3), output_type="np", callback_steps=2, **call))
    theirs, found = results
    assert [step[:2] for step in seen[0]] == [step[:2] for step in seen[1]]
    for mine, other in zip(seen[1], seen[0], strict=True):
        assert distance(mine[2], other[2]) <= TOLERANCE * max(1.0, float(other[2].abs().max()))
    assert distance(found.images, theirs.images) <= TOLERANCE
    assert found.nsfw_content_detected is theirs.nsfw_content_detected is None
    assert float(np.std(theirs.images)) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types_are_equal(pair, output_type):
    call = dict(
        prompt=TARGET,
        num_inference_steps=3,
        inpaint_strength=0.67,
        output_type=output_type,
        image_latents=levels_for(1, 3, 0.67),
        return_dict=False,
    )
    theirs, found = (pipe(mask_image=mask_for(), **call)[0] for pipe in pair)
    assert type(found) is type(theirs)
    if output_type == "pil":
        assert [np.asarray(a).tolist() for a in found] == [np.asarray(b).tolist() for b in theirs]
    else:
        assert found.dtype == theirs.dtype
        assert distance(found, theirs) <= TOLERANCE * max(1.0, float(torch.as_tensor(theirs).abs().max()))


def test_whole_run_of_the_three_stages(both):
    """As the guide calls them, one generator through all."""
    results = []
    for pipe in both:
        generator = seeded(8)
        shared = dict(num_inference_steps=6, generator=generator)
        mask = pipe.generate_mask(
            image=photo(), source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=2, **shared
        )
        levels = pipe.invert(prompt=SOURCE, image=photo(), **shared).latents
        call = dict(prompt=TARGET, negative_prompt=SOURCE, mask_image=mask, image_latents=levels)
        results.append((mask, pipe(**call, **shared, output_type="np", eta=0.2).images))
    assert np.array_equal(results[0][0], results[1][0])
    assert distance(results[1][1], results[0][1]) <= TOLERANCE


@pytest.mark.slow
def test_each_quirk_matters(made):
    """Turned off alone, each makes what the reference does not."""
    reference, folder = made["sd1"]
    quirks = StableDiffusionDiffEditPipeline.quirk_names
    negatives = dict(target_negative_prompt="a dog", source_negative_prompt="snow", guidance_scale=3.0)
    many = dict(
        image=[photo(), photo(seed=1)],
        target_prompt=[TARGET, "a, b, c and d!"],
        source_prompt=[SOURCE, "a"],
    )
    prompts = dict(target_prompt=TARGET, source_prompt=SOURCE, **negatives)
    call = dict(prompt=TARGET, num_inference_steps=6, inpaint_strength=0.7, output_type="np", clip_skip=1)

    def inverted(pipe):
        return pipe.invert(SOURCE, photo(), 6, 0.7, 1.5, generator=seeded()).latents

    runs = {
        SWAPPED_GUIDANCE: lambda p: make_mask(p, **prompts),
        BATCH_THRESHOLD: lambda p: make_mask(p, **many),
        SAMPLED_INVERSION: lambda p: p.invert(SOURCE, photo(), 3, generator=seeded()).latents[:, :2],
        LATE_BLEND: lambda p: p(mask_image=mask_for(1, (13, 11)), image_latents=inverted(p), **call).images,
        PARTIAL_CLIP_SKIP: lambda p: p(mask_image=mask_for(), image_latents=levels_for(), **call).images,
    }
    assert set(runs) == quirks
    object.__setattr__(reference.text_encoder, "text_model", reference.text_encoder)
    try:
        for quirk, run in runs.items():
            theirs = run(reference)
            assert distance(run(opened(folder)), theirs) <= 1e-4, quirk
            assert distance(run(opened(folder, quirks - {quirk})), theirs) > 1e-3, quirk
    finally:
        reference.text_encoder.__dict__.pop("text_model", None)


@pytest.fixture(scope="module")
def checked(made, tmp_path_factory):
    """A checkpoint with a safety checker whose concepts are random, and the reference that wrote it."""
    reference, _ = made["sd1"]
    tower = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    config = CLIPConfig(vision_config={**tower, "projection_dim": 12}, projection_dim=12)
    checker = filled(ReferenceChecker(config), 9)
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn(17, 12, generator=seeded(1)))
        checker.special_care_embeds.copy_(torch.randn(3, 12, generator=seeded(2)))
        checker.concept_embeds_weights.fill_(10.0)
        checker.special_care_embeds_weights.fill_(0.3)
    extractor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    parts = {**reference.components, "safety_checker": checker, "feature_extractor": extractor}
    folder = tmp_path_factory.mktemp("checked")
    pipe = quiet(Reference(**parts))
    pipe.save_pretrained(folder)
    return pipe, opened(folder)


def test_safety_checker_blackens_the_same_pictures(checked):
    """Of two pictures the threshold is set between the scores, so that one of them is flagged."""
    reference, ours = checked
    call = dict(
        prompt=[TARGET, "x, y, z"],
        num_inference_steps=3,
        inpaint_strength=1.0,
        image_latents=levels_for(2, 3, 1.0),
        output_type="np",
        generator=seeded(),
    )
    plain = ours(mask_image=mask_for(), **call)
    assert plain.nsfw_content_detected == [False, False]
    inputs = ours.feature_extractor([Image.fromarray(np.uint8(x * 255)) for x in plain.images])
    margins = ours.safety_checker.scores(inputs["pixel_values"]).concepts  # (2, 17)
    concept = int((margins[0] - margins[1]).abs().argmax())
    first, second = margins[:, concept].tolist()
    for pipe in checked:
        pipe.safety_checker.concept_embeds_weights.data[concept] += (first + second) / 2
    theirs, found = (pipe(mask_image=mask_for(), **call) for pipe in checked)
    assert sorted(theirs.nsfw_content_detected) == [False, True]
    assert found.nsfw_content_detected == theirs.nsfw_content_detected
    assert distance(found.images, theirs.images) <= TOLERANCE
    black = theirs.nsfw_content_detected.index(True)
    assert not found.images[black].any() and found.images[1 - black].any()


def test_learned_words(made, tmp_path):
    _, folder = made["sd1"]
    reference, ours = Reference.from_pretrained(folder), opened(folder)
    vectors = torch.randn(3, 16)
    reference.load_textual_inversion({"<toy>": vectors})
    assert ours.load_textual_inversion({"<toy>": vectors}) == ["<toy>"]
    words = "a bowl of <toy>"
    for negative in ("", "<toy> in a box"):
        theirs, found = (p.encode_prompt(words, "cpu", 1, True, negative) for p in (reference, ours))
        for a, b in zip(found, theirs, strict=True):
            assert distance(a, b) <= 1e-5 * float(b.abs().max())
    prompts = dict(target_prompt=words, source_prompt=SOURCE)
    assert np.array_equal(make_mask(ours, **prompts), make_mask(quiet(reference), **prompts))
    ours.unload_textual_inversion()
    before = opened(folder).encode_prompt(words)[0]
    assert distance(ours.encode_prompt(words)[0], before) == 0 < distance(found[0], before)


def write_lora(pipe, path, text=True):
    """Factors for every attention projection of the UNet, and of the text encoder."""
    state, generator = {}, seeded(21)
    for network in ("unet", "text_encoder")[: 1 + text]:
        for name, module in getattr(pipe, network).named_modules():
            kinds = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
            if name.endswith(kinds):
                prefix = "text_encoder.text_model" if network == "text_encoder" else "unet"
                a, b = ("lora_linear_layer.down", "lora_linear_layer.up")
                if network == "unet":
                    a, b = "lora.down", "lora.up"
                rows, columns = module.weight.shape
                state[f"{prefix}.{name}.{a}.weight"] = torch.randn(2, columns, generator=generator)
                state[f"{prefix}.{name}.{b}.weight"] = 0.3 * torch.randn(rows, 2, generator=generator)
    save_file(state, path)
    return path


@pytest.mark.parametrize("fused", [False, True])
def test_adapters(made, tmp_path, fused):
    _, folder = made["sd1"]
    reference, ours = quiet(Reference.from_pretrained(folder)), opened(folder)
    call = dict(prompt=TARGET, num_inference_steps=3, inpaint_strength=0.7, output_type="np")
    call["image_latents"] = levels_for(1, 3, 0.7)
    plain = ours(mask_image=mask_for(), **call).images
    path = write_lora(ours, tmp_path / "style.safetensors")
    for pipe in (reference, ours):
        pipe.load_lora_weights(str(path))
        if fused:
            pipe.fuse_lora(lora_scale=0.7)
    scale = {} if fused else {"cross_attention_kwargs": {"scale": 0.7}}
    theirs, found = (p(mask_image=mask_for(), **call, **scale).images for p in (reference, ours))
    assert distance(found, theirs) <= TOLERANCE < 1e-2 < distance(theirs, plain)
    if fused:
        ours.unfuse_lora()
    ours.unload_lora_weights()
    assert distance(ours(mask_image=mask_for(), **call).images, plain) == 0


def test_scale_of_adapters_in_mask_and_inversion(made, tmp_path):
    """Of the UNet; in these two stages the reference forgets the scale for the text encoder."""
    _, folder = made["sd1"]
    reference, ours = quiet(Reference.from_pretrained(folder)), opened(folder)
    path = write_lora(ours, tmp_path / "style.safetensors", text=False)
    for pipe in (reference, ours):
        pipe.load_lora_weights(str(path))
    call = dict(cross_attention_kwargs={"scale": 0.5})
    masks = [make_mask(p, target_prompt=TARGET, source_prompt=SOURCE, **call) for p in (reference, ours)]
    assert np.array_equal(*masks)
    call |= dict(prompt=SOURCE, image=photo(), num_inference_steps=3)
    theirs, found = (p.invert(generator=seeded(), **call).latents for p in (reference, ours))
    assert distance(found, theirs) <= TOLERANCE * float(theirs.abs().max())


def test_plain_folder_with_another_solver(made, tmp_path):
    """A text-to-image folder names PNDM and no inverse: both solvers are what its users make by hand."""
    reference, _ = made["sd1"]
    parts = {k: v for k, v in reference.components.items() if k != "inverse_scheduler"}
    pndm = {"scheduler": ReferencePNDM(**DDIM, skip_prk_steps=True), "image_encoder": None}
    plain = ReferencePlain(**{**parts, **pndm}, requires_safety_checker=False)
    plain.save_pretrained(tmp_path / "plain")
    ours = opened(tmp_path / "plain")
    assert ours.requires_safety_checker is False
    settings = dict(**DDIM, clip_sample=False)
    by_hand = Reference(
        **{**parts, "scheduler": ReferenceDDIM(**settings)},
        inverse_scheduler=ReferenceInverse(**settings),
        requires_safety_checker=False,
    )
    call = dict(prompt=SOURCE, image=photo(), num_inference_steps=4)
    theirs, found = (p.invert(generator=seeded(), **call).latents for p in (quiet(by_hand), ours))
    assert distance(found, theirs) <= TOLERANCE * float(theirs.abs().max())
    call = dict(prompt=TARGET, num_inference_steps=4, output_type="np", image_latents=theirs)
    theirs, found = (p(mask_image=mask_for(1, (13, 11)), **call).images for p in (by_hand, ours))
    assert distance(found, theirs) <= TOLERANCE


def test_what_ours_saves_the_reference_opens(made, tmp_path):
    _, folder = made["sd2"]
    ours = opened(folder)
    ours.save_pretrained(tmp_path / "saved")
    reference = quiet(Reference.from_pretrained(tmp_path / "saved"))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False and index["_class_name"] == Reference.__name__
    prompts = dict(target_prompt=TARGET, source_prompt=SOURCE)
    assert np.array_equal(make_mask(ours, **prompts), make_mask(reference, **prompts))
    call = dict(prompt=SOURCE, image=photo(), num_inference_steps=3)
    theirs, found = (p.invert(generator=seeded(), **call).latents for p in (reference, ours))
    assert distance(found, theirs) <= TOLERANCE * float(theirs.abs().max())


def test_adapters_of_the_text_encoder_have_their_scale_in_every_stage(made, tmp_path):
    """Which the reference forgets for masks and inversion: a fused adapter says what it would be."""
    _, folder = made["sd1"]
    scaled, fused = opened(folder), opened(folder)
    for pipe in (scaled, fused):
        pipe.load_lora_weights(write_lora(pipe, tmp_path / "style.safetensors"))
    fused.fuse_lora(lora_scale=0.3)
    for method, call in (
        ("generate_mask", dict(target_prompt=TARGET, source_prompt=SOURCE, output_type="heat")),
        ("invert", dict(prompt=SOURCE)),
    ):
        call |= dict(image=photo(), num_inference_steps=4)
        results = []
        for pipe, kwargs in ((scaled, {"scale": 0.3}), (fused, None), (scaled, None)):
            found = getattr(pipe, method)(**call, generator=seeded(), cross_attention_kwargs=kwargs)
            results.append(found if method == "generate_mask" else found.latents)
        assert distance(results[0], results[1]) <= TOLERANCE < 1e-2 < distance(results[0], results[2])


@pytest.mark.parametrize("method", ["generate_mask", "invert", "__call__", "encode_prompt"])
def test_signatures_begin_as_those_of_the_reference(method):
    theirs = inspect.signature(getattr(Reference, method)).parameters.values()
    ours = list(inspect.signature(getattr(StableDiffusionDiffEditPipeline, method)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert mine.name == other.name
        assert other.default in (mine.default, inspect.Parameter.empty)
    assert len(ours) >= len(theirs)
    assert all(extra.default is not inspect.Parameter.empty for extra in ours[len(theirs) :])
