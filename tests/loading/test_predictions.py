"""What single files of Stable Diffusion say of what they predict, in every place where programs write it."""

import pytest
import torch
from safetensors.torch import save_file

import joyedit
from joyedit.loading.prediction import Prediction

EMPTY = torch.zeros(0)
V_YAML = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
EPS_YAML = "model:\n  params:\n    linear_start: 0.00085\n"


@pytest.fixture(scope="module")
def file_of(tmp_path_factory, sd_states):
    """A function: tensors to add, header, text of a yaml beside -> a single file of 1.x."""
    from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
    from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig

    states = sd_states[1]
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    kinds = {
        "unet": (
            UNet2DConditionModel,
            UNet2DConditionConfig(
                block_out_channels=(32, 32, 64, 64), attention_head_dim=8, cross_attention_dim=128
            ),
        ),
        "vae": (AutoencoderKL, AutoencoderKLConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=2)),
    }
    made = {}
    for part, (kind, config) in kinds.items():
        with torch.device("meta"):
            layouts = kind(config).layouts()
        ldm = next(layout for layout in layouts if layout.name == "ldm")
        made |= {f"{prefixes[part]}{name}": value for name, value in ldm.invert(states[part]).items()}
    text = states["text_encoder"]
    made |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}
    made = {name: value.half().contiguous().clone() for name, value in made.items()}
    count = iter(range(1000))

    def write(added=None, header=None, yaml=None):
        folder = tmp_path_factory.mktemp(f"file{next(count)}")
        save_file({**made, **(added or {})}, folder / "model.safetensors", header)
        if yaml is not None:
            (folder / "model.yaml").write_text(yaml)
        return folder / "model.safetensors"

    return write


@pytest.fixture(scope="module")
def tokenizer():
    return joyedit.load("tiny-diffedit", device="cpu").tokenizer


def config_of(file, tokenizer, **options):
    return joyedit.load(file, device="cpu", tokenizer=tokenizer, **options).scheduler.config


SAID = {
    "nothing": ({}, "epsilon", False),
    "mark": ({"added": {"v_pred": EMPTY}}, "v_prediction", False),
    "marks": ({"added": {"v_pred": EMPTY, "ztsnr": EMPTY}}, "v_prediction", True),
    "mark of the end alone": ({"added": {"ztsnr": EMPTY}}, "epsilon", False),
    "yaml": ({"yaml": V_YAML}, "v_prediction", False),
    "yaml without a word": ({"yaml": EPS_YAML}, "epsilon", False),
    "predict_key": ({"header": {"modelspec.predict_key": "v"}}, "v_prediction", False),
    "prediction_type": ({"header": {"modelspec.prediction_type": "v"}}, "v_prediction", False),
    "prediction_type of noise": ({"header": {"modelspec.prediction_type": "epsilon"}}, "epsilon", False),
    "sd-scripts": ({"header": {"ss_v_parameterization": "True"}}, "v_prediction", False),
    "sd-scripts, no signal": (
        {"header": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}},
        "v_prediction",
        True,
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_a_file_says(tmp_path, case):
    """As it is read; below it is heeded in whole files, which takes longer."""
    what, kind, zero_signal = SAID[case]
    state = {"x": torch.zeros(1), **what.get("added", {})}
    save_file(state, tmp_path / "a.safetensors", what.get("header"))
    if "yaml" in what:
        (tmp_path / "a.yaml").write_text(what["yaml"])
    found = Prediction.read(tmp_path / "a.safetensors", state)
    assert {*found.said.values()} <= {kind} and (found.said or kind == "epsilon")
    assert (found.zero_signal is not None) == (zero_signal or "end" in case)


QUICK = ("nothing", "marks", "yaml", "sd-scripts, no signal")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in SAID]
)
def test_what_the_file_says_is_heeded(file_of, tokenizer, case):
    what, kind, zero_signal = SAID[case]
    config = config_of(file_of(**what), tokenizer)
    assert (config.prediction_type, config.rescale_betas_zero_snr) == (kind, zero_signal)


def test_what_is_passed_wins_and_contradictions_are_named(file_of, tokenizer):
    file = file_of({"v_pred": EMPTY, "ztsnr": EMPTY}, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(
        ValueError, match=r"v_pred says v_prediction; modelspec.prediction_type in its header"
    ):
        config_of(file, tokenizer)
    given = config_of(file, tokenizer, prediction_type="v_prediction")
    assert given.prediction_type == "v_prediction" and given.rescale_betas_zero_snr
    given = config_of(file, tokenizer, prediction_type="epsilon")
    assert given.prediction_type == "epsilon" and not given.rescale_betas_zero_snr


def test_unknown_words_are_named(file_of, tokenizer):
    with pytest.raises(ValueError, match="predict_key in its header is 'rf'"):
        config_of(file_of(header={"modelspec.predict_key": "rf"}), tokenizer)


def test_tensors_of_other_programs_are_left_out_aloud(file_of, tokenizer, caplog):
    added = {"control_model.a.weight": torch.zeros(1), "watermark": torch.zeros(2)}
    pipe = joyedit.load(file_of(added), device="cpu", tokenizer=tokenizer)
    (line,) = [r.message for r in caplog.records if r.levelname == "WARNING" and "no known" in r.message]
    assert "2 tensors" in line and "control_model.a.weight" in line and "watermark" in line
    assert pipe.unet.config.in_channels == 4


def test_the_header_of_a_pickle_is_not_looked_for(tmp_path):
    torch.save({"v_pred": EMPTY}, tmp_path / "a.ckpt")
    assert Prediction.read(tmp_path / "a.ckpt", ["v_pred"]).said == {"the tensor v_pred": "v_prediction"}
    assert Prediction.read(tmp_path / "a.ckpt", []).said == {}
