"""What the systems of the command say of themselves fits together, and is what the rest builds on."""

import inspect

import pytest

import joyedit
from joyedit.command.arguments import MAKING, parse
from joyedit.command.instruction import Instruction
from joyedit.command.recorded import REPEATED
from joyedit.command.systems import SYSTEMS, System, system_of
from joyedit.loading.layouts import BUILT_IN, PIPELINES, pipeline_name

COMMANDS = dict.fromkeys(
    ("edit", "generate", "batch", "ask", "estimate", "train", "demo", "convert", "verify", "info")
)
every_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.pipeline)


def test_every_pipeline_has_a_system():
    editing = [name for name in PIPELINES if name != "Qwen3VLPipeline"]
    assert sorted(system.pipeline for system in SYSTEMS) == sorted(editing)
    assert {system.model for system in SYSTEMS} == {*BUILT_IN, ""}  # of Edit-Plus there is no small one
    assert system_of("WanPipeline") is None and system_of(None) is None


@every_system
def test_what_it_names(system):
    assert system.model == "" or pipeline_name(system.model) == system.pipeline
    assert {*system.settings, *system.files} <= set(system.options)
    assert not {*system.settings, *system.texts} & set(REPEATED)
    for other in SYSTEMS:
        assert other is system or not {*other.options} & {*system.options, *system.texts}
    assert "{model}" in system.untold and set(system.commands) <= set(MAKING)


@every_system
def test_it_has_what_the_protocol_asks_for(system):
    for name, wanted in inspect.getmembers(System, inspect.isfunction):
        if not name.startswith("_"):
            found = inspect.signature(getattr(type(system), name))
            assert list(found.parameters) == list(inspect.signature(wanted).parameters), name


@every_system
def test_options_are_spelt_as_they_say(system, capsys):
    with pytest.raises(SystemExit):
        parse(["edit", "--help"], COMMANDS)
    shown = capsys.readouterr().out
    assert all(f"  {option} " in shown or f"  {option}," in shown for option in system.options.values())


@pytest.mark.parametrize("words", [["edit", "a.png", "x"], ["generate", "x"]])
def test_what_nobody_says_is_none_whatever_the_command(words):
    args = parse(words, COMMANDS)
    said = {name for system in SYSTEMS for name in (*system.texts, *system.options) if getattr(args, name)}
    assert said == {"prompt"} and all(getattr(args, name) is None for name in REPEATED)


def test_the_last_is_meant_when_nothing_else_is():
    args = parse(["edit", "a.png", "x"], COMMANDS)
    assert [type(system) for system in SYSTEMS if system.is_meant(args)] == [Instruction]
    assert joyedit.load(device="cpu").__class__.__name__ == Instruction.pipeline
