"""What the file of a Stable Diffusion model says of what its network predicts, noise or v.

Sizes do not tell it, and programs have written it in several places: empty tensors called v_pred and ztsnr
(read by ComfyUI and the A1111 interface), keys of the header (Stability's model spec, and what sd-scripts
trained with), and a configuration of the original code beside the file.

Source: ComfyUI `supported_models.py`; sd-scripts `sai_model_spec.py`, `train_network.py`; the .yaml files of
Stability-AI stablediffusion; arXiv 2305.08891 (zero terminal signal, ztsnr).
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from joyedit.checkpoints.tensor_files import safetensors_header

log = logging.getLogger("joyedit")

V_MARK, ZERO_SIGNAL_MARK = "v_pred", "ztsnr"
MARKS = frozenset({V_MARK, ZERO_SIGNAL_MARK})

KINDS = {
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("x0", "sample"), "sample"),
}
HEADER_KEYS = ("modelspec.predict_key", "modelspec.prediction_type")
V_KEY, ZERO_SIGNAL_KEY = "ss_v_parameterization", "ss_zero_terminal_snr"
PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?(\w+)""", re.MULTILINE)
LONGEST_YAML = 2**18


@dataclasses.dataclass(frozen=True)
class Prediction:
    """said: where -> what the network predicts. zero_signal: where it says that the last step of training had
    no signal, None nowhere."""

    said: Mapping[str, str]
    zero_signal: str | None

    @classmethod
    def read(cls, path: Path, names: Iterable[str]) -> Self:
        """names: of the file's tensors. Raises ValueError for a word that is none of the three kinds."""
        names = MARKS.intersection(names)
        header = safetensors_header(path).get("__metadata__") if path.suffix == ".safetensors" else None
        header = header if isinstance(header, Mapping) else {}
        zero_signal = f"the tensor {ZERO_SIGNAL_MARK}" if ZERO_SIGNAL_MARK in names else None
        if str(header.get(ZERO_SIGNAL_KEY)).lower() == "true":
            zero_signal = zero_signal or f"{ZERO_SIGNAL_KEY} in its header"
        said = {}
        for where, word in _words(path, names, header):
            if word.lower() not in KINDS:
                raise ValueError(
                    f"{path}: {where} is {word[:40]!r}, which is no kind of prediction known here"
                )
            said[where] = KINDS[word.lower()]
        return cls(said, zero_signal)

    def settle(self, path: Path, given: str | None) -> str | None:
        """What the network predicts: as given, else as said; None where nothing says it. Raises ValueError
        when nothing is given and two places contradict each other."""
        kinds = set(self.said.values())
        told = "; ".join(f"{where} says {kind}" for where, kind in self.said.items())
        if given is not None:
            if kinds - {given}:
                log.info("%s: prediction_type=%r was given, though %s", path, given, told)
            return given
        if len(kinds) > 1:
            raise ValueError(f"{path}: {told}: pass prediction_type= with the right one")
        if kinds:
            log.info("%s: %s", path, told)
        return next(iter(kinds), None)


def _words(path: Path, marks: Iterable[str], header: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(place, word) of all that is said."""
    if V_MARK in marks:
        yield f"the tensor {V_MARK}", "v"
    for key in HEADER_KEYS:
        if header.get(key):
            yield f"{key} in its header", str(header[key])
    trained_on_v = str(header.get(V_KEY)).lower()
    if trained_on_v in ("true", "false"):
        yield f"{V_KEY} in its header", "v" if trained_on_v == "true" else "epsilon"
    for beside in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if beside.is_file():
            with beside.open("rb") as file:
                found = PARAMETERIZATION.search(file.read(LONGEST_YAML).decode("utf-8", "replace"))
            yield f"{beside.name} beside it", found[1] if found else "eps"  # the original code's default
