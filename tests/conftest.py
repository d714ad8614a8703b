"""What every test shares: what is collected, the cores, few threads, a fixed seed, and the place of the
recorded data."""

import collections
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import joyedit

GOLDENS = Path(__file__).resolve().parent / "goldens"

# What tests import besides joyedit's own dependencies.
FOR_TESTS = ("accelerate", "av", "diffusers", "ftfy", "peft", "scipy", "skimage", "transformers")
LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()  # absent packages -> files that import them


def pytest_configure(config):
    config.stash[LEFT_OUT] = collections.defaultdict(list)


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu` alone, tests that import an absent package are left out, and the summary names them: a
    machine with a GPU seldom has the references. In every other run an absent package is an error."""
    if not (collection_path.match("test_*.py") and only_gpu(config.option.markexpr)):
        return None
    imported = packages_of(collection_path, config.rootpath)
    absent = sorted(name for name in imported.intersection(FOR_TESTS) if not is_installed(name))
    if not absent:
        return None
    config.stash[LEFT_OUT][", ".join(absent)].append(collection_path.relative_to(config.rootpath).as_posix())
    return True


def packages_of(path: Path, root: Path) -> set[str]:
    """What a file imports at its top, and what the modules of benchmarks/ import that it imports there."""
    packages, waiting, read = set(), [path], set()
    while waiting:
        read.add(file := waiting.pop())
        lines = re.findall(
            r"^(?:import|from) ([\w.]+)(?: import ([\w, ]+))?", file.read_text(encoding="utf-8"), re.M
        )
        for module, names in lines:
            packages.add(module.partition(".")[0])
            places = [module, *(f"{module}.{name.strip()}" for name in names.split(","))]
            files = [
                root / f"{place.replace('.', '/')}.py" for place in places if place.startswith("benchmarks")
            ]
            waiting += [one for one in files if one.is_file() and one not in read]
    return packages


def pytest_terminal_summary(terminalreporter, config):
    for packages, files in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.section(f"not collected, {packages} not installed", sep="-")
        for file in files:
            terminalreporter.line(file)


def only_gpu(marks: str) -> bool:
    """Whether a marker expression selects tests for a GPU and no others: "gpu", "gpu and not slow"."""
    return re.fullmatch(r"gpu( and (not )?\w+)*", marks) is not None


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # the import is blocked
        return False


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which acts on the options
def pytest_cmdline_main(config):
    """With pytest-xdist, the tests are spread over the cores, unless the command line says otherwise or would
    lose by it: tests that share one GPU, a debugger, output as it comes, or files named one by one (each
    process needs seconds to begin)."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    chosen = option.numprocesses is not None or option.dist != "no" or option.tx or option.distload
    looking = ("usepdb", "trace", "collectonly", "showfixtures", "show_fixtures_per_test", "setupplan")
    looks = option.capture == "no" or any(config.getoption(name, False) for name in looking)
    named = all(Path(argument.partition("::")[0]).is_file() for argument in config.args)
    on_gpu = "gpu" in option.markexpr.replace("not gpu", "")
    if not (chosen or looks or named or on_gpu) and (workers := usable_cores()) > 1:
        option.numprocesses, option.dist = workers, "worksteal"
        # Read when torch is loaded, so by the workers: with more threads than cores, waiting ones take time.
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


def pytest_collection_modifyitems(items):
    """Tests in several processes come first and are one group, so that these processes are started once."""
    together = {item for item in items if "workers" in getattr(item, "fixturenames", ())}
    for item in together:
        item.add_marker(pytest.mark.xdist_group("workers"))
    items.sort(key=lambda item: item not in together)  # else as it was


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return usable_cores()


def usable_cores() -> int:
    """Those that this process may run on, at most eight: each worker needs 1 GB, and ten seconds to begin."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    import torch  # here: the process that only hands out tests does without

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workers():
    """Processes that work together: see tests/workers.py."""
    from tests.workers import Workers

    together = Workers()
    yield together
    together.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded runs and published configs beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(scope="session")
def goldens(tmp_path_factory) -> SimpleNamespace:
    """What `tests/goldens/record.py` recorded from the reference.

    checkpoint: the folder in the published layout. cases and runs: arguments and tensors of whole runs.
    described and encoders: the same of the processor and the prompt encoder. photos(case): the `image`
    argument.
    """
    from safetensors.torch import load_file

    checkpoint = tmp_path_factory.mktemp("goldens") / "tiny-joyimage-edit"
    shutil.copytree(GOLDENS / checkpoint.name, checkpoint)
    shutil.copytree(checkpoint / "tokenizer", checkpoint / "processor", dirs_exist_ok=True)
    recorded = json.loads((GOLDENS / "recorded.json").read_text(encoding="utf-8"))

    def photos(name):
        opened = [Image.open(GOLDENS / "photos" / photo) for photo in recorded["cases"][name]["image"] or ()]
        return opened[0] if len(opened) == 1 else opened or None

    return SimpleNamespace(
        checkpoint=checkpoint,
        cases=recorded["cases"],
        described=recorded["encoders"],
        photos=photos,
        runs=load_file(GOLDENS / "runs.safetensors"),
        encoders=load_file(GOLDENS / "encoders.safetensors"),
    )


@pytest.fixture(scope="session")
def sd_reference() -> dict:
    """Tiny networks of Stable Diffusion 1.x and 2.x in the reference, with the four levels and the layers of
    the released ones: release -> part -> network."""
    import diffusers
    import torch
    import transformers

    def networks(release):
        torch.manual_seed(release)
        widths = (32, 32, 64, 64) if release == 1 else (64, 64, 128, 128)
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=widths,
            attention_head_dim=8 if release == 1 else [width // 64 for width in widths],
            cross_attention_dim=128,
            use_linear_projection=release == 2,
            sample_size=64 if release == 1 else 96,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=512 if release == 1 else 768,
        )
        text = transformers.CLIPTextConfig(
            vocab_size=548,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="quick_gelu" if release == 1 else "gelu",
        )
        made = {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(text)}
        for network in made.values():
            network.eval().requires_grad_(False)
            for parameter in network.parameters():
                if parameter.ndim == 1:  # norms and biases: of ones and zeros no mistake would show
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return made

    return {release: networks(release) for release in (1, 2)}


@pytest.fixture(scope="session")
def sd_states(sd_reference) -> dict:
    """Their tensors: release -> part -> state dict."""
    return {
        release: {part: network.state_dict() for part, network in networks.items()}
        for release, networks in sd_reference.items()
    }


@pytest.fixture
def sd_released(shared_data):
    """A function: name of a published checkpoint -> part -> its tensors at their own size, each a single zero
    that takes no memory."""
    import torch

    kinds = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "safety_checker": "StableDiffusionSafetyChecker",
    }

    def zeros(name):
        found = {}
        for part in kinds:
            if (shared_data / name / part).is_dir():
                with torch.device("meta"):
                    network = getattr(joyedit, kinds[part]).from_config(shared_data / name / part)
                sizes = {key: value.shape for key, value in network.state_dict().items()}
                found[part] = {k: torch.zeros(1, dtype=torch.float16).expand(v) for k, v in sizes.items()}
        return found

    return zeros


@pytest.fixture
def write_zeros():
    """A function: path, tensors (names to fp16) -> a safetensors file of these names and shapes, all zeros,
    which takes no place on the disk."""

    def write(path, tensors):
        header, end = {}, 0
        for name, tensor in tensors.items():
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        with path.open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            out.truncate(8 + len(encoded) + end)

    return write


@pytest.fixture
def run(capsys):
    """A joyedit command's status, standard output and standard error."""
    from joyedit.command import cli

    def run(*words):
        status = cli.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model is a failure."""
    from joyedit.loading import layouts

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(layouts, "load", load)
    monkeypatch.setattr(layouts, "open_unread", load)


@pytest.fixture(scope="module")
def random_built_in(tmp_path_factory):
    """The built-in names stand for checkpoints of random weights, in a file that asks for it: there every
    seed gives another image, and ChronoEdit has a preset, and films of as many pixels as 256 x 256."""
    from benchmarks import random_checkpoint
    from joyedit.checkpoints.json_files import read_json, write_json
    from joyedit.loading import layouts

    folder = tmp_path_factory.mktemp("assets")
    random_checkpoint.write_random_checkpoint(folder / "tiny-joyimage")
    random_checkpoint.write_random_diffedit_checkpoint(folder / "tiny-diffedit")
    random_checkpoint.write_random_chronoedit_checkpoint(folder / "tiny-chronoedit")
    index = folder / "tiny-chronoedit" / "model_index.json"
    write_json(index, {**read_json(index), "made_for": {"basesize": 256}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "ASSETS", folder)
        yield folder
