"""Files that a stranger may have written: small ones that ask for much, and values of other types."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file

import joyedit
from joyedit.checkpoints.bounds import MOST_STEPS, count_numbered
from joyedit.checkpoints.hub import Origin, walk
from joyedit.checkpoints.json_files import LARGEST, read_json
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.safetensors_files import metadata_json, safetensors_header
from joyedit.checkpoints.shard_index import shards_of
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.loading.layouts import licence_of, read_infer_config
from joyedit.loading.single_file import read_single_file
from joyedit.models.chronoedit_dit import ChronoEditConfig
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig
from joyedit.models.sd_unet import UNet2DConditionConfig
from joyedit.models.umt5 import UMT5Config
from joyedit.models.wan_vae import AutoencoderKLWanConfig
from joyedit.pipelines.made_for import MadeFor
from joyedit.schedulers.ddim import DDIMConfig
from joyedit.schedulers.unipc import UniPCConfig


def test_control_sequences_are_made_visible_and_long_texts_cut():
    assert visible("a\x1b[31mred\u202e\n\x9b") == "a\\x1b[31mred\\u202e \\x9b"
    assert visible("caf\u00e9 \u4f60\u597d") == "caf\u00e9 \u4f60\u597d"
    assert visible("\ud800") == "\\ud800"
    assert visible("x" * 500, 10) == "x" * 10 + "..." and visible("x" * 500, None) == "x" * 500
    twice = [1]
    for _ in range(60):
        twice = [twice, twice]
    deep = ()
    for _ in range(100_000):
        deep = (deep,)
    assert len(shown(twice)) < 300 and len(shown(deep)) < 300
    assert shown([1, "a"]) == "[1, 'a']"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 50 levels deep"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "nested more than 50 levels deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "one of its numbers is too long"),
        (b'{"a": "caf\xe9"}', "not UTF-8 text: .* at byte 10"),
        (b'"text"', "holds a str, not a JSON object"),
    ],
    ids=["lists", "objects", "number", "latin-1", "text"],
)
def test_json_of_other_form_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        read_json(path)


def test_json_and_headers_of_many_bytes_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match="config.json has more than 4,194,304 bytes"):
        read_json(path)
    if os.path.exists("/dev/zero"):
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(ValueError, match="is a device or a pipe"):
            read_json(path)
    weights = tmp_path / "x.safetensors"
    with weights.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(95_000_000)
    with pytest.raises(ValueError, match="its header has 90,000,000 bytes, more than 16,777,216"):
        safetensors_header(weights)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (AutoencoderKLWanConfig, "num_res_blocks", 10**6, "num_res_blocks=1000000: 1,000 is the most"),
        (CLIPTextConfig, "num_hidden_layers", 10**9, "num_hidden_layers=1000000000: 1,000 is"),
        (ChronoEditConfig, "num_layers", 10**6, "num_layers=1000000: 1,000"),
        (JoyImageEditConfig, "mm_double_blocks_depth", 10**6, "num_layers=1000000: 1,000"),
        (UMT5Config, "num_layers", 2**62, "num_layers=4611686018427387904: 1,000"),
        (UNet2DConditionConfig, "layers_per_block", [1, 1, 1, 10**6], "layers_per_block=1000000"),
        (UNet2DConditionConfig, "block_out_channels", [32] * 10**5, "block_out_channels has 100000 entries"),
        (DDIMConfig, "num_train_timesteps", 10**9, "num_train_timesteps=1000000000: 100,000"),
        (DDIMConfig, "trained_betas", [0.1] * 200_000, "trained_betas has 200000 entries: 100,000"),
        (DDIMConfig, "beta_start", float("nan"), "beta_start=nan: must be a finite number"),
        (DDIMConfig, "beta_end", 1e300, r"beta_end=1e\+300"),
        (UniPCConfig, "solver_order", 10**6, "solver_order=1000000: 20"),
        (CLIPTextConfig, "vocab_size", 2**62, "vocab_size=4611686018427387904: 2,147,483,647"),
        (CLIPTextConfig, "hidden_size", -(2**62), "hidden_size=-4611686018427387904"),
    ],
)
def test_counts_have_bounds_that_name_themselves(kind, name, value, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{message}"):
        kind.from_dict({name: value})
    assert time.perf_counter() - start < 1


def test_numbers_that_end_in_arithmetic_are_refused():
    with pytest.raises(ValueError, match="JoyImageEditConfig.*num_attention_heads=0"):
        JoyImageEditConfig.from_dict({"num_attention_heads": 0})
    with pytest.raises(ValueError, match="CLIPTextConfig: the settings do not fit one another"):
        joyedit.checkpoints.network.build_on_meta(
            CLIPTextModel, CLIPTextConfig.from_dict({"hidden_size": -12})
        )


def test_a_file_bounds_the_network_that_it_fills(tmp_path):
    save_file({f"a{i}": torch.zeros(1) for i in range(5)}, tmp_path / "x.safetensors")
    config = CLIPTextConfig.from_dict({"num_hidden_layers": 990, "hidden_size": 24})
    start = time.perf_counter()
    with pytest.raises(ValueError, match="x.safetensors: CLIPTextConfig.*network of more than 120 tensors"):
        load_network(CLIPTextModel, config, TensorFiles([tmp_path / "x.safetensors"]))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler"]
)
def test_steps_have_a_bound(kind):
    scheduler = getattr(joyedit, kind)()
    with pytest.raises(ValueError, match="num_inference_steps=1000000.*(10,000|1000)"):
        scheduler.set_timesteps(10**6)
    assert MOST_STEPS == 10_000


def test_numbers_in_names_are_counted_not_run_through(tmp_path):
    assert count_numbered(["a.0.x", "a.1.x", "a.1.y", "b.7"], "a.", 1) == 2
    for odd in ("a.999999999999.x", "a.x.y", "a.01.x", "a." + "9" * 5000 + ".x", "a.-1.x"):
        with pytest.raises(ValueError, match="a.* are not numbered one by one"):
            count_numbered(["a.0.x", odd], "a.", 1)
    unet = "model.diffusion_model."
    names = ["input_blocks.0.0", "input_blocks.999999999999.0", "input_blocks.1.1.attn2.to_k", "out.2"]
    state = {f"{unet}{name}.weight": torch.zeros(4, 4) for name in names}
    save_file(
        {**state, f"{unet}middle_block.1.proj_in.weight": torch.zeros(4, 4)}, tmp_path / "sd.safetensors"
    )
    start = time.perf_counter()
    with pytest.raises(ValueError, match="sd.safetensors: .*input_blocks.* '999999999999' is among them"):
        read_single_file(tmp_path / "sd.safetensors")
    assert time.perf_counter() - start < 1


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "entry": ({"a": 3}, "'a' in its header lists no tensors"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "lists no tensors"),
    "dtype": ({"a": {**ENTRY, "dtype": ["F32"]}}, r"'a' has dtype \['F32'\], which is not supported"),
    "complex": ({"a": {**ENTRY, "dtype": "C64"}}, "dtype 'C64' .complex numbers."),
    "nvfp4": ({"a": {**ENTRY, "dtype": "F4"}}, "dtype 'F4' .numbers of 4 bits"),
    "offsets": ({"a": {**ENTRY, "data_offsets": "0, 8"}}, "data_offsets '0, 8' are no two positions"),
    "text offsets": ({"a": {**ENTRY, "data_offsets": ["0", "8"]}}, "are no two positions"),
    "negative offsets": ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, "are no two positions"),
    "negative axis": ({"a": {**ENTRY, "shape": [-2]}}, "'a': shape .-2. holds what is no length"),
    "bool axis": ({"a": {**ENTRY, "shape": [True, 2]}}, "holds what is no length"),
    "huge axis": ({"a": {**ENTRY, "shape": [2**62, 0]}}, "is larger than any file"),
    "axes": ({"a": {**ENTRY, "shape": [1] * 1000}}, "no list of at most 16 integers"),
    "bytes": ({"a": {**ENTRY, "shape": [3]}}, r"of shape \(3,\) has 12 bytes, its data_offsets \[0, 8\] 8"),
    "twice": ({"a": ENTRY, "b": ENTRY}, "'b' begins at 0, the one before it ends at 8"),
    "a gap": (
        {"a": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}},
        "tensor 'a' begins at 4, the one before it ends at 0",
    ),
    "metadata": ({"__metadata__": {"a": 1}, "a": ENTRY}, "__metadata__ of its header must hold texts"),
    "metadata list": ({"__metadata__": ["a"], "a": ENTRY}, "__metadata__ of its header must hold texts"),
    "escapes": ({"\x1b[31m": ENTRY}, r"name '\\\\x1b\[31m' is too long or holds control"),
    "long name": ({"a" * 1000: ENTRY}, "is too long or holds control"),
}


def write_header(path, header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_headers_name_the_entry_that_is_wrong(tmp_path, name):
    header, message = HEADERS[name]
    path = write_header(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{message}"):
        TensorFiles([path])


def test_headers_without_metadata_and_deep_ones(tmp_path):
    path = write_header(tmp_path / "x.safetensors", {"__metadata__": None, "a": ENTRY})
    assert "__metadata__" not in safetensors_header(path) and metadata_json(path, "x") == {}
    assert torch.equal(TensorFiles([path])["a"], torch.zeros(2))
    write_header(path, {"__metadata__": {"x": "[" * 10_000, "y": "[1]"}, "a": ENTRY})
    with pytest.raises(ValueError, match=r"x\.safetensors: x in its header is not valid JSON"):
        metadata_json(path, "x")
    with pytest.raises(ValueError, match="y in its header holds a list"):
        metadata_json(path, "y")
    write_header(path, b'{"a":' + b"[" * 100_000)
    with pytest.raises(ValueError, match="its header is unreadable .*nested"):
        TensorFiles([path])


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}]
    + [
        {"weight_map": {"a": name}} for name in ("../x.safetensors", "/etc/passwd", "", "..", "a\x1b", "b\\c")
    ],
    ids=str,
)
def test_indices_list_files_beside_them(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json is not an index of weight files: "):
        shards_of(path)


def test_a_link_to_the_root_of_the_disk_is_not_followed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").touch()
    (tmp_path / "beside.json").touch()
    (folder / "root").symlink_to("/", target_is_directory=True)
    (folder / "up").symlink_to("..", target_is_directory=True)
    assert walk(folder) == ["config.json"]


def test_a_folder_of_too_many_files_is_none_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("joyedit.checkpoints.hub.MOST_FILES", 3)
    for name in ("a", "b/c", "d/e"):
        for number in range(4):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / str(number)).touch()
    with pytest.raises(OSError, match="holds more than 3 files"):
        walk(tmp_path)


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: apache-2.0\nauteur: Andr\u00e9\n---\n".encode("latin-1"), "apache-2.0"),
        (b"---\nlicense: mit\x1b[31m\n---\n", "mit\\x1b[31m"),
        (b"\xff\xfe no front matter", "not stated"),
    ],
)
def test_a_readme_in_any_encoding_states_a_licence(tmp_path, content, licence):
    (tmp_path / "README.md").write_bytes(content)
    assert licence_of(Origin(str(tmp_path)), ["README.md"]) == licence


@pytest.mark.parametrize(
    "content",
    [b"x = " + b"(" * 5000 + b")" * 5000, b"x = '\xe9'", b"a\0b", b"x = " + b"9" * 5000, b" " * 300_000],
    ids=["deep", "latin-1", "nul", "number", "large"],
)
def test_settings_in_python_are_read_or_refused(tmp_path, content):
    path = tmp_path / "infer_config.py"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"infer_config\.py is not readable Python"):
        read_infer_config(path)


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ({"call": {"num_inference_steps": 10**9}}, "num_inference_steps=1000000000: 10,000 is the most"),
        ({"call": {"num_maps_per_mask": 10**6}}, "num_maps_per_mask=1000000: 1,000 is the most"),
        ({"call": {"guidance_scale": float("inf")}}, "guidance_scale=inf: must be a finite number"),
        ({"basesize": 10**6}, "basesize=1000000: 4,096 is the most"),
        ({"world": {"about": "x", "words": [], "psnr": 10**400}}, "world is damaged"),
    ],
)
def test_settings_of_a_call_have_bounds(made_for, message):
    with pytest.raises(ValueError, match=message):
        MadeFor.from_dict(made_for)


def test_words_of_a_checkpoint_about_itself_are_made_visible():
    read = MadeFor.from_dict({"world": {"about": "shapes\x1b[31m", "words": ["a"], "psnr": 3}})
    assert read.world is not None and read.world.about == "shapes\\x1b[31m"
