"""What a pipeline can be set to at the same time: the pairs that exclude each other, and why.

The table of docs/which-machine.md is made of this one.
"""

import itertools
from collections.abc import Iterable, Mapping

# Setting -> how it is turned on, and how it is ended for another.
SETTINGS = {
    "memory": ('`memory="12G"`, `--memory`', "call set_memory(None) first"),
    "offload": ('`offload="model"`, `offload="sequential"`, `--offload`', "call disable_offload() first"),
    "graphs": ("`enable_graphs()`, `--graphs`", "call disable_graphs() first"),
    "step_cache": ("`step_cache=0.1`, `--step-cache`", "leave step_cache out"),
    "compile": ("`network.compile()`", "load the pipeline anew and do not compile it"),
    "parallel": ("`parallelize(sequence=2)`, `--parallel`", "call parallelize() first"),
    "lora": ("a LoRA, not fused", "call unload_lora_weights() first"),
    "fused_lora": ("a LoRA, fused", "call unfuse_lora() first"),
}
APART = {
    frozenset({"memory", "graphs"}): "it moves the weights that graphs read",
    frozenset({"offload", "graphs"}): "it moves the weights that graphs read",
    frozenset({"memory", "offload"}): "offload is a shorthand of a budget",
    frozenset({"step_cache", "graphs"}): "a graph repeats what it recorded, and cannot leave some of it out",
    frozenset({"parallel", "graphs"}): "a graph does not record what processes tell each other",
    frozenset({"parallel", "step_cache"}): "each process would decide by its own tokens",
    frozenset({"parallel", "compile"}): "compiled blocks do not wait for the tokens of other processes",
    frozenset({"compile", "graphs"}): 'compiled code has its own: network.compile(mode="reduce-overhead")',
    frozenset({"compile", "memory"}): "compiled blocks do not wait for weights that come and go",
    frozenset({"compile", "offload"}): "compiled blocks do not wait for weights that come and go",
}


def check(name: str, asked: str, in_use: Iterable[str]) -> None:
    """`name` is asked for, as in `asked`. Raises ValueError where something in use excludes it."""
    for other in in_use:
        if (why := APART.get(frozenset({name, other}))) is not None:
            raise ValueError(f"{asked} does not go with {other}: {why}; {SETTINGS[other][1]}")


def check_call(in_use: Iterable[str]) -> None:
    """Before a call: some settings are made where no pipeline sees it. Raises ValueError as `check`."""
    settings = sorted(in_use)
    for i, name in enumerate(settings):
        check(name, name, settings[i + 1 :])


def contradiction(asked: Mapping[str, str]) -> str | None:
    """What is wrong with settings that are asked for at once; name -> the words in which each is."""
    for one, other in itertools.combinations(asked, 2):
        if (why := APART.get(frozenset({one, other}))) is not None:
            return f"{asked[one]} does not go with {asked[other]}: {why}; give one"
    return None
