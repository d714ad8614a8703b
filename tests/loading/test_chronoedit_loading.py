"""ChronoEdit folders and files as they are published, and what the reference opens of ours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import joyedit
from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.command import info
from joyedit.loading import layouts
from joyedit.pipelines.chronoedit_presets import PRESETS

PARTS = "image_encoder image_processor scheduler text_encoder tokenizer transformer vae".split()
STEMS = {
    "image_encoder": "model",
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
LORA = "lora/chronoedit_distill_lora.safetensors"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as published: without the VAE's scale factors, which WAN's config does not have."""
    folder = tmp_path_factory.mktemp("tiny") / "chronoedit"
    write_random_chronoedit_checkpoint(folder)
    edit_json(folder / "vae" / "config.json", scale_factor_temporal="drop", scale_factor_spatial="drop")
    return folder


@pytest.fixture(scope="module")
def states(tiny):
    """Part -> its tensors in our names."""
    return {
        part: {
            name.removeprefix("vision_model."): value
            for file in sorted((tiny / part).glob("*.safetensors"))
            for name, value in load_file(file).items()
            if name != "visual_projection.weight"
        }
        for part in STEMS
    }


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "chronoedit")
    return tmp_path / "chronoedit"


@pytest.fixture
def no_tensors(monkeypatch):
    """Reading a tensor is a failure: what is refused is refused before memory is taken."""

    def read(self, name):
        if self.files:
            raise AssertionError(f"{name} was read")
        return self._where[name](once=True)  # from memory

    pieces = TensorFiles.pieces
    monkeypatch.setattr(TensorFiles, "__getitem__", read)
    monkeypatch.setattr(TensorFiles, "read_once", read)
    monkeypatch.setattr(
        TensorFiles, "pieces", lambda self, n: read(self, n) if self.files else pieces(self, n)
    )


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "drop"}))


def assert_same(network, state, dtype=torch.float32):
    found = network.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        kept = torch.float32 if network.stays_fp32(name) else dtype
        assert found[name].dtype is kept and torch.equal(found[name], value.to(kept)), name


def film(pipe, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 48, **options}
    return np.asarray(pipe(PHOTO, "a cat", generator=torch.manual_seed(0), num_frames=5, **options).frames)


# The whole folder.


def test_the_published_folder_opens_although_it_names_other_classes(tiny, states):
    index = json.loads((tiny / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert (
        index["transformer"][1] == "WanTransformer3DModel" and index["image_processor"][1] == "CLIPProcessor"
    )
    assert len(list((tiny / "transformer").glob("*.safetensors"))) == 2
    config = json.loads((tiny / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel" and "rope_temporal_skip_len" not in config
    direct = joyedit.ChronoEditPipeline.from_pretrained(tiny)
    for pipe in (joyedit.load(tiny, device="cpu"), direct):
        assert type(pipe) is joyedit.ChronoEditPipeline and pipe.preset is None
        assert type(pipe.image_encoder) is joyedit.CLIPVisionModel
        assert type(pipe.scheduler) is joyedit.UniPCMultistepScheduler
        assert pipe.scheduler.config.flow_shift == 5.0 and pipe.scheduler.config.use_flow_sigmas
        assert pipe.image_processor.config.crop_size == (56, 56)
        assert pipe.transformer.config.rope_temporal_skip_len == 8
        assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (4, 8)
        for part, state in states.items():
            assert_same(getattr(pipe, part), state)
    assert layouts.pipeline_name(tiny) == "ChronoEditPipeline"


def test_a_folder_that_names_the_classes_of_chronoedit(folder, states):
    edit_json(
        folder / "model_index.json",
        _class_name="ChronoEditPipeline",
        transformer=["diffusers", "ChronoEditTransformer3DModel"],
        image_encoder=["transformers", "CLIPVisionModel"],
        image_processor=["transformers", "CLIPImageProcessor"],
        tokenizer=["transformers", "T5Tokenizer"],
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
    )
    joyedit.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    pipe = joyedit.load(folder, device="cpu")
    assert (
        type(pipe.scheduler) is joyedit.FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 3
    )
    assert_same(pipe.transformer, states["transformer"])


def test_a_clip_processor_folder_may_hold_its_tokenizer(folder):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / "image_processor" / name).write_text("{}")
    edit_json(folder / "image_processor" / "preprocessor_config.json", processor_class="CLIPProcessor")
    assert joyedit.load(folder, device="cpu").image_processor.config.size == 56


def test_what_we_save_opens_equal_here_and_in_the_reference(tiny, tmp_path):
    import diffusers

    pipe = joyedit.load(tiny, device="cpu")
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "ChronoEditPipeline"
    assert index["transformer"] == ["diffusers", "ChronoEditTransformer3DModel"]
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    again = joyedit.load(tmp_path / "saved", device="cpu")
    for part in STEMS:
        assert_same(getattr(again, part), getattr(pipe, part).state_dict())
    wanted = film(pipe)
    assert np.array_equal(film(again), wanted)
    theirs = diffusers.ChronoEditPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    assert abs(film(theirs) - wanted).max() < 2e-5


def test_the_random_checkpoint(tiny, tmp_path):
    torch.manual_seed(5)
    made = tmp_path / "made"
    write_random_chronoedit_checkpoint(made)
    sizes = [file.stat().st_size for file in made.rglob("*") if file.is_file()]
    assert sum(sizes) < 5e6 and layouts.pipeline_name(made) == "ChronoEditPipeline"
    for shard in ("diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002"):
        first, second = ((f / "transformer" / f"{shard}.safetensors").read_bytes() for f in (tiny, made))
        assert first == second  # seeded, whatever was drawn before
    pipe = joyedit.load(made, device="cpu", preset="distill")
    ids = pipe.tokenizer("a photo 日本", padding="max_length", max_length=12, truncation=True).input_ids
    names = {
        token: pipe.tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>", "<s>", "<unk>")
    }
    assert list(names.values()) == [0, 1, 2, 3] and ids.count(1) == 1 and 3 not in ids
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True) == "a photo 日本"
    assert pipe.tokenizer.encode("") == [1] and film(pipe).shape == (1, 5, 32, 48, 3)


def test_their_tokenizer_reads_that_of_the_tiny_checkpoint(tiny):
    import transformers

    ours = joyedit.T5TokenizerFast.from_pretrained(tiny, subfolder="tokenizer")
    theirs = transformers.T5TokenizerFast.from_pretrained(tiny, subfolder="tokenizer")
    for text in ("", "a photo of a cat", "turn it into a pear, 4K!", "it is an edit"):
        assert theirs(text).input_ids == ours.encode(text)


# Types.


def test_auto_keeps_vae_and_vision_tower_in_fp32(tiny, states, monkeypatch):
    assert {value.dtype for value in states["image_encoder"].values()} == {torch.bfloat16}
    monkeypatch.setattr(
        "joyedit.checkpoints.network.AUTO_BF16_BYTES", 100_000
    )  # that of the transformer and of UMT5
    for pipe in (joyedit.load(tiny, device="cpu"), joyedit.ChronoEditPipeline.from_pretrained(tiny)):
        assert_same(pipe.transformer, states["transformer"], torch.bfloat16)
        assert_same(pipe.text_encoder, states["text_encoder"], torch.bfloat16)
        assert_same(pipe.image_encoder, states["image_encoder"], torch.float32)
        assert_same(pipe.vae, states["vae"], torch.float32)
        islands = {name for name, p in pipe.transformer.named_parameters() if p.dtype is torch.float32}
        assert len(islands) == 3 * 3 + 4 + 1 + 4  # tables and norm2 of blocks, time, last table, image norms
    asked = joyedit.load(tiny, device="cpu", dtype="bf16")
    assert asked.vae.dtype is asked.image_encoder.dtype is torch.bfloat16
    by_path = joyedit.load(tiny, device="cpu", image_encoder=tiny)
    assert by_path.image_encoder.dtype is torch.float32


def test_the_recipe_of_the_documentation(tiny, states):
    """Parts that are passed in keep their dtype; the others get that of the call."""
    image_encoder = joyedit.CLIPVisionModel.from_pretrained(
        tiny, subfolder="image_encoder", torch_dtype=torch.float32
    )
    vae = joyedit.AutoencoderKLWan.from_pretrained(tiny, subfolder="vae", torch_dtype=torch.float32)
    transformer = joyedit.ChronoEditTransformer3DModel.from_pretrained(
        tiny, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    pipe = joyedit.ChronoEditPipeline.from_pretrained(
        tiny,
        image_encoder=image_encoder,
        transformer=transformer,
        vae=vae,
        torch_dtype=torch.bfloat16,
    )
    assert pipe.vae is vae and pipe.image_encoder is image_encoder and pipe.transformer is transformer
    assert_same(pipe.vae, states["vae"], torch.float32)
    assert_same(pipe.image_encoder, states["image_encoder"], torch.float32)
    assert_same(pipe.transformer, states["transformer"], torch.bfloat16)
    assert_same(pipe.text_encoder, states["text_encoder"], torch.bfloat16)


# Parts alone.


def test_the_projection_is_dropped_with_a_reason(tiny):
    names = TensorFiles([tiny / "image_encoder" / "model.safetensors"]).shapes
    assert "visual_projection.weight" in names
    tower = joyedit.CLIPVisionModel.from_pretrained(tiny, subfolder="image_encoder")
    plans = [layout.plan(list(names)) for layout in tower.layouts()]
    reasons = [dropped for steps, dropped, unmatched in plans if not unmatched and dropped]
    assert {"visual_projection.weight": "the network ends before the projection"} in reasons
    whole = joyedit.CLIPVisionModelWithProjection.from_pretrained(tiny, subfolder="image_encoder")
    assert whole.visual_projection.weight.shape == (16, 32)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_umt5_under_either_name_of_its_table(folder, states, kept):
    state = dict(states["text_encoder"])
    state[kept] = state.pop("shared.weight")
    save_file(state, folder / "text_encoder" / "model.safetensors")
    encoder = joyedit.UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder")
    assert_same(encoder, states["text_encoder"])


def wan_name(part, name):
    """The name of a tensor in WAN's own files, written down apart from the key tables."""
    words = {
        "transformer": (
            ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
            ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
            ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
            ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
            ("condition_embedder.time_proj", "time_projection.1"),
            ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
            ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
            ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
            ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
            ("norm_added_k", "norm_k_img"),
            ("attn1", "self_attn"),
            ("attn2", "cross_attn"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("to_out.0", "o"),
            ("to_", ""),
            (".norm2", ".norm3"),
            ("ffn.net.0.proj", "ffn.0"),
            ("ffn.net.2", "ffn.2"),
            ("proj_out", "head.head"),
        ),
        "text_encoder": (
            ("shared", "token_embedding"),
            ("encoder.final_layer_norm", "norm"),
            ("encoder.block", "blocks"),
            ("layer.0.layer_norm", "norm1"),
            ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
            ("layer.0.SelfAttention", "attn"),
            ("layer.1.layer_norm", "norm2"),
            ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
            ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
            ("layer.1.DenseReluDense.wo", "ffn.fc2"),
        ),
    }
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in (*words[part], ("scale_shift_table", "modulation")):
        name = name.replace(ours, theirs)
    return name


def original_vae(state):
    network = joyedit.AutoencoderKLWan.from_config(base_dim=8, num_res_blocks=1)
    return next(layout for layout in network.layouts() if layout.name == "original").invert(state)


@pytest.fixture
def wan_files(tiny, states, tmp_path):
    """The parts as WAN's repositories have them, each with the config of its size beside it."""
    files = {}
    for part, name in (
        ("transformer", "wan_chronoedit.pth"),
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("vae", "Wan2.1_VAE.pth"),
    ):
        path = files[part] = tmp_path / "wan" / part / name
        path.parent.mkdir(parents=True)
        shutil.copy(tiny / part / "config.json", path.parent)
        state = states[part]
        named = original_vae(state) if part == "vae" else {wan_name(part, n): v for n, v in state.items()}
        torch.save(named, path)
    return files


def test_files_of_wan_open_as_parts(tiny, states, wan_files):
    pipe = joyedit.load(tiny, device="cpu", **wan_files)
    for part in wan_files:
        assert_same(getattr(pipe, part), states[part])
    assert "decoder.upsamples.0.residual.0.gamma" in original_vae(states["vae"])


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_comfyui_files_of_the_transformer(tiny, states, tmp_path, prefix):
    path = tmp_path / "chronoedit_14B.safetensors"
    named = {prefix + wan_name("transformer", name): value for name, value in states["transformer"].items()}
    save_file(named, path)
    shutil.copy(tiny / "transformer" / "config.json", tmp_path / "config.json")
    assert layouts.pipeline_name(path) == "ChronoEditPipeline"
    with pytest.raises(
        ValueError, match="holds no tokenizer and no text_encoder and no image_encoder and no"
    ):
        joyedit.load(path, device="cpu")
    given = dict.fromkeys(("tokenizer", "text_encoder", "image_encoder", "image_processor", "vae"), tiny)
    pipe = joyedit.load(path, device="cpu", **given)
    assert_same(pipe.transformer, states["transformer"])
    published = joyedit.load(tiny, device="cpu")
    assert pipe.scheduler.config.to_dict() == published.scheduler.config.to_dict()
    latents = [film(one, output_type="latent") for one in (pipe, published)]
    assert np.array_equal(*latents)


def test_a_comfyui_folder(tiny, states, tmp_path):
    names = {
        "transformer": "diffusion_models/chronoedit.safetensors",
        "text_encoder": "text_encoders/umt5_xxl.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "image_encoder": "clip_vision/clip_vision_h.safetensors",
    }
    for part, name in names.items():
        path = tmp_path / name
        path.parent.mkdir()
        state = states[part]
        if part == "transformer":
            state = {wan_name(part, key): value for key, value in state.items()}
        elif part == "vae":
            state = original_vae(state)
        elif part == "image_encoder":
            state = load_file(tiny / part / "model.safetensors")
        save_file(state, path)
        shutil.copy(tiny / part / "config.json", path.parent)
    with pytest.raises(ValueError, match="holds no tokenizer: pass tokenizer=.*nvidia/ChronoEdit-14B"):
        joyedit.load(tmp_path, device="cpu")
    pipe = joyedit.load(tmp_path, device="cpu", tokenizer=tiny)
    for part, state in states.items():
        assert_same(getattr(pipe, part), state)
    assert pipe.image_processor.config.size == 224
    shown = info.describe(str(tmp_path))
    assert shown.pipeline == "ChronoEditPipeline" and set(shown.parts) == set(names)
    with pytest.raises(ValueError, match="ChronoEdit is written as 'diffusers' only"):
        layouts.save_checkpoint(pipe, tmp_path / "out", "comfyui")


def test_lone_files_are_told_apart(tiny, tmp_path):
    other = tmp_path / "joy.safetensors"
    save_file({"double_blocks.0.weight": torch.zeros(1)}, other)
    assert layouts.pipeline_name(other) == "JoyImageEditPipeline"
    with pytest.raises(ValueError, match=r"is an adapter of WAN \(ChronoEdit\): load a checkpoint, then"):
        joyedit.load(tiny / LORA, device="cpu")


# Presets.


def test_the_distillation_preset(tiny, states):
    pipe = joyedit.load(tiny, device="cpu", preset="distill")
    fused = pipe.transformer.state_dict()
    changed = {name for name, value in states["transformer"].items() if not torch.equal(fused[name], value)}
    linear = {name for name, value in fused.items() if name.startswith("blocks.") and value.ndim == 2}
    assert changed == linear and len(linear) == 3 * 12
    keys = load_file(tiny / LORA)
    for layer in ("self_attn.q", "self_attn.o", "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"):
        assert f"diffusion_model.blocks.2.{layer}.lora_B.weight" in keys
    assert pipe.preset == "distill" and pipe.scheduler.config.flow_shift == 2.0
    by_hand = joyedit.load(tiny, device="cpu")
    recipe = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "latent"}
    plain = film(by_hand, **recipe)
    by_hand.load_lora_weights(tiny / LORA)
    by_hand.fuse_lora(lora_scale=1.0)
    by_hand.scheduler = joyedit.UniPCMultistepScheduler.from_config(by_hand.scheduler.config, flow_shift=2.0)
    wanted = film(by_hand, **recipe)
    shape = {"height": 32, "width": 48, "output_type": "latent"}
    found = pipe(PHOTO, "a cat", generator=torch.manual_seed(0), **shape).frames
    assert np.array_equal(found, wanted) and not np.array_equal(plain, wanted)


def test_a_preset_leaves_the_other_adapters_as_they_were(tiny, monkeypatch):
    pipe = joyedit.load(tiny, device="cpu")
    pipe.load_lora_weights(tiny / LORA, "style")
    pipe.set_adapters("style", 0.5)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(joyedit.lora.AdapterState, "fuse", lambda *_: (_ for _ in ()).throw(MemoryError))
        pipe.use_preset("distill", lora=tiny / LORA)
    assert pipe.preset is None and pipe.get_list_adapters() == {"transformer": ["style"]}
    assert pipe.adapters.active_weights["style"]["transformer"] == 0.5
    pipe.use_preset("distill", lora=tiny / LORA)
    assert pipe.get_active_adapters() == ["style", "distill"] and pipe.adapters.fused_loras == {"distill"}
    weights = pipe.adapters.active_weights
    assert (weights["style"]["transformer"], weights["distill"]["transformer"]) == (0.5, 1.0)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert not torch.equal(layer.weight, layer._parameters["weight"])  # the other one still runs


def test_distilled_weights_are_known_as_long_as_they_are_there(tiny, tmp_path, caplog):
    def warnings(pipe, **options):
        caplog.clear()
        film(pipe, **options)
        return [message for message in caplog.messages if "distilled" in message]

    recipe = {"num_inference_steps": 8, "guidance_scale": 1.0}
    pipe = joyedit.load(tiny, device="cpu", preset="distill")
    pipe.unload_lora_weights()  # but it is fused
    assert not warnings(pipe, **recipe)
    (message,) = warnings(pipe, num_inference_steps=2, guidance_scale=1.0)
    assert message.endswith("here there is num_inference_steps=2")
    shutil.copy(tiny / LORA, tmp_path / "brush.safetensors")
    pipe = joyedit.load(tiny, device="cpu")
    for forget in (pipe.unload_lora_weights, lambda: pipe.adapters.delete_adapters("default_0")):
        pipe.load_lora_weights(tiny / LORA)
        assert warnings(pipe)
        forget()
        pipe.load_lora_weights(tmp_path / "brush.safetensors")
        assert pipe.get_active_adapters() == ["default_0"] and not warnings(pipe)
        pipe.unload_lora_weights()
    pipe.load_lora_weights(tiny / LORA)
    pipe.unload_lora_weights()
    joyedit.ChronoEditPipeline(**pipe.components).load_lora_weights(tmp_path / "brush.safetensors")
    assert pipe.get_active_adapters() == ["default_0"] and not warnings(pipe)


def test_presets_that_there_are_not(tiny, folder, no_tensors):
    with pytest.raises(ValueError, match="preset='turbo': known are .*distill"):
        joyedit.load(tiny, device="cpu", preset="turbo")
    shutil.rmtree(folder / "lora")
    with pytest.raises(FileNotFoundError, match=rf"has no {LORA}; load without a preset, then call pipe.use"):
        joyedit.load(folder, device="cpu", preset="distill")
    with pytest.raises(ValueError, match="preset='distill': a JoyImageEditPipeline has no presets"):
        joyedit.load("tiny-joyimage", device="cpu", preset="distill")


def test_presets_of_other_adapters(tiny, folder):
    """Each is a file of its own in lora/; paintbrush takes the distilled one too."""
    brush, upscaler = PRESETS["paintbrush"].adapters[1], PRESETS["upscale"].adapters[0]
    for name, adapter in (("paintbrush", brush), ("upscale", upscaler)):
        message = f"has no {adapter.file}, published as {adapter.repository}; load without a preset"
        with pytest.raises(FileNotFoundError, match=message):
            joyedit.load(folder, device="cpu", preset=name)
        shutil.copy(folder / LORA, folder / adapter.file)
        pipe = joyedit.load(folder, device="cpu", preset=name)
        assert pipe.adapters.fused_loras == {own.name for own in PRESETS[name].adapters}
        assert (pipe.preset, pipe.scheduler.config.flow_shift) == (name, PRESETS[name].flow_shift)
    assert set(info.describe(str(folder)).presets) == {"distill", "upscale", "paintbrush"}


def test_an_adapter_may_have_a_repository_of_its_own(tiny, tmp_path, monkeypatch):
    upscaler = PRESETS["upscale"].adapters[0]
    (tmp_path / "own").mkdir()
    shutil.copy(tiny / LORA, tmp_path / "own" / Path(upscaler.file).name)
    asked = []

    class Hub(layouts.Origin):
        """Both repositories, by the folders that stand for them."""

        @property
        def _path(self):
            asked.append(self.name)
            return {"org/chrono": tiny, upscaler.repository: tmp_path / "own"}.get(self.name, Path("none"))

        is_local = False

    monkeypatch.setattr(layouts, "Origin", Hub)
    pipe = joyedit.load("org/chrono", device="cpu", preset="upscale")
    assert pipe.adapters.fused_loras == {"upscale"} and upscaler.repository in asked


def test_a_presets_adapter_comes_with_the_same_revision(tiny, monkeypatch):
    """Of a Hub repository it is fetched like everything else, and before the weights."""
    fetched = []

    class Hub(layouts.Origin):
        def __init__(self, name, revision=None, **options):
            super().__init__(str(tiny) if name == "nvidia/ChronoEdit-14B-Diffusers" else name)
            fetched.append(revision)

        def fetch(self, files):
            fetched.append(list(files))
            return super().fetch(files)

    monkeypatch.setattr(layouts, "Origin", Hub)
    name = "nvidia/ChronoEdit-14B-Diffusers"
    pipe = joyedit.load(name, device="cpu", revision="v1", preset="distill")
    assert fetched[0] == "v1" and [LORA] in fetched and pipe.preset == "distill"
    assert fetched.index([LORA]) < min(i for i, f in enumerate(fetched) if "vae/config.json" in (f or ()))


# What is said and refused.


def test_info(tiny, tmp_path):
    shown = info.describe(str(tiny))
    assert shown.pipeline == "WanImageToVideoPipeline" and shown.layout == "diffusers"
    assert set(shown.parts) == set(PARTS) and shown.presets == {"distill": LORA}
    table = "\n".join(shown.lines())
    assert "opened as: ChronoEditPipeline" in table and f'presets: {{"distill": "{LORA}"}}' in table
    assert "flow_shift=5.0" in table and "image_dim=32" in table and "d_model=32" in table
    assert shown.parts["transformer"].parameters == 135_488 and shown.to_dict()["presets"]
    assert shown.bytes_as("bf16") < shown.bytes < shown.bytes_as(None)  # as fp32 the vision tower is larger
    shutil.copytree(tiny, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "lora")
    assert "presets" not in "\n".join(info.describe(str(tmp_path / "copy")).lines())


def test_info_about_single_files(tiny, wan_files):
    kinds = {"transformer": "ChronoEditTransformer3DModel", "text_encoder": "UMT5EncoderModel"}
    for part, kind in {**kinds, "vae": "AutoencoderKLWan"}.items():
        assert info.describe(str(wan_files[part])).parts[part].class_name == kind
    (adapter,) = info.describe(str(tiny / LORA)).parts.items()
    assert adapter[0] == "adapter" and adapter[1].class_name == "LoRA of WAN (ChronoEdit)"


@pytest.mark.parametrize(
    ("index", "transformer", "message"),
    [
        ({"_class_name": "WanPipeline"}, {}, "holds a WanPipeline: of WAN's models only image-to-video of"),
        ({"_class_name": "WanVACEPipeline"}, {}, "holds a WanVACEPipeline: of WAN's models only"),
        ({"image_encoder": [None, None]}, {}, "lists no 'image_encoder'"),
        ({}, {"in_channels": 16}, "in_channels=16, but the other parts make 36"),
        ({}, {"image_dim": None, "added_kv_proj_dim": None}, "image_dim=None, but the other parts make 32"),
        ({}, {"text_dim": 16}, "text_dim=16, but the other parts make 32"),
        ({}, {"pos_embed_seq_len": 514}, "pos_embed_seq_len=514 is not supported"),
        ({}, {"attention_head_dim": 28}, "attention_head_dim=28 must be a multiple of 6"),
        (
            {"transformer": ["diffusers", "WanVACETransformer3DModel"]},
            {},
            "transformer is a WanVACETransformer",
        ),
    ],
    ids=str,
)
def test_models_of_another_form(folder, no_tensors, index, transformer, message):
    """Text-to-video, first and last frame, WAN 2.2, VACE: refused before a tensor is read."""
    edit_json(folder / "model_index.json", **index)
    config = folder / "transformer" / "config.json"
    if {"in_channels", "image_dim", "text_dim"} & set(transformer):  # files that fit their config
        network = joyedit.ChronoEditTransformer3DModel.from_config(config, **transformer)
        network.save_pretrained(folder / "transformer")
    edit_json(config, **transformer)
    with pytest.raises(ValueError, match=message):
        joyedit.load(folder, device="cpu")
    if index.get("_class_name") is None:
        with pytest.raises(ValueError, match=message):
            joyedit.ChronoEditPipeline.from_pretrained(folder)


def shard(folder, number=2):
    return folder / "transformer" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"


def test_damaged_shards(folder, no_tensors):
    whole = shard(folder).read_bytes()
    for kept, message in (
        (len(whole) - 1, "was cut off or damaged"),
        (5, "is not a safetensors file, or was"),
    ):
        shard(folder).write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"00002-of-00002.safetensors {message}"):
            joyedit.load(folder, device="cpu")
    shard(folder).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.safetensors"):
        joyedit.load(folder, device="cpu")


def test_shards_that_do_not_fit(folder, no_tensors):
    state = load_file(shard(folder))
    name = "blocks.2.ffn.net.2.weight"
    save_file({**state, name: state[name][:, :-1].contiguous()}, shard(folder))
    with pytest.raises(ValueError, match=rf"{name} gives shape \(48, 95\) for {name}, wanted \(48, 96\)"):
        joyedit.load(folder, device="cpu")
    save_file({key: value for key, value in state.items() if key != name}, shard(folder))
    with pytest.raises(ValueError, match=rf"1 of 119 tensors missing \({name}\), 0 unknown"):
        joyedit.load(folder, device="cpu")
    save_file({**state, "blocks.2.ffn.gate": torch.zeros(1)}, shard(folder))
    with pytest.raises(ValueError, match=r"0 of 119 tensors missing, 1 unknown \(blocks.2.ffn.gate\)"):
        joyedit.load(folder, device="cpu")


def test_a_stray_norm_is_ignored(folder, states):
    state = load_file(shard(folder))
    save_file({**state, "blocks.2.attn2.norm_added_q.weight": torch.zeros(48)}, shard(folder))
    pipe = joyedit.ChronoEditTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert_same(pipe, states["transformer"])
