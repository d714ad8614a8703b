"""Every pair of settings of a pipeline: both give what each gives, or the pair is refused by name.

A graph exists on a GPU alone: tapes stand for graphs. What is offloaded comes from main memory there again.
The pairs of the step cache that go together are tested with it, those of several processes in
test_parallel.py.
"""

import argparse
import copy
import itertools

import pytest
import torch

import joyedit
from benchmarks.tables import together_table
from joyedit import parallel
from joyedit.command.arguments import asked_settings
from joyedit.pipelines import together
from joyedit.pipelines.placement import Placed
from tests.tapes import Counted
from tests.test_graphs import adapter
from tests.test_memory import call

MOVED = {"memory", "offload", "graphs", "compile"}  # which change nothing in the result
PAIRS = [frozenset(pair) for pair in itertools.combinations(together.SETTINGS, 2)]
WITH_CACHE = [pair for pair in PAIRS if "step_cache" in pair]
ALLOWED = [
    pair for pair in PAIRS if pair not in together.APART and pair not in WITH_CACHE and "parallel" not in pair
]


@pytest.fixture(scope="module")
def plain():
    made = joyedit.load("tiny-joyimage", device="cpu", dtype="float32")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe(plain, monkeypatch):
    """A pipeline of its own, which takes the CPU for a GPU when graphs are asked for, and this process for
    two."""
    monkeypatch.setattr("joyedit.pipelines.placement.GraphedCalls", Counted)
    monkeypatch.setattr(parallel, "meet", lambda cfg, sequence, device: parallel.Mesh(cfg, sequence, 0))
    made = copy.deepcopy(plain)
    enable = Placed.enable_graphs

    def enable_graphs(self):
        with monkeypatch.context() as patch:
            patch.setattr(Placed, "device", torch.device("cuda"))
            enable(self)

    monkeypatch.setattr(Placed, "enable_graphs", enable_graphs)
    return made


def fuse(pipe):
    before = pipe.get_active_adapters()
    pipe.load_lora_weights(adapter(pipe), "second")
    pipe.fuse_lora(0.5, ["second"])
    if before:
        pipe.set_adapters(before)


TURN_ON = {
    "memory": lambda pipe: pipe.set_memory("64G", "cpu"),
    "offload": lambda pipe: pipe.set_offload("sequential", "cpu"),
    "graphs": lambda pipe: pipe.enable_graphs(),
    "parallel": lambda pipe: pipe.parallelize(sequence=2),
    "compile": lambda pipe: pipe.transformer.compile(backend="eager"),
    "lora": lambda pipe: pipe.load_lora_weights(adapter(pipe), "first"),
    "fused_lora": fuse,
}


@pytest.fixture(scope="module")
def wanted(plain):
    """The settings that change the result -> the result."""
    found = {}
    for names in ((), ("lora",), ("fused_lora",), ("fused_lora", "lora")):
        pipe = copy.deepcopy(plain)
        for name in names:
            TURN_ON[name](pipe)
        found[frozenset(names)] = call(pipe)
    results = list(found.values())
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))
    return found


def orders(pairs):
    """Both orders of each, of what is compiled one; nearly all are slow."""
    both = (order for pair in pairs for order in itertools.permutations(sorted(pair)))
    return [
        pytest.param(*order, marks=[pytest.mark.slow] * (order != ("lora", "memory")))
        for order in both
        if order[-1] != "compile"
    ]


@pytest.mark.parametrize(("first", "second"), orders(ALLOWED))
def test_what_goes_together_gives_what_it_gives_alone(pipe, wanted, first, second):
    TURN_ON[first](pipe)
    TURN_ON[second](pipe)
    found = [call(pipe), call(pipe)]
    truth = wanted[frozenset({first, second}) - MOVED]
    assert all(torch.equal(one, truth) for one in found)
    assert {first, second} & MOVED <= pipe.in_use()
    if pipe._graphs is not None:
        assert pipe._graphs.numbers[1] > 0, "nothing was replayed"


EXCLUDED = [
    pytest.param(pair, id="-".join(sorted(pair)), marks=[pytest.mark.slow] * ("compile" in pair))
    for pair in together.APART
    if pair not in WITH_CACHE
]


@pytest.mark.parametrize("pair", EXCLUDED)
def test_what_does_not_is_refused_by_name(pipe, pair):
    for first, second in itertools.permutations(sorted(pair)):
        if {first, second} == {"memory", "offload"}:  # of which one takes the place of the other
            with pytest.raises(ValueError, match="memory='6G' does not go with offload='model': "):
                joyedit.load("tiny-joyimage", device="cpu", memory="6G", offload="model")
            continue
        mine = copy.deepcopy(pipe)
        TURN_ON[first](mine)
        with pytest.raises(ValueError, match=f"{second}.* does not go with {first}|{first}.* does not go"):
            TURN_ON[second](mine)
            call(mine)  # what is compiled is seen when it is called


def test_the_step_cache_is_refused_with_graphs():
    with pytest.raises(ValueError, match=r"^step_cache=0.1 does not go with graphs: .*; call disable_graphs"):
        together.check("step_cache", "step_cache=0.1", {"graphs", "lora"})
    for pair in WITH_CACHE:
        (other,) = pair - {"step_cache"}
        if pair not in together.APART:
            together.check("step_cache", "step_cache=0.1", {other})


@pytest.mark.parametrize(
    "words",
    [
        {"memory": "6G", "offload": "model"},
        {"memory": "6G", "graphs": True},
        {"offload": "sequential", "graphs": True},
        {"graphs": True, "step_cache": 0.1},
    ],
)
def test_the_command_refuses_the_same(words):
    asked = {"memory": None, "offload": None, "graphs": False, "step_cache": None, "parallel": None}
    wrong = together.contradiction(asked_settings(argparse.Namespace(**asked | words)))
    assert (
        wrong and all(f"--{name.replace('_', '-')}" in wrong for name in words) and wrong.endswith("give one")
    )
    for name in words:
        assert (
            together.contradiction(asked_settings(argparse.Namespace(**asked | {name: words[name]}))) is None
        )


def test_the_table_says_every_pair():
    rows = together_table().splitlines()[2:]
    assert len(rows) == len(together.SETTINGS)
    for (name, (words, _)), row in zip(together.SETTINGS.items(), rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0].endswith(words)
        for other, cell in zip(together.SETTINGS, cells[1:], strict=True):
            wanted = "" if name == other else "no" if frozenset({name, other}) in together.APART else "yes"
            assert cell == wanted, (name, other)
