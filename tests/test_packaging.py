"""What gets installed, under which names, and what an import costs.

The package is built from the files that git would archive, in a folder of its own, so that neither the
checkout nor its editable install can stand in for what a wheel or an sdist lacks.
"""

import ast
import inspect
import os
import pkgutil
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import types
import venv
import zipfile
from pathlib import Path

import pytest

import joyedit
from joyedit.loading.layouts import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed, started with nothing of ours on its path."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path, **env: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, **env).strip()


def package_files(folder: Path) -> set[str]:
    """Every file below the package folder, links followed."""
    found = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {Path(where, name).relative_to(folder.parent).as_posix() for name in names}
    return found


@pytest.mark.parametrize("arguments", ["-c 'import joyedit'", "-m joyedit --help", "-m joyedit --version"])
def test_import_and_help_load_no_heavy_module(arguments):
    heavy = {"torch", "triton", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "einops"}
    words = {"-c 'import joyedit'": ["-c", "import joyedit"]}.get(arguments, arguments.split())
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, [line for line in lines if not line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "joyedit" in loaded
    assert not loaded & heavy


def test_names_for_type_checkers_are_the_names_at_run_time():
    tree = ast.parse(Path(joyedit.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in imports for alias in node.names)
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert typed == joyedit._MODULE_OF
    assert set(joyedit.__all__) == {"__version__", *typed}
    assert set(joyedit.__all__) <= set(dir(joyedit))


def test_no_submodule_takes_the_place_of_a_public_name(tmp_path):
    for module in pkgutil.walk_packages(joyedit.__path__, "joyedit."):
        if "kernels" not in module.name and "__main__" not in module.name:
            __import__(module.name)
    for name in joyedit.__all__:
        value = getattr(joyedit, name)
        assert not isinstance(value, types.ModuleType), f"joyedit.{name} became a module"
        named = {"JoyImageEditPlusTransformer3DModel": "JoyImageEditTransformer3DModel"}.get(name, name)
        assert name == "__version__" or value.__name__ == named
    assert inspect.isfunction(joyedit.load)
    with pytest.raises((FileNotFoundError, ValueError), match=tmp_path.name):
        joyedit.load(str(tmp_path))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        joyedit.Pipelin  # noqa: B018


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The tracked files (and those about to be), links as links, elsewhere."""
    folder = tmp_path_factory.mktemp("archive") / "src"
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = [name for name in run(git, *listing, cwd=ROOT).split("\0") if os.path.lexists(ROOT / name)]
        for name in filter(None, names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    else:
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "dist", "*venv")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=unwanted)
    return folder


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel or an sdist of `source`, made in `target` by the build backend that pyproject.toml names."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / python(code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    return build("wheel", archive, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(archive, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", archive, folder / "packed")) as packed:
        packed.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.name != "packed")


def test_wheel_holds_the_package_and_nothing_else(wheel, archive):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"joyedit", f"joyedit-{joyedit.__version__}.dist-info"}
    assert {name for name in names if name.startswith("joyedit/")} == package_files(archive / "joyedit")
    assert {"joyedit/py.typed", "joyedit/convert/table.py", "joyedit/assets/demo/demo.json"} <= names
    for name in BUILT_IN:
        assert {f"joyedit/assets/{name}/{file}" for file in ("model_index.json", "vae/config.json")} <= names
    assert "joyedit/kernels/__init__.py" not in names


def test_wheel_metadata(wheel):
    info = f"joyedit-{joyedit.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        assert "joyedit = joyedit.command.cli:main" in opened.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in opened.read(f"{info}/licenses/LICENSE").decode()
        metadata = opened.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_wheel_imports_from_anywhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    code = "import joyedit, joyedit.checkpoints.network, joyedit.convert.table as t; "
    code += "print(joyedit.__file__, t.__file__)"
    files = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked")).split()
    assert all(Path(file).is_relative_to(tmp_path / "unpacked") for file in files)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    again = build("wheel", sdist, tmp_path)
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    assert (sdist / "LICENSE").is_file() and (sdist / "CHANGELOG.md").is_file()


def test_packages_and_dependencies_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = {name for name in package_files(ROOT / "joyedit") if name.endswith(".py")}
    folders = {name.rpartition("/")[0].replace("/", ".") for name in modules}
    assert set(settings["tool"]["setuptools"]["packages"]) == folders
    extras = settings["project"]["optional-dependencies"]
    assert set(extras) == {"video", "chrono", "gguf", "quant", "test", "dev"}
    named = {name: {re.split(r"[<>=]", one)[0] for one in wanted} for name, wanted in extras.items()}
    assert named["video"] | named["chrono"] <= named["test"]
    for requirement in settings["project"]["dependencies"]:
        version = requirement.partition(";")[0]
        assert ">=" in version and "<" not in version and "==" not in version, "lower bounds only"


@pytest.fixture
def environment(tmp_path) -> Path:
    """The python of a fresh virtual environment that sees our dependencies but not our editable install."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (own_packages(executable) / "dependencies.pth").write_text(
        "\n".join(site.getsitepackages()), encoding="utf-8"
    )
    return executable


def own_packages(executable: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(executable, "-c", code, cwd=executable.parent).strip())


def install(environment: Path, *what: str | Path) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        environment,
        "install",
        *options,
        *what,
        cwd=environment.parent,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def test_install_elsewhere(kind, environment, tmp_path, request):
    install(environment, request.getfixturevalue(kind))
    version = run(environment.with_name("joyedit"), "--version", cwd=tmp_path)
    assert joyedit.__version__ in version
    code = "import joyedit, joyedit.convert.table; joyedit.JoyImageEditPipeline; print(joyedit.__file__)"
    file = run(environment, "-c", code, cwd=tmp_path).strip()
    assert Path(file).is_relative_to(own_packages(environment))
    found = run(environment.with_name("joyedit"), "info", "tiny-joyimage", cwd=tmp_path).splitlines()
    assert "name: tiny-joyimage" in found and "layout: diffusers" in found


def test_editable_install_reaches_the_links(environment, archive, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(archive, source, symlinks=True)
    install(environment, "-e", source)
    (source / "convert" / "added.py").write_text('"""Written after the install."""\n', encoding="utf-8")
    code = "import joyedit, joyedit.convert.added as added; print(joyedit.__file__, added.__file__)"
    files = run(environment, "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(source) for file in files)
    code = "import importlib.util as u; print(u.find_spec('convert'), u.find_spec('kernels'))"
    assert str(source) not in run(environment, "-c", code, cwd=tmp_path)


@pytest.fixture
def checkout_with_kernels(archive, tmp_path) -> Path:
    source = tmp_path / "src"
    shutil.copytree(archive, source, symlinks=True)
    (source / "kernels").mkdir(exist_ok=True)
    (source / "kernels" / "some_op.py").touch()
    return source


def test_another_package_named_kernels_wins_in_the_checkout(checkout_with_kernels, tmp_path):
    """transformers and diffusers import Hugging Face's `kernels` where it is installed."""
    other = tmp_path / "other" / "kernels" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.touch()
    code = "import kernels; print(kernels.__file__)"
    assert python(code, cwd=checkout_with_kernels, PYTHONPATH=str(tmp_path / "other")) == str(other)


@pytest.mark.slow
def test_references_import_in_the_checkout(checkout_with_kernels):
    code = "from transformers import Qwen3VLForConditionalGeneration; from diffusers import AutoencoderKLWan"
    python(code, cwd=checkout_with_kernels)
