"""Numbers as sweeps make them, of numpy and torch: they give what Python's give, and no more is accepted."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.pipelines import checks

PHOTO = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
JOY = {"prompt": "Make it red.", "num_inference_steps": 2, "guidance_scale": 2}
FILM = {**JOY, "height": 64, "width": 96}
EDIT = {
    "source_prompt": "a red circle",
    "target_prompt": "a blue circle",
    "num_inference_steps": 3,
    "guidance_scale": 2,
    "num_maps_per_mask": 1,
}
LIKE = {
    "numpy": lambda value: (np.int64 if isinstance(value, int) else np.float64)(value),
    "numpy, narrow": lambda value: (np.int32 if isinstance(value, int) else np.float32)(value),
    "array": np.array,
    "torch": torch.tensor,
}
CASES = {
    "joyimage": {
        **JOY,
        "height": 96,
        "width": 96,
        "num_images_per_prompt": 1,
        "max_sequence_length": 40,
        "guidance_scale": 2.5,
    },
    "joyimage, whole guidance": {**JOY, "guidance_scale": 3},
    "chronoedit": {
        **FILM,
        "num_frames": 5,
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": 1,
        "max_sequence_length": 20,
        "guidance_scale": 2.5,
        "num_videos_per_prompt": 1,
        "attention_kwargs": {"scale": 0.5},
    },
    "diffedit": {
        **EDIT,
        "guidance_scale": 2.5,
        "invert_guidance_scale": 1.5,
        "inpaint_strength": 0.75,
        "mask_encode_strength": 0.5,
        "mask_thresholding_ratio": 2.5,
        "eta": 0.5,
        "clip_skip": 1,
        "cross_attention_kwargs": {"scale": 0.5},
    },
    "diffedit, backwards": {
        "prompt": "a red circle",
        "num_inference_steps": 3,
        "inpaint_strength": 0.75,
        "guidance_scale": 1.5,
        "callback_steps": 1,
        "lambda_auto_corr": 0.5,
        "lambda_kl": 0.5,
        "num_reg_steps": 1,
        "num_auto_corr_rolls": 1,
    },
}


@pytest.fixture(scope="module")
def pipes():
    found = {}
    for system in ("joyimage", "diffedit", "chronoedit"):
        found[system] = joyedit.load(f"tiny-{system}", device="cpu", dtype="float32")
        found[system].set_progress_bar_config(disable=True)
    return found


def run(pipes, case, call):
    pipe = pipes[case.split(",")[0]]
    generator = torch.Generator().manual_seed(0)
    if case == "diffedit, backwards":
        return pipe.invert(image=PHOTO, generator=generator, **call).latents
    call = {**call, "image": PHOTO, "generator": generator, "output_type": "latent"}
    return (pipe.edit if case == "diffedit" else pipe)(**call)[0]


@pytest.mark.slow
@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("case", CASES)
def test_numbers_of_others_are_numbers(pipes, case, like):
    def changed(value):
        if isinstance(value, dict):
            return {key: changed(one) for key, one in value.items()}
        return LIKE[like](value) if isinstance(value, (int, float)) and value is not True else value

    # Numbers that a float32 holds exactly: the results are equal to the bit.
    assert torch.equal(run(pipes, case, changed(CASES[case])), run(pipes, case, CASES[case]))


def test_levels_of_others_are_levels(pipes):
    for name, values in (("sigmas", [1.0, 0.5]), ("timesteps", [900.0, 500.0])):
        call = {key: value for key, value in JOY.items() if key != "num_inference_steps"}
        wanted = run(pipes, "joyimage", {**call, name: values})
        for other in (np.array(values), torch.tensor(values), list(np.array(values, dtype=np.float32))):
            assert torch.equal(run(pipes, "joyimage", {**call, name: other}), wanted)


FLAGS = [True, np.True_, torch.tensor(True)]
NO_NUMBERS = [*FLAGS, "2", np.array([2]), torch.tensor([2]), 2j, float("nan"), object()]


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_number_is_refused_by_its_name(pipes, case):
    flags = ("enable_temporal_reasoning",)
    for name, value in CASES[case].items():
        if isinstance(value, (int, float)) and name not in flags:
            for bad in NO_NUMBERS:
                with pytest.raises(ValueError, match=f"{name}="):
                    run(pipes, case, {**CASES[case], name: bad})
        elif isinstance(value, dict):
            for bad in NO_NUMBERS:
                with pytest.raises(ValueError, match="scale="):
                    run(pipes, case, {**CASES[case], name: {"scale": bad}})


def test_weights_of_adapters(pipes):
    adapters, unet = pipes["diffedit"].adapters, pipes["diffedit"].unet
    layer = next(name[:-7] for name, _ in unet.named_parameters() if name.endswith("to_q.weight"))
    out, width = unet.get_parameter(f"{layer}.weight").shape
    state = {f"unet.{layer}.lora_A.weight": torch.ones(2, width)}
    state[f"unet.{layer}.lora_B.weight"] = torch.ones(out, 2)
    try:
        adapters.load_lora_weights(state, "a")
        for weight in (
            np.float32(0.5),
            np.array(0.5),
            torch.tensor(0.5),
            np.array([0.5]),
            {"unet": np.float64(0.5)},
        ):
            adapters.set_adapters("a", weight)
            assert adapters.active_weights["a"]["unet"] == 0.5
            assert type(adapters.active_weights["a"]["unet"]) is float
        for weight in (*FLAGS, "1"):
            with pytest.raises(ValueError, match="is not a number"):
                adapters.set_adapters("a", weight)
    finally:
        adapters.unload_lora_weights()


def test_counts_and_numbers():
    assert [checks.check_count("n", n, least=0) for n in (0, np.uint8(3), torch.tensor(4))] == [0, 3, 4]
    for found in (checks.check_number("x", np.float32(0.5)), checks.check_share("x", np.array(0.5))):
        assert found == 0.5 and type(found) is float
    for value in (-1, 1.0, np.float64(1)):
        with pytest.raises(ValueError, match="n=.*: must be an integer from 0 on"):
            checks.check_count("n", value, least=0)
    assert inspect.signature(checks.check_count).parameters["least"].default == 1
