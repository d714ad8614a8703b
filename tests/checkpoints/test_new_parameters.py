"""Parameters that files lack and need not hold: their values, their dtypes, and what is refused."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network, load_network
from joyedit.checkpoints.new_parameters import initial_values
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.table import IDENTITY, Layout

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class LayeredConfig(Config):
    layers: int = 3


class Layer(nn.Module):
    """As published, and what a fork adds: a temperature, a gate, a register in fp32, a count of steps."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.temperature = nn.Parameter(torch.full((3,), 0.5) * 2)
        self.gate = nn.Linear(4, 6)
        self.time_embedder = nn.Parameter(torch.randn(5) + 10)
        self.register_buffer("steps", torch.arange(3))


class Layered(Network):
    Config = LayeredConfig
    table = "joyimage_mmdit"
    fp32_modules = frozenset({"time_embedder"})

    def __init__(self, config=None):
        super().__init__(config or LayeredConfig())
        self.layers = nn.ModuleList(Layer() for _ in range(self.config.layers))
        for layer in self.layers:  # the network has the last word, as in many published ones
            nn.init.zeros_(layer.gate.bias)

    def layouts(self):
        return (Layout("diffusers", (IDENTITY,)),)


NEW = ("*.temperature", "*.gate.*", "*.time_embedder", "*.steps")


@pytest.fixture
def published(tmp_path):
    """A folder without what the fork adds."""
    Layered().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if ".proj." in name}, path)
    return tmp_path


def test_new_parameters_keep_the_value_that_init_gives_them(published):
    torch.manual_seed(5)
    loaded = Layered.from_pretrained(published, new_parameters=NEW)
    torch.manual_seed(5)
    for layer in loaded.layers:
        gate, register = nn.Linear(4, 6), torch.randn(5) + 10
        assert torch.equal(layer.gate.weight, gate.weight) and not layer.gate.bias.any()
        assert torch.equal(layer.time_embedder, register)
        assert torch.equal(layer.temperature, torch.ones(3)) and torch.equal(layer.steps, torch.arange(3))
    stored = load_file(published / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_new_parameters_have_the_dtype_of_the_others(published):
    loaded = Layered.from_pretrained(published, new_parameters=NEW, dtype="bf16")
    kinds = {name.partition(".")[2].partition(".")[2]: t.dtype for name, t in loaded.state_dict().items()}
    assert kinds.pop("time_embedder") is torch.float32 and kinds.pop("steps") is torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
    path = published / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    as_stored = Layered.from_pretrained(published, new_parameters=NEW)
    assert as_stored.layers[1].gate.weight.dtype is torch.float16


def test_what_was_saved_with_them_loads_without_a_word(published, tmp_path):
    loaded = Layered.from_pretrained(published, new_parameters=NEW)
    loaded.save_pretrained(tmp_path / "fork")
    again = Layered.from_pretrained(tmp_path / "fork")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in loaded.state_dict().items())


def test_it_is_said_once_and_layers_as_one(published, caplog):
    caplog.set_level("INFO", "joyedit")
    Layered.from_pretrained(published, new_parameters=NEW)
    (said,) = [message for message in caplog.messages if "initial value" in message]
    assert said.startswith("Layered: 15 parameters keep their initial value: layers.*.temperature, ")


@pytest.mark.parametrize(
    "patterns, message",
    [
        ((), r"15 of 21 tensors missing .*pass new_parameters=\['layers.\*.temperature', 'layers.\*.time"),
        (NEW[:2], r"6 of 21 tensors missing \(layers.0.steps, .*pass new_parameters=\['layers.\*.time_embed"),
        ((*NEW, "*.temprature"), r"'\*.temprature' matches no parameter \(nearest: layers.\*.temperature, "),
        ((*NEW, "layers.*.proj.*"), r"matches only what is in the files \(layers.\*.proj.\w+, .*; they lack"),
    ],
)
def test_all_else_stays_strict(published, patterns, message, monkeypatch):
    monkeypatch.setattr(TensorFiles, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message):
        Layered.from_pretrained(published, new_parameters=patterns)


def test_files_with_something_else_in_its_place_are_not_advised(published):
    path = published / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["layers.0.porj.bias"] = state.pop("layers.0.proj.bias")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"1 of 21 tensors missing .*, 1 unknown") as raised:
        Layered.from_pretrained(published, new_parameters=NEW)
    assert "new_parameters" not in str(raised.value)


def test_a_pattern_that_some_files_hold_fills_the_rest(published):
    path = published / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"layers.1.temperature": torch.full((3,), 7.0)}, path)
    loaded = load_network(Layered, LayeredConfig(), TensorFiles([path]), new_parameters=NEW)
    assert [layer.temperature[0].item() for layer in loaded.layers] == [1, 7, 1]


class Awkward(nn.Module):
    """Initialisations that look at their tensor, that read others, and that create tensors on the way."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.cut = nn.Parameter(nn.init.trunc_normal_(torch.zeros(40, 40), std=0.02))
        self.turned = nn.Linear(8, 8, bias=False)
        nn.init.orthogonal_(self.turned.weight)
        self.sparse = nn.Parameter(torch.empty(10, 4))
        nn.init.sparse_(self.sparse, sparsity=0.3)
        self.after = nn.Linear(3, 5)
        self.twin = nn.Linear(3, 5)
        self.twin.weight = self.after.weight
        self.read = nn.Parameter(torch.eye(3))
        with torch.no_grad():
            self.read[1:] += self.before.bias.abs()[1:, None] + 1
        shared = torch.arange(3.0)
        self.scaled = nn.Parameter(shared * 3)
        with torch.no_grad():
            self.before.bias.add_(shared)
        self.swapped = nn.Parameter(torch.empty(3))
        self.swapped.data = torch.arange(3.0)
        self.swapped.data.mul_(2)
        self.last = nn.Linear(3, 5)


def test_any_initialisation_is_carried_out():
    names = [
        "cut",
        "turned.weight",
        "sparse",
        "after.weight",
        "read",
        "scaled",
        "swapped",
        "last.bias",
        "last.weight",
    ]
    values = initial_values(Awkward, names)
    assert list(values) == names and not any(value.is_meta for value in values.values())
    assert 0.01 < values["cut"].std() < 0.03 and values["cut"].unique().numel() > 1500
    turned = values["turned.weight"]
    torch.testing.assert_close(turned @ turned.T, torch.eye(8), rtol=0, atol=1e-5)
    assert ((values["sparse"] == 0).sum(0) == 3).all()
    assert 0.1 < values["after.weight"].std() < 0.6 and values["after.weight"].abs().max() < 3**-0.5
    assert values["read"][0].tolist() == [1, 0, 0] and (values["read"][1:] >= 1).all()
    assert values["scaled"].tolist() == [0, 3, 6]
    assert values["swapped"].tolist() == [0, 2, 4]
    assert values["last.weight"].abs().max() < 3**-0.5 and values["last.bias"].unique().numel() == 5


def test_a_construction_that_differs_each_time_is_refused():
    calls = []

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            calls.append(1)
            self.weight = nn.Parameter(torch.ones(len(calls)))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="0.weight: no initial value"):
        initial_values(lambda: nn.Sequential(*(Fickle() for _ in range(2))), ["0.weight"])


@pytest.mark.slow
def test_new_parameters_of_a_large_network_take_their_own_memory(tmp_path):
    """Of 1 GB of weights, that nobody asked for, nothing is made."""
    code = """
        import resource, torch
        from torch import nn
        from joyedit.checkpoints.new_parameters import initial_values

        def construct():
            large = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(16)))
            large.append(nn.Linear(16, 16))
            return large

        torch.ones(9, 9) @ torch.ones(9, 9)
        initial_values(lambda: nn.Linear(2, 2), ["bias"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert initial_values(construct, ["16.weight"])["16.weight"].std() > 0.05
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000  # KiB


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork") / "joyimage"
    write_random_checkpoint(folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["double_blocks.1.img_mod.modulate_table"]
    save_file(state, path)
    return folder


PATTERN = "*.img_mod.modulate_table"


def test_pipelines_and_load_take_patterns_for_all_their_networks(pipeline_folder, caplog):
    caplog.set_level("INFO", "joyedit")
    loaded = joyedit.load(pipeline_folder, device="cpu", new_parameters=(PATTERN,))
    assert sum("initial value" in message for message in caplog.messages) == 1
    other = joyedit.JoyImageEditPipeline.from_pretrained(pipeline_folder, new_parameters=PATTERN)
    for pipe in (loaded, other):
        table = pipe.transformer.double_blocks[1].img_mod.modulate_table
        assert table.dtype is torch.bfloat16 and not table.any() and table.shape == (1, 6, 64)
    with pytest.raises(ValueError, match="pass new_parameters="):
        joyedit.load(pipeline_folder, device="cpu")
    with pytest.raises(ValueError, match=r"'\*.temperature' matches no parameter .nearest: "):
        joyedit.load(pipeline_folder, device="cpu", new_parameters=(PATTERN, "*.temperature"))


def test_parts_and_foreign_layouts_take_patterns(pipeline_folder, tmp_path):
    pipe = joyedit.load(pipeline_folder, device="cpu", new_parameters=(PATTERN,))
    whole = tmp_path / "whole"
    pipe.save_pretrained(whole)
    given = joyedit.load(whole, device="cpu", transformer=str(pipeline_folder), new_parameters=[PATTERN])
    file = pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    parts = {name: str(whole) for name in ("vae", "text_encoder", "tokenizer", "processor")}
    lone = joyedit.load(file, device="cpu", new_parameters=[PATTERN], **parts)
    for loaded in (given, lone):
        assert not loaded.transformer.double_blocks[1].img_mod.modulate_table.any()
    with pytest.raises(ValueError, match="matches only what is in the files"):
        joyedit.load(whole, device="cpu", new_parameters=[PATTERN])
