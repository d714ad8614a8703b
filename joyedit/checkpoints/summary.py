"""What `repr` shows of settings, pipelines and adapters: a line for each thing, as a notebook prints it."""

from collections.abc import Mapping, Sequence
from typing import Any


def settings(name: str, values: Mapping[str, Any]) -> str:
    """The settings of one object."""
    lines = [f"  {key}={indented(repr(value))}," for key, value in values.items()]
    return "\n".join([f"{name}(", *lines, ")"]) if lines else f"{name}()"


def parts(name: str, found: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """The parts of a pipeline: class, and of networks parameters, dtypes and devices; then what else is to be
    said of it, as far as it is."""
    rows = [(part, *cells(value)) for part, value in found.items()]
    rows += [(fact, text) for fact, text in facts.items() if text]
    return "\n".join([name, *columns(rows)])


def cells(part: Any) -> tuple[str, ...]:
    """What is said of one part."""
    kind = type(part).__name__
    if part is None or not hasattr(part, "named_parameters"):
        return ("none" if part is None else kind,)
    tensors = [tensor for _, tensor in part.named_parameters()]
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    devices = dict.fromkeys(str(tensor.device) for tensor in tensors)
    ours = hasattr(part, "num_parameters")  # it leaves out the scales of quantised weights
    count = part.num_parameters() if ours else sum(tensor.numel() for tensor in tensors)
    return kind, f"{count:,} parameters", " + ".join(dtypes), " + ".join(devices)


def adapters(states: Mapping[str, Any]) -> str:
    """The adapters of some networks, network -> its state: what each is in, how strongly, and whether."""
    names = dict.fromkeys(name for state in states.values() for name in state.loaded)
    return "\n".join(
        ["Adapters", *columns([(name, in_use(name, states)) for name in names])] if names else ["no adapters"]
    )


def in_use(name: str, states: Mapping[str, Any]) -> str:
    """Where an adapter is, and with which weight."""
    said = []
    for network, state in states.items():
        if name not in state.loaded:
            continue
        if name in state.fused:
            said.append(f"fused into {network} with {state.fused[name]:g}")
        elif name in state.active:
            off = "" if state.enabled else ", disabled"
            said.append(f"active in {network} with {state.weights[name]:g}{off}")
        else:
            said.append(f"loaded for {network}")
    return ", ".join(said)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells one below the other, indented; a last cell may have several lines."""
    widths = [max((len(row[i]) for row in rows if len(row) > i + 1), default=0) for i in range(8)]
    lines = []
    for row in rows:
        cut = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  " + "  ".join([*cut, indented(row[-1])]).rstrip())
    return lines


def indented(text: str) -> str:
    """A text of several lines, two letters further in, but for its first."""
    return text.replace("\n", "\n  ")
