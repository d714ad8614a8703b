"""Configs, weight files, key tables and the network base class, on small files written here."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from joyedit.checkpoints.config import Config
from joyedit.checkpoints.hub import choose_weight_files
from joyedit.checkpoints.network import Network, load_network, open_weights
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.checkpoints.writing import write_safetensors
from joyedit.convert.table import (
    IDENTITY,
    Layout,
    drop,
    fuse,
    plan_conversion,
    prefixed,
    rename,
    reshape,
    split,
)


@dataclasses.dataclass(frozen=True)
class TwoConfig(Config):
    width: int = 4
    sizes: tuple[int, ...] = (1, 2)
    kind: str = "plain"

    aliases: ClassVar[dict] = {"hidden": "width"}
    supported: ClassVar[dict] = {"kind": ("plain",)}


class Two(Network):
    Config = TwoConfig
    table = "joyimage_mmdit"  # its first layout is the identity
    fp32_modules = frozenset({"time_embedder"})

    def __init__(self, config=None):
        super().__init__(config or TwoConfig())
        self.body = nn.Linear(self.config.width, 3)
        self.time_embedder = nn.Linear(2, 2)

    def layouts(self):
        return (Layout("diffusers", (IDENTITY,)),)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = Two()
    network.save_pretrained(tmp_path)
    return network, tmp_path


def test_config_is_attribute_item_and_dict_and_immutable():
    config = TwoConfig.from_dict({"hidden": 8, "sizes": [3, 4], "_class_name": "Two"})
    assert config.width == config["width"] == dict(config)["width"] == 8
    assert config.sizes == (3, 4) and config.to_dict()["sizes"] == [3, 4]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 9
    assert config.replace(width=16).width == 16 and config.width == 8


def test_config_refuses_unknown_keys_and_unsupported_values():
    with pytest.raises(ValueError, match="no 'widht' .did you mean 'width'"):
        TwoConfig.from_dict({"widht": 8})
    with pytest.raises(ValueError, match="kind='odd' is not supported, only 'plain'"):
        TwoConfig.from_dict({"kind": "odd"})
    with pytest.raises(ValueError, match="no 'depth'"):
        TwoConfig().replace(depth=3)


def test_load_options_name_the_nearest_word_and_refuse_two_dtypes():
    with pytest.raises(TypeError, match="'revison' .did you mean 'revision'"):
        LoadOptions.parse({"revison": "main"})
    with pytest.raises(ValueError, match="two different dtypes"):
        LoadOptions.parse({"dtype": "bf16", "torch_dtype": torch.float32})
    same = LoadOptions.parse({"dtype": "bf16", "torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True})
    assert same.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int8'"):
        LoadOptions.parse({"dtype": "int8"})


def test_save_and_load_give_the_same_tensors(saved):
    network, folder = saved
    again = Two.from_pretrained(folder)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_half_precision_leaves_the_declared_parameters_in_fp32(saved):
    _, folder = saved
    loaded = Two.from_pretrained(folder, dtype="bf16")
    assert loaded.dtype is torch.bfloat16 and loaded.body.weight.dtype is torch.bfloat16
    assert loaded.time_embedder.weight.dtype is torch.float32
    moved = Two.from_pretrained(folder).to(torch.bfloat16)
    assert moved.time_embedder.weight.dtype is torch.float32 and moved.body.bias.dtype is torch.bfloat16
    assert torch.equal(moved.time_embedder.weight, loaded.time_embedder.weight)
    assert moved.float().body.weight.dtype is torch.float32
    assert Two().half().body.weight.dtype is torch.float16


def test_bf16_files_are_used_as_mapped(saved, tmp_path):
    network, _ = saved
    folder = tmp_path / "half"
    network.to(torch.bfloat16).save_pretrained(folder)
    files = open_weights(folder, "diffusion_pytorch_model")
    loaded = load_network(Two, TwoConfig(), files)
    assert loaded.body.weight.dtype is torch.bfloat16 and loaded.time_embedder.weight.dtype is torch.float32


def test_large_fp32_networks_load_as_bf16_unless_told(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr("joyedit.checkpoints.network.AUTO_BF16_BYTES", 10)
    assert Two.from_pretrained(folder).dtype is torch.bfloat16
    assert Two.from_pretrained(folder, dtype="float32").dtype is torch.float32


def test_shards_with_an_index_load_equal(saved, tmp_path):
    network, _ = saved
    folder = tmp_path / "sharded"
    network.save_pretrained(folder, max_shard_size=40)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert torch.equal(Two.from_pretrained(folder).body.weight, network.body.weight)
    network.save_pretrained(folder)  # one file again: the old shards and their index are gone
    assert [p.name for p in sorted(folder.iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_variants_and_pickles(saved, tmp_path):
    network, _ = saved
    folder = tmp_path / "variants"
    network.save_pretrained(folder, variant="fp16")
    with pytest.raises(FileNotFoundError, match="fp16"):
        Two.from_pretrained(folder)
    assert torch.equal(Two.from_pretrained(folder, variant="fp16").body.weight, network.body.weight)
    torch.save({k: v + 1 for k, v in network.state_dict().items()}, folder / "diffusion_pytorch_model.bin")
    assert torch.equal(Two.from_pretrained(folder).body.weight, network.body.weight + 1)
    with pytest.raises(FileNotFoundError, match="use_safetensors=True"):
        Two.from_pretrained(folder, use_safetensors=True)
    network.save_pretrained(folder)
    assert torch.equal(Two.from_pretrained(folder).body.weight, network.body.weight)
    assert torch.equal(
        Two.from_pretrained(folder, use_safetensors=False).body.weight, network.body.weight + 1
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            "model.safetensors.index.json",
        ),
        (["pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_which_file_is_chosen(name, expected):
    assert choose_weight_files(name, "model", None, None) == [expected]


def test_broken_files_are_refused_by_name(saved):
    _, folder = saved
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="was cut off or damaged.*promises"):
        Two.from_pretrained(folder)
    path.write_bytes(b"GIF89a not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Two.from_pretrained(folder)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match="header lists no tensors"):
        Two.from_pretrained(folder)
    path.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        Two.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Two.from_pretrained(folder)


def test_missing_shard_and_missing_folder(saved, tmp_path):
    network, _ = saved
    folder = tmp_path / "gap"
    network.save_pretrained(folder, max_shard_size=40)
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match="missing.*00002"):
        Two.from_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        Two.from_pretrained(tmp_path / "nowhere")


def test_wrong_keys_give_the_two_sided_difference_and_wrong_shapes_both_shapes(saved):
    network, folder = saved
    state = dict(network.state_dict())
    state["body.wieght"] = state.pop("body.weight")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 of 4 tensors missing \(body.weight\), 1 unknown \(body.wieght\)"
    ):
        Two.from_pretrained(folder)
    save_file(
        {**network.state_dict(), "extra": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"0 of 4 tensors missing, 1 unknown \(extra\)"):
        Two.from_pretrained(folder)
    state = dict(network.state_dict())
    state["body.weight"] = torch.zeros(3, 5)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"\(3, 5\) for body.weight, wanted \(3, 4\)"):
        Two.from_pretrained(folder)


class Touch:
    def __reduce__(self):
        return (open, ("touched-by-a-pickle", "w"))


def test_pickled_code_is_not_run(saved, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"body.weight": Touch()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="weights only"):
        Two.from_pretrained(folder)
    assert not (tmp_path / "touched-by-a-pickle").exists()


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="'a' is in two of the files"):
        TensorFiles([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_keeps_the_old_weights_whole(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Two()
    network.save_pretrained(tmp_path, max_shard_size=40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        network.body.weight.zero_()
    saved = []

    def stop_at_the_second(*args):
        saved.append(write_safetensors(*args))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("joyedit.checkpoints.tensor_files.write_safetensors", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        network.save_pretrained(tmp_path, max_shard_size=40)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_network_without_tensors_is_not_saved(tmp_path):
    with torch.device("meta"):
        network = Two()
    with pytest.raises(Exception, match="meta"):
        network.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"width": "64"}, "width='64' is not supported: must be of type int"),
        ({"width": 4.0}, "width=4.0 is not supported: must be of type int"),
        ({"width": True}, "width=True is not supported: must be of type int"),
        ({"width": None}, "width=None"),
        ({"sizes": 3}, "sizes=3"),
        ({"sizes": [1, "a"]}, "sizes=.1, 'a'."),
        ({"kind": 3}, "kind=3"),
    ],
    ids=str,
)
def test_values_of_another_type_name_their_key(raw, message):
    with pytest.raises(ValueError, match=message):
        TwoConfig.from_dict(raw)


def test_gradients_keep_the_dtype_of_their_parameters():
    network = Two()
    (network.body(torch.ones(1, 4)).sum() + network.time_embedder(torch.ones(1, 2)).sum()).backward()
    network.to(torch.bfloat16)
    for parameter in network.parameters():
        assert parameter.grad.dtype is parameter.dtype
    assert network.time_embedder.weight.dtype is torch.float32


@pytest.mark.parametrize("said", ["5 apples", 0, True])
def test_a_shard_has_a_size(tmp_path, said):
    with pytest.raises(ValueError, match=f"^max_shard_size={said!r}: must be "):
        save_tensors(tmp_path, "model", {"a": torch.ones(2)}, max_shard_size=said)
    assert not list(tmp_path.iterdir())


def test_sizes_of_shards_are_in_powers_of_ten(tmp_path):
    state = {name: torch.zeros(250) for name in "abc"}  # 1000 bytes each; 2048 of them would be one file less
    for size, count in (("2KB", 2), ("1.9KB", 3), (2000, 2)):
        save_tensors(tmp_path, "model", state, max_shard_size=size)
        assert len(list(tmp_path.glob("*.safetensors"))) == count


def test_metadata_says_where_the_tensors_come_from(tmp_path):
    save_tensors(tmp_path, "model", {"a": torch.ones(2)}, metadata={"source": "here"})
    header = (tmp_path / "model.safetensors").read_bytes()
    assert b'"source":"here"' in header and b'"format":"pt"' in header
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))


LAYOUT = Layout(
    "foreign",
    (
        drop("freqs", "a table that is computed"),
        rename("layers.{i}.norm.{leaf}", "blocks.{i}.ln.{leaf}"),
        split("layers.{i}.qkv.{leaf}", ("blocks.{i}.q.{leaf}", "blocks.{i}.k.{leaf}", "blocks.{i}.v.{leaf}")),
        fuse(("layers.{i}.gate.weight", "layers.{i}.up.weight"), "blocks.{i}.ff.weight"),
        reshape("head.weight", "head.weight", lambda t: t[:, :, 0, 0], lambda t: t[:, :, None, None]),
        rename("rest.{path*}", "{path*}"),
    ),
)


def foreign_state():
    torch.manual_seed(1)
    return {
        "freqs": torch.randn(3),
        "layers.0.norm.weight": torch.randn(4),
        "layers.11.norm.weight": torch.randn(4),
        "layers.0.qkv.weight": torch.randn(6, 4),
        "layers.0.qkv.bias": torch.randn(6),
        "layers.0.gate.weight": torch.randn(5, 4),
        "layers.0.up.weight": torch.randn(5, 4),
        "head.weight": torch.randn(2, 4, 1, 1),
        "rest.a.b.c": torch.randn(1),
    }


def converted(state):
    wanted = {
        "blocks.0.ln.weight": (4,),
        "blocks.11.ln.weight": (4,),
        **{f"blocks.0.{n}.weight": (2, 4) for n in "qkv"},
        **{f"blocks.0.{n}.bias": (2,) for n in "qkv"},
        "blocks.0.ff.weight": (10, 4),
        "head.weight": (2, 4),
        "a.b.c": (1,),
    }
    plan = plan_conversion(
        (Layout("diffusers", (IDENTITY,)), LAYOUT), {k: tuple(v.shape) for k, v in state.items()}, wanted
    )
    return plan, {name: step.read(state) for name, step in plan.steps.items()}


def test_every_kind_of_rule_forwards():
    state = foreign_state()
    plan, ours = converted(state)
    assert plan.layout is LAYOUT and plan.dropped == {"freqs": "a table that is computed"}
    assert torch.equal(ours["blocks.11.ln.weight"], state["layers.11.norm.weight"])
    assert torch.equal(ours["blocks.0.k.weight"], state["layers.0.qkv.weight"][2:4])
    assert torch.equal(ours["blocks.0.v.bias"], state["layers.0.qkv.bias"][4:])
    assert torch.equal(ours["blocks.0.ff.weight"][5:], state["layers.0.up.weight"])
    assert torch.equal(ours["head.weight"], state["head.weight"][..., 0, 0])
    assert torch.equal(ours["a.b.c"], state["rest.a.b.c"])


def test_and_backwards():
    state = foreign_state()
    back = LAYOUT.invert(converted(state)[1])
    assert set(back) == set(state) - {"freqs"}
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name


def test_a_rule_with_a_part_missing_counts_as_unknown():
    state = foreign_state()
    del state["layers.0.up.weight"]
    with pytest.raises(
        ValueError, match=r"'foreign'.*blocks.0.ff.weight.*1 unknown \(layers.0.gate.weight\)"
    ):
        converted(state)


def test_prefixes():
    layout = prefixed(LAYOUT, "model.", "with prefix")
    state = {f"model.{k}": v for k, v in foreign_state().items()}
    steps, _, unmatched = layout.plan(list(state))
    assert not unmatched and steps["a.b.c"].sources == ("model.rest.a.b.c",)
