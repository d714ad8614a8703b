"""Loaders against files that were changed at random: they load, or raise ValueError, TypeError or OSError.

Each kind of file runs in a process of its own, which this file is the program of too: its memory is limited
and measured, so that a loader that takes gigabytes before it refuses fails. Files are changed in their
structure (a value for another, a key gone, an instruction of a pickle for another) and in their bytes. All is
seeded: a failure is printed with its number, and `python tests/loading/test_fuzz.py KIND NUMBER` repeats it.
"""

import copy
import dataclasses
import io
import json
import logging
import math
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "joyedit" / "assets"
COUNTS = {"headers": 1000, "configs": 500, "pickles": 300, "schedulers": 300}
LIMIT = 1_500_000_000  # bytes of address space beyond what the loaded program has
GROWTH = 400_000_000  # bytes of memory beyond what loading the unchanged files takes
SECONDS = 10  # for one file


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_changed_files_load_or_are_refused(kind):
    done = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["escaped"] == []
    assert found["growth"] < GROWTH, found
    assert found["slowest"] < SECONDS, found
    # Were all refused, or none, the changes would prove nothing.
    assert found["loaded"] > 0.02 * COUNTS[kind] and found["refused"] > 0.2 * COUNTS[kind], found


DEEP, LONG = "@deep@", "@long@"  # written as what no JSON library writes
HOSTILE = [
    *(None, True, False, 0, 1, -1, 3, 10**6, 10**9, -(2**62), 2**62, 2**63, 2**64, 10**30, 0.5, -0.0),
    *(1e308, -1e308, float("nan"), float("inf"), "", "text", "64", "\x1b[31mred", "\u202e", "\ud800"),
    *("a" * 10_000, "../../x", [], {}, [[]], {"a": 1}, [1, 2, 3], [1] * 5000, ["x"], [None], DEEP, LONG),
]


def nodes(value):
    """(container, key) of everything inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from nodes(value[key])


def changed_json(text, chance):
    """A JSON text with one to three values changed, or bytes."""
    if chance.random() < 0.25:
        return changed_bytes(text.encode(), chance)
    value = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        where = list(nodes(value))
        if not where:
            break
        container, key = chance.choice(where)
        match chance.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[chance.choice(["", "x", "num_layers", "\x1b", "a" * 3000])] = container.pop(key)
            case 2:
                other, its = chance.choice(where)
                if its in other if isinstance(other, dict) else its < len(other):
                    container[key] = json.loads(json.dumps(other[its]))
            case _:
                container[key] = copy.deepcopy(chance.choice(HOSTILE))
    written = json.dumps(value)
    written = written.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return written.replace(json.dumps(LONG), "1" + "0" * 5000).encode()


def changed_bytes(data, chance):
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(max(len(data), 1))
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.choice([1, 1, 8, 1000])]
            case 2:
                data[at:at] = chance.randbytes(chance.choice([1, 4, 8]))
            case 3:
                data[at : at + 8] = struct.pack("<q", chance.choice([-1, 2**31, 2**40, 2**62]))
    return bytes(data)


class Bench:
    """The files of one kind, and what opens them. `cases`: (file that is changed, function that opens it)."""

    def __init__(self, folder):
        self.folder = folder
        self.cases = []

    def copied(self, asset):
        target = self.folder / asset.replace("/", "-")
        shutil.copytree(ASSETS / asset, target)
        return target


def headers(bench):
    """safetensors files of a network, of an adapter, of a learned word."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from joyedit.checkpoints.config import Config
    from joyedit.checkpoints.network import Network, load_network
    from joyedit.checkpoints.tensor_files import TensorFiles
    from joyedit.convert.table import IDENTITY, Layout, fuse, split
    from joyedit.lora import Adapters
    from joyedit.text.textual_inversion import read_word

    @dataclasses.dataclass(frozen=True)
    class SmallConfig(Config):
        width: int = 4

    class Small(Network):
        Config = SmallConfig

        def __init__(self, config=None):
            super().__init__(config or SmallConfig())
            self.q, self.k, self.out = (nn.Linear(self.config.width, 4) for _ in range(3))

        def layouts(self):
            rules = (split("qk.{leaf}", ("q.{leaf}", "k.{leaf}")), fuse(("a", "b"), "out.weight"), IDENTITY)
            return Layout("diffusers", (IDENTITY,)), Layout("original", rules)

    network = Small().requires_grad_(False)
    state = dict(network.state_dict())
    fused = {f"qk.{leaf}": torch.cat([state[f"q.{leaf}"], state[f"k.{leaf}"]]) for leaf in ("weight", "bias")}
    fused |= {"a": state["out.weight"][:2], "b": state["out.weight"][2:], "out.bias": state["out.bias"]}
    factors = {
        "transformer.q.lora_A.weight": torch.ones(2, 4),
        "transformer.q.lora_B.weight": torch.ones(4, 2),
    }
    factors |= {"transformer.k.diff_b": torch.ones(4), "transformer.q.alpha": torch.tensor(2.0)}
    settings = {"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"k": 2, ".*q": 1}}

    def open_network(path):
        load_network(Small, SmallConfig(), TensorFiles([path]))

    def open_adapter(path):
        adapters = Adapters({"transformer": Small().requires_grad_(False)})
        try:
            adapters.load_lora_weights(path)
        finally:
            adapters.unload_lora_weights()

    def open_word(path):
        read_word(path, None, None, "", {})

    for name, tensors, opened in (
        ("own", state, open_network),
        ("fused", fused, open_network),
        ("adapter", factors, open_adapter),
        ("word", {"<toy>": torch.ones(2, 4)}, open_word),
    ):
        path = bench.folder / f"{name}.safetensors"
        save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
        bench.cases.append((path, opened))


BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I8": 1,
    "U8": 1,
    "U32": 4,
    "BOOL": 1,
}
SHAPES = [
    [],
    [0],
    [1],
    [4],
    [5],
    [2, 4],
    [4, 2],
    [4, 4],
    [0, 4],
    [4, 0],
    [1, 4],
    [4, 4, 1, 1],
    [2**40, 0],
    [1] * 9,
]
ROLES = [
    "lora_A.weight",
    "lora_B.weight",
    "alpha",
    "diff",
    "diff_b",
    "diff_m",
    "w_norm",
    "weight",
    "bias",
    "odd",
]


def another_file(header, chance):
    """A whole file, in which one or two tensors have another dtype, shape or name."""
    for _ in range(chance.randint(1, 2)):
        name = chance.choice([name for name in header if name != "__metadata__"])
        match chance.randrange(3):
            case 0:
                header[name]["dtype"] = chance.choice(list(BYTES))
            case 1:
                header[name]["shape"] = chance.choice(SHAPES)
            case 2:
                header[f"{name.split('.')[0]}.q.{chance.choice(ROLES)}"] = dict(header[name])
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = end, end + BYTES[entry["dtype"]] * math.prod(entry["shape"])
            entry["data_offsets"] = [start, end]
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + chance.randbytes(end)


def changed_header(data, chance):
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if chance.random() < 0.4:
        return another_file(json.loads(header), chance)
    if chance.random() < 0.3:
        whole = json.loads(header)
        whole["__metadata__"]["lora_adapter_metadata"] = changed_json(
            whole["__metadata__"]["lora_adapter_metadata"], chance
        ).decode("latin-1")
        header = json.dumps(whole).encode()
    else:
        header = changed_json(header.decode(), chance)
    if chance.random() < 0.1:
        return changed_bytes(data, chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def configs(bench):
    """Settings of every network of the built-in checkpoints, of tokenizers and image processors, indices."""
    import torch

    import joyedit
    from joyedit.checkpoints.hub import Origin
    from joyedit.checkpoints.network import Network, plan_folder
    from joyedit.checkpoints.options import LoadOptions
    from joyedit.loading.layouts import pipeline_name, read_made_for

    torch.set_num_threads(1)
    for asset in ("tiny-joyimage", "tiny-diffedit", "tiny-chronoedit"):
        folder = bench.copied(asset)
        index = json.loads((folder / "model_index.json").read_text())
        bench.cases.append(
            (
                folder / "model_index.json",
                lambda path: (pipeline_name(path.parent), read_made_for(path.parent)),
            )
        )
        for part, listed in index.items():
            if (
                not isinstance(listed, list)
                or len(listed) != 2
                or listed[1] is None
                or "cheduler" in listed[1]
            ):
                continue
            kind = getattr(joyedit, listed[1].replace("WanTransformer", "ChronoEditTransformer"), None)
            for path in (folder / part).glob("*.json"):
                if kind is None or path.name == "tokenizer.json":
                    continue
                if issubclass(kind, Network):

                    def opened(path, kind=kind):
                        plan_folder(kind, Origin(str(path.parent)), "", LoadOptions())
                else:

                    def opened(path, kind=kind):
                        kind.from_pretrained(path.parent)

                bench.cases.append((path, opened))


def schedulers(bench):
    import joyedit

    flow, ddim, unipc = {"shift": 1.5}, {"beta_schedule": "scaled_linear", "steps_offset": 1}, {}
    unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    for kind, settings in (
        (joyedit.FlowMatchEulerDiscreteScheduler, flow),
        (joyedit.DDIMScheduler, ddim),
        (joyedit.DDIMInverseScheduler, ddim),
        (joyedit.DDIMScheduler, {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
        (joyedit.UniPCMultistepScheduler, unipc),
        (joyedit.UniPCMultistepScheduler, {}),
    ):
        folder = bench.folder / f"{kind.__name__}-{len(bench.cases)}"
        kind(**settings).save_pretrained(folder)

        def opened(path, kind=kind):
            kind.from_pretrained(path.parent)

        bench.cases.append((folder / "scheduler_config.json", opened))


def pickles(bench):
    """State dicts in both forms, as Lightning wraps them, and learned words of both kinds."""
    import torch
    from torch import nn

    from joyedit.checkpoints.tensor_files import TensorFiles
    from joyedit.text.textual_inversion import read_word

    def open_tensors(path):
        files = TensorFiles([path])
        for name in files:
            files[name].float().sum()

    def open_word(path):
        read_word(path, None, None, "", {})

    state = nn.Linear(3, 4).state_dict()
    word = {"string_to_param": {"*": torch.ones(2, 4)}, "name": "<toy>", "step": 3}
    listed = {"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(4))}), "name": "toy"}
    for name, value, opened in (
        ("state", state, open_tensors),
        ("lightning", {"state_dict": state, "global_step": 3, "lr": [0.1, {}]}, open_tensors),
        ("fp8", {"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, open_tensors),
        ("word", word, open_word),
        ("parameters", listed, open_word),
    ):
        for form in (
            (True, False) if name not in ("fp8", "parameters") else (True,)
        ):  # torch cannot read these two
            path = bench.folder / f"{name}-{form}.pt"
            torch.save(value, path, _use_new_zipfile_serialization=form)
            bench.cases.append((path, opened))


def changed_pickle(data, chance):
    """Instructions or bytes of the program changed; of a zip archive the other records stay whole."""
    if data[:2] != b"PK" or chance.random() < 0.15:
        return changed_bytes(changed_program(data, chance), chance)
    out, program = io.BytesIO(), chance.random() < 0.8
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl") and program:
                content = changed_program(content, chance)
            elif "/data/" in entry.filename and not program:
                content = changed_bytes(content, chance)
            new.writestr(entry.filename, content, chance.choice([0] * 19 + [zipfile.ZIP_DEFLATED]))
    return out.getvalue()


INSERTED = [
    *(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R"),
    *(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff?", b"J\xff\xff\xff\xff", b"K\x01", b"N", b"\x88", b"]", b"}"),
    *(
        b")",
        b"(",
        b"t",
        b"\x85",
        b"0",
        b"1",
        b"2",
        b"R",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b"Q",
        b"h\x00",
        b"q\x00",
    ),
    *(b"X\x02\x00\x00\x00ab", b"X\xff\xff\xff\x7fab", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x00", b"\x8f", b"."),
    *(b"cos\nsystem\n", b"ctorch\nTensor\n", b"r\xff\xff\xff\x7f", b"\x85" * 3000, b"]" * 5000),
]


def changed_program(data, chance):
    import pickletools

    try:
        places = [position for _, _, position in pickletools.genops(data)]
    except ValueError:
        return changed_bytes(data, chance)
    places = [place for place in places if place is not None]
    for _ in range(chance.randint(1, 2)):
        start = chance.choice(places)
        end = min((p for p in places if p > start), default=start + 1)
        match chance.randrange(4):
            case 0:
                data = data[:start] + data[end:]
            case 1:
                data = data[:start] + chance.choice(INSERTED) + data[end:]
            case 2:
                data = data[:start] + chance.choice(INSERTED) + data[start:]
            case 3:
                number = chance.choice([-1, 0, 5, 2**31 - 1])
                big = b"\x8a\x08" + struct.pack("<q", chance.choice([-1, 2**40, 2**62]))
                data = data[:start] + chance.choice([b"J" + struct.pack("<i", number), big]) + data[end:]
    return data


CHANGES = {
    "headers": changed_header,
    "pickles": changed_pickle,
    "configs": lambda data, chance: changed_json(data.decode(), chance),
    "schedulers": lambda data, chance: changed_json(data.decode(), chance),
}


def opened_within_time(opened, path):
    """ "loaded", "refused", or what else became of it."""

    def late(number, frame):
        raise AssertionError(f"not refused within {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        opened(path)
        return "loaded"
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        if "weights_only=False" in message or not message.replace("\n", "").isprintable():
            return f"message {message!r}"[:300]
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def memory():
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(status.split(f"{key}:")[1].split()[0]) for key in ("VmHWM", "VmSize"))


def run(kind, only=None):
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        {"headers": headers, "configs": configs, "pickles": pickles, "schedulers": schedulers}[kind](bench)
        for path, opened in bench.cases:
            opened(path)  # unchanged, all of them load
        peak, size = memory()
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, -1))
        found = {"loaded": 0, "refused": 0, "slowest": 0.0, "escaped": []}
        for number in range(COUNTS[kind]) if only is None else [only]:
            chance = random.Random(f"{kind} {number}")
            path, opened = bench.cases[number % len(bench.cases)]
            whole = path.read_bytes()
            path.write_bytes(CHANGES[kind](whole, chance))
            start = time.perf_counter()
            if only is not None:
                opened(path)
            outcome = opened_within_time(opened, path)
            found["slowest"] = max(found["slowest"], time.perf_counter() - start)
            if outcome in found:
                found[outcome] += 1
            else:
                found["escaped"].append([number, path.name, outcome])
            path.unlink()  # a new file: the old one may be mapped
            path.write_bytes(whole)
        found["growth"] = memory()[0] - peak
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
