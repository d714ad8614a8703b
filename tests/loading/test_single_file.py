"""Stable Diffusion in one file, in the names of the original code.

The files are written from the reference's weights by a rule of this test's own: closed formulas for the
numbers, where our tables count layers.
"""

import contextlib
import importlib
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import joyedit
from benchmarks.random_checkpoint import write_random_diffedit_checkpoint
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.command import info
from joyedit.command.cli import main
from joyedit.loading.single_file import read_single_file

LAYERS = 2  # in every level of these UNets and VAEs, as in the released ones

# Ten names as they stand in the published files, to hold the rule below to.
BY_HAND = {
    "unet": {
        "model.diffusion_model.time_embed.2.weight": "time_embedding.linear_2.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.0.bias": "down_blocks.0.resnets.0.norm1.bias",
        "model.diffusion_model.input_blocks.6.0.op.weight": "down_blocks.1.downsamplers.0.conv.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
        "model.diffusion_model.output_blocks.8.2.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight"
        ),
    },
    "vae": {
        "first_stage_model.encoder.down.2.downsample.conv.weight": (
            "encoder.down_blocks.2.downsamplers.0.conv.weight"
        ),
        "first_stage_model.decoder.up.3.block.0.norm1.weight": "decoder.up_blocks.0.resnets.0.norm1.weight",
        "first_stage_model.decoder.mid.attn_1.q.bias": "decoder.mid_block.attentions.0.to_q.bias",
    },
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_WORDS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}


def ldm_unet_name(name):
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, *words = name.split(".")
    if side == "mid_block":
        kind, j, *inside = words
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}"
    else:
        b, kind, j, *inside = words
        b, j, length = int(b), int(j), LAYERS + 1
        place = {
            ("down_blocks", "resnets"): f"input_blocks.{1 + b * length + j}.0",
            ("down_blocks", "attentions"): f"input_blocks.{1 + b * length + j}.1",
            ("down_blocks", "downsamplers"): f"input_blocks.{(b + 1) * length}.0",
            ("up_blocks", "resnets"): f"output_blocks.{b * length + j}.0",
            ("up_blocks", "attentions"): f"output_blocks.{b * length + j}.1",
            ("up_blocks", "upsamplers"): f"output_blocks.{b * length + LAYERS}.{1 if b == 0 else 2}",
        }[side, kind]
    if kind == "resnets":
        inside[0] = RESNET[inside[0]]
    if kind == "downsamplers":
        inside[0] = "op"
    return ".".join([place, *inside])


def ldm_vae_name(name, stages=4):
    for i in range(stages):
        name = name.replace(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.")
        name = name.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{stages - 1 - i}.")
    for ours, theirs in VAE_WORDS.items():
        name = name.replace(ours, theirs)
    return name


def ldm_vae_value(name, value):
    """The attention of the original is made of 1x1 convolutions."""
    inside = any(f".{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0"))
    return value[..., None, None] if inside else value


def clip_names(state):
    named = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in state.items()}
    positions = torch.arange(77)[None]
    return {**named, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def openclip_names(state, whole=True):
    """OpenCLIP's names, with a last layer that nothing uses and the ends of the whole model."""
    count = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    width = state["final_layer_norm.weight"].shape[0]
    made = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for i in range(count):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            for theirs, ours in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("attn.out_proj", "self_attn.out_proj"),
            ):
                made[f"{block}.{theirs}.{leaf}"] = state[f"{layer}.{ours}.{leaf}"]
            thirds = [state[f"{layer}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            made[f"{block}.attn.in_proj_{leaf}"] = torch.cat(thirds)
    if whole:
        last = f"transformer.resblocks.{count - 1}."
        after = {
            name.replace(last, f"transformer.resblocks.{count}."): value + 1
            for name, value in made.items()
            if name.startswith(last)
        }
        ends = {"text_projection": torch.eye(width), "logit_scale": torch.tensor(4.6)}
        made = {**made, **after, **ends}
    return {f"cond_stage_model.model.{name}": value for name, value in made.items()}


def ldm_state(states, text, prefix="first_stage_model."):
    unet = {f"model.diffusion_model.{ldm_unet_name(n)}": value for n, value in states["unet"].items()}
    vae = {f"{prefix}{ldm_vae_name(n)}": ldm_vae_value(n, value) for n, value in states["vae"].items()}
    return {**unet, **vae, **text(states["text_encoder"])}


def left_behind(unet):
    """What the training adds to a file; `unet`: the names in it, whose average is also there."""
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value * 2 for name, value in unet.items()
    }
    schedule = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar")
    rest = {name: torch.zeros(1000) for name in schedule}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    return {**averaged, **rest, **counts}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    write_random_diffedit_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return joyedit.CLIPTokenizer.from_pretrained(tiny, subfolder="tokenizer")


@pytest.fixture(scope="module")
def single_files(tmp_path_factory, sd_states):
    """Both releases as one file: 1.x with what the training left in it."""
    root = tmp_path_factory.mktemp("single")
    first = ldm_state(sd_states[1], clip_names)
    first |= left_behind({name: v for name, v in first.items() if name.startswith("model.")})
    second = ldm_state(sd_states[2], openclip_names)
    save_file({name: value.contiguous() for name, value in first.items()}, root / "first.safetensors")
    save_file({name: value.contiguous() for name, value in second.items()}, root / "second.safetensors")
    return root


def assert_same(pipe, states):
    for part, state in states.items():
        found = getattr(pipe, part).state_dict()
        state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
        assert found.keys() == state.keys(), part
        assert all(torch.equal(found[name], state[name]) for name in state), part


def assert_close(found, wanted):
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_rule_of_this_test_gives_the_names_that_are_known(sd_states):
    for part, name_of in (("unet", ldm_unet_name), ("vae", ldm_vae_name)):
        prefix = "model.diffusion_model." if part == "unet" else "first_stage_model."
        named = {prefix + name_of(name): name for name in sd_states[1][part]}
        assert len(named) == len(sd_states[1][part])
        assert BY_HAND[part].items() <= named.items()


def test_the_reference_reads_the_files_of_this_test(sd_states):
    from diffusers.loaders import single_file_utils as theirs

    for release in (1, 2):
        whole = ldm_state(sd_states[release], clip_names)
        unet = {"layers_per_block": LAYERS, "class_embed_type": None, "addition_embed_type": None}
        unet |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
        found = theirs.convert_ldm_unet_checkpoint(dict(whole), unet)
        assert found.keys() == sd_states[release]["unet"].keys()
        vae = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        assert theirs.convert_ldm_vae_checkpoint(whole, vae).keys() == sd_states[release]["vae"].keys()


@pytest.mark.parametrize("release", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_single_file_gives_the_same_networks(single_files, sd_states, sd_reference, tokenizer, release):
    path = single_files / {1: "first.safetensors", 2: "second.safetensors"}[release]
    pipe = joyedit.load(path, device="cpu", tokenizer=tokenizer)
    assert type(pipe) is joyedit.StableDiffusionDiffEditPipeline
    assert_same(pipe, sd_states[release])
    assert pipe.safety_checker is None and pipe.requires_safety_checker is False
    assert pipe.vae.config.scaling_factor == 0.18215
    models = sd_reference[release]
    for part in ("unet", "vae"):
        config = getattr(pipe, part).config
        theirs = type(config).from_dict(json.loads(models[part].to_json_string()))
        if part == "unet":  # the number of heads may be one for all levels
            assert config.per_level("attention_head_dim") == theirs.per_level("attention_head_dim")
            theirs = theirs.replace(attention_head_dim=config.attention_head_dim)
        assert config == theirs
    torch.manual_seed(5)
    ids = torch.randint(0, 548, (2, 77))
    wanted = models["text_encoder"](ids).last_hidden_state
    assert_close(pipe.text_encoder.encode(ids), wanted)
    latents = torch.randn(2, 4, 9, 7)
    eps = models["unet"](latents, 301, wanted).sample
    assert_close(pipe.unet(latents, 301, wanted).sample, eps)
    decoded = models["vae"].decode(latents[:1]).sample
    assert_close(pipe.vae.decode(latents[:1]).sample, decoded)


def test_the_schedule_is_the_released_one(single_files, tokenizer):
    pipe = joyedit.load(single_files / "first.safetensors", device="cpu", tokenizer=tokenizer)
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert not config.clip_sample and not config.set_alpha_to_one and config.steps_offset == 1
    assert pipe.inverse_scheduler.config.prediction_type == config.prediction_type == "epsilon"
    pipe.scheduler.set_timesteps(50)
    assert pipe.scheduler.timesteps[:2].tolist() == [981, 961]


def guessed(path, tokenizer, caplog, **options):
    caplog.clear()
    pipe = joyedit.load(path, device="cpu", tokenizer=tokenizer, **options)
    return pipe.scheduler.config.prediction_type, pipe.unet.config.sample_size, caplog.text


@pytest.mark.slow
def test_prediction_type_is_told_or_guessed_aloud(single_files, sd_states, tokenizer, caplog, tmp_path):
    first, second = single_files / "first.safetensors", single_files / "second.safetensors"
    assert guessed(first, tokenizer, caplog)[0] == "epsilon" and "is assumed" not in caplog.text
    assert guessed(first, tokenizer, caplog, prediction_type="v_prediction")[0] == "v_prediction"
    kind, size, said = guessed(second, tokenizer, caplog)
    assert (kind, size) == ("v_prediction", 96)
    assert "second.safetensors does not say what it predicts: v_prediction is assumed" in said
    assert "pass prediction_type='epsilon'" in said
    kind, size, said = guessed(second, tokenizer, caplog, prediction_type="epsilon")
    assert (kind, size) == ("epsilon", 64) and "is assumed" not in said

    state = ldm_state(sd_states[2], openclip_names)
    save_file({**state, "global_step": torch.tensor(875_000)}, tmp_path / "base.safetensors")
    torch.save({"state_dict": state, "global_step": 875_000}, tmp_path / "base.ckpt")
    torch.save({"state_dict": state, "global_step": 220_000}, tmp_path / "other.ckpt")
    for name, wanted in (
        ("base.safetensors", "epsilon"),
        ("base.ckpt", "epsilon"),
        ("other.ckpt", "v_predi"),
    ):
        kind, _, said = guessed(tmp_path / name, tokenizer, caplog)
        assert kind.startswith(wanted) and f"{kind} is assumed" in said
    assert "875000 steps" in guessed(tmp_path / "base.ckpt", tokenizer, caplog)[2]


@contextlib.contextmanager
def pretended_lightning():
    """The module whose class the published pickles name; it is not installed."""
    names = (
        "pytorch_lightning",
        "pytorch_lightning.callbacks",
        "pytorch_lightning.callbacks.model_checkpoint",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
        patch.setattr(sys.modules[names[-1]], "ModelCheckpoint", callback, raising=False)
        yield callback


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpoints_as_the_training_wrote_them(sd_states, tokenizer, tmp_path, legacy):
    with pretended_lightning() as callback:
        whole = {
            "state_dict": ldm_state(sd_states[1], clip_names),
            "epoch": 3,
            "global_step": 470_000,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {callback: {"best_model_score": torch.tensor(0.1), "dirpath": "."}},
        }
        torch.save(whole, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=not legacy)
    assert_same(joyedit.load(tmp_path / "sd.ckpt", device="cpu", tokenizer=tokenizer), sd_states[1])


class Trap:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_a_pickle_that_would_run_code_is_refused(sd_states, tokenizer, tmp_path, capsys):
    torch.save({"state_dict": ldm_state(sd_states[1], clip_names), "trap": Trap()}, tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match="sd.ckpt cannot be opened as weights only"):
        joyedit.load(tmp_path / "sd.ckpt", device="cpu", tokenizer=tokenizer)
    assert capsys.readouterr().out == ""


def test_averaged_weights_are_left_out_unless_asked_for(single_files, sd_states, tokenizer, caplog):
    first = single_files / "first.safetensors"
    with caplog.at_level("INFO", logger="joyedit"):
        joyedit.load(first, device="cpu", tokenizer=tokenizer)
    assert f"{len(sd_states[1]['unet']) + 2} (model_ema." in caplog.text and "ema=True" in caplog.text
    assert "the noise schedule" in caplog.text
    averaged = joyedit.load(first, device="cpu", tokenizer=tokenizer, ema=True)
    doubled = {name: value * 2 for name, value in sd_states[1]["unet"].items()}
    assert_same(averaged, {**sd_states[1], "unet": doubled})
    with pytest.raises(ValueError, match="ema=True: 684 of 684 averaged tensors missing"):
        joyedit.load(single_files / "second.safetensors", device="cpu", tokenizer=tokenizer, ema=True)


def test_other_spellings_of_a_text_encoder_and_a_vae(sd_states, tokenizer, tmp_path):
    """Without a level of the names; OpenCLIP that ends where 2.x does; ComfyUI's prefix of the VAE."""

    def without_level(state):
        return {n.replace("text_model.", ""): v for n, v in clip_names(state).items()}

    def cut(state):
        return openclip_names(state, whole=False)

    for release, text in ((1, without_level), (2, cut)):
        save_file(ldm_state(sd_states[release], text, "vae."), tmp_path / "a.safetensors")
        pipe = joyedit.load(tmp_path / "a.safetensors", device="cpu", tokenizer=tokenizer)
        assert_same(pipe, sd_states[release])


def test_parts_of_a_single_file_for_another_checkpoint(single_files, sd_states, tokenizer, tiny):
    first = single_files / "first.safetensors"
    pipe = joyedit.load(tiny, device="cpu", vae=first, dtype="float32")
    assert_same(pipe, {"vae": sd_states[1]["vae"]})
    vae = joyedit.AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    pipe = joyedit.load(first, device="cpu", tokenizer=tiny, vae=vae)
    assert pipe.vae is vae and pipe.tokenizer.encode("a bowl") == tokenizer.encode("a bowl")


def changed(name, value):
    return lambda state: {**state, name: value}


def without(start):
    return lambda state: {name: value for name, value in state.items() if not name.startswith(start)}


UNET = "model.diffusion_model."
BROKEN = {
    "inpainting": (
        changed(f"{UNET}input_blocks.0.0.weight", torch.zeros(32, 9, 3, 3)),
        "in_channels=9: this is an inpainting UNet",
    ),
    "depth": (changed(f"{UNET}input_blocks.0.0.weight", torch.zeros(32, 5, 3, 3)), "a depth UNet"),
    "unclip": (changed(f"{UNET}label_emb.0.0.weight", torch.zeros(2, 2)), "this is a unCLIP UNet"),
    "strange": (
        changed(f"{UNET}input_blocks.1.0.extra.weight", torch.zeros(1)),
        "0 of 684 tensors missing, 1 unknown",
    ),
    "unet": (without(f"{UNET}out.2"), "lacks a tensor of Stable Diffusion: 'out.2.weight'"),
    "attention": (without(f"{UNET}middle_block.1.norm"), "closest layout 'ldm': 2 of 684 tensors missing"),
    "vae": (without("first_stage_model.decoder.mid"), "AutoencoderKL: closest layout 'ldm'"),
    "no vae": (without("first_stage_model."), "holds no vae: pass vae="),
    "no text": (without("cond_stage_model."), "no text_encoder: pass text_encoder=.*stable-diffusion-v1-5"),
}


QUICK = ("inpainting", "unclip", "strange", "unet", "vae", "no text")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in BROKEN]
)
def test_files_that_do_not_serve_are_refused(sd_states, tokenizer, tmp_path, case):
    change, message = BROKEN[case]
    save_file(change(ldm_state(sd_states[1], clip_names)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        joyedit.load(tmp_path / "a.safetensors", device="cpu", tokenizer=tokenizer)
    assert "a.safetensors" in str(raised.value)


def test_an_sdxl_file_is_refused_by_name(tmp_path):
    attention = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    state = {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3),
        f"{UNET}label_emb.0.0.weight": torch.zeros(1, 1),
        attention: torch.zeros(1, 2048),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
    }
    save_file(state, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="xl.safetensors: this is a SDXL UNet; only text-to-image"):
        joyedit.load(tmp_path / "xl.safetensors", device="cpu")


def test_what_must_be_given_or_must_not(single_files, tiny, tokenizer, monkeypatch):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "__getitem__", read)
    first, second = single_files / "first.safetensors", single_files / "second.safetensors"
    with pytest.raises(ValueError, match="holds no tokenizer: pass tokenizer=.*stable-diffusion-v1-5"):
        joyedit.load(first, device="cpu")
    with pytest.raises(ValueError, match="holds no tokenizer: pass tokenizer=.*stable-diffusion-2-1"):
        joyedit.load(second, device="cpu")
    with pytest.raises(ValueError, match="prediction_type and ema are for single files"):
        joyedit.load(tiny, device="cpu", prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type and ema are for single files"):
        joyedit.load(tiny, device="cpu", ema=True)
    scheduler = joyedit.DDIMScheduler()
    with pytest.raises(ValueError, match="prediction_type= or scheduler="):
        joyedit.load(first, tokenizer=tokenizer, scheduler=scheduler, prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='noise' is not supported"):
        joyedit.load(first, tokenizer=tokenizer, prediction_type="noise")
    with pytest.raises(ValueError, match="is of a StableDiffusionDiffEditPipeline"):
        joyedit.load(first, tokenizer=tokenizer, pipeline="JoyImageEditPipeline")
    with pytest.raises(TypeError, match="has the parts vae, text_encoder"):
        joyedit.load(first, transformer=None)


def test_a_tokenizer_of_1x_beside_2x_is_noticed(single_files, tokenizer, caplog):
    joyedit.load(single_files / "second.safetensors", device="cpu", tokenizer=tokenizer)
    assert "pads with '<|endoftext|>'; 2.x was trained with '!'" in caplog.text


def test_info_about_a_single_file(single_files, sd_states, monkeypatch):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "__getitem__", read)
    found = info.describe(str(single_files / "second.safetensors"))
    assert (found.layout, found.pipeline) == ("ldm", "StableDiffusionDiffEditPipeline")
    for part in ("unet", "vae"):
        assert found.parts[part].parameters == sum(value.numel() for value in sd_states[2][part].values())
    assert found.parts["unet"].config["cross_attention_dim"] == 128
    assert any("attention_head_dim=[1, 1, 2, 2]" in line for line in found.lines())


def test_convert_writes_a_folder_of_a_single_file(single_files, sd_states, tiny, tmp_path, capsys):
    arguments = ["convert", str(single_files / "first.safetensors"), str(tmp_path / "sd")]
    assert main([*arguments, "--part", f"tokenizer={tiny}"]) == 0
    assert_same(joyedit.load(tmp_path / "sd", device="cpu"), sd_states[1])
    assert main(["convert", str(tiny), str(tmp_path / "b"), "--to", "original"]) == 1
    assert "Stable Diffusion is written as 'diffusers' only" in capsys.readouterr().err


RELEASES = ("stable-diffusion-v1-5", "stable-diffusion-2-1", "stable-diffusion-2-1-base")


@pytest.mark.parametrize(
    "name", [RELEASES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in RELEASES[1:])]
)
def test_single_files_at_their_own_size(shared_data, sd_released, write_zeros, tmp_path, name):
    """The settings read from the shapes are the published ones; every tensor has its place."""
    networks = sd_released(name)
    text = clip_names if "v1-5" in name else openclip_names
    if "v1-5" not in name:
        networks["text_encoder"] = {key: value.clone() for key, value in networks["text_encoder"].items()}
    state = ldm_state(networks, text)
    write_zeros(tmp_path / "sd.safetensors", state)
    found = read_single_file(tmp_path / "sd.safetensors")
    assert found.release == (1 if "v1-5" in name else 2)
    for part, (kind, config, files) in found.networks.items():
        raw = json.loads((shared_data / name / part / "config.json").read_text())
        wanted = kind.Config.from_dict(raw)
        names = [n for n in config if n in raw and n not in ("sample_size", "upcast_attention")]
        names = [n for n in names if not n.startswith("_") and n != "torch_dtype"]
        assert {n: config[n] for n in names} == {n: wanted[n] for n in names}
        with torch.device("meta"):
            network = kind(config)
        sizes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        plan = importlib.import_module("joyedit.convert.table").plan_conversion(
            network.layouts(), files.shapes, sizes
        )
        assert len(plan.steps) == len(networks[part])
