"""Where a model computes, and in which precision: options of every command that runs one."""

from collections.abc import Callable
from typing import Any

from joyedit.command.values import memory_size

DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")


def add_options(add: Callable[..., Any]) -> None:
    """add: `add_argument` of a parser or of a group."""
    add("--device", metavar="DEVICE", help="auto (an accelerator if there is one), cpu, cuda, cuda:1, mps")
    add(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES[:4])}; default: auto (as stored)"
    )
    add(
        "--offload",
        choices=("none", "model", "sequential"),
        help="keep the networks in main memory and bring one, or one block, at a time to the accelerator",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=memory_size,
        help="hold no more than this where the model computes, as 12G: GPU memory, or without a GPU the "
        "process's; what does not fit comes block by block",
    )
