"""Which module may import which, and the other rules that keep each file readable on its own."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 700

# The table of docs/architecture.md is what this file holds the code to.
TABLE = ROOT / "docs" / "architecture.md"


def rooms() -> dict[str, list[str]]:
    """Room or module -> what it may import of ours, out of the table that begins with "| room"."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| room"))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        room, _, allowed, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found[full(room.strip("`"))] = re.findall(r"`([\w./]+)`", allowed)
    return found


def full(room: str) -> str:
    """The import name of a room or module as the table spells it."""
    return "joyedit" if room == "__init__" else "joyedit." + room.removesuffix("/").replace("/", ".")


MAY_IMPORT = rooms()
ONLY_INSIDE_FUNCTIONS = {"joyedit.ops": ["kernels"]}

# Packages beside the standard library and ours; the rest of the modules may use what pyproject.toml lists.
THIRD_PARTY = {
    "joyedit": ["huggingface_hub"],
    "joyedit.checkpoints.hub": ["huggingface_hub"],
    "joyedit.convert": ["torch", "safetensors"],
    "joyedit.kernels": ["torch", "triton"],
    "joyedit.schedulers": ["torch", "numpy"],
    "joyedit.models": ["torch", "einops"],
    "joyedit.ops": ["torch", "einops"],
}
IMPORT_NAMES = {"pillow": "PIL"}


def sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder in ("joyedit", "convert", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "joyedit" else ("joyedit", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def every_module(check: Callable[[str], None]) -> Callable[[], None]:
    """One test for all modules: 500 would take longer to report than to run. Failures name the module."""

    def test() -> None:
        for name in SOURCES:
            check(name)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name: str) -> list[tuple[str, bool]]:
    """(module, whether it waits for a call) of every import statement; ours down to the module named."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} has a relative import"
            origin = node.module or ""
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                found.append((whole if whole in SOURCES or origin == "joyedit" else origin, inside))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree(name), False)
    return found


def row(table: dict[str, list[str]], name: str) -> list[str] | None:
    """The entry of a module, or of the folder that it is in."""
    folder = name.rpartition(".")[0]
    return table.get(name, table.get(folder) if folder != "joyedit" else None)


def covers(allowed: list[str], target: str) -> bool:
    return any(target == full(name) or target.startswith(f"{full(name)}.") for name in allowed)


@every_module
def test_imports_of_ours_follow_the_table(name):
    allowed = row(MAY_IMPORT, name)
    assert allowed is not None, f"{name} has no row in {TABLE.name}: what may it import?"
    deferred = ONLY_INSIDE_FUNCTIONS.get(name, [])
    for target, inside in imports(name):
        if (target == "joyedit" or target.startswith("joyedit.")) and target != "joyedit.__version__":
            assert covers(allowed, target), f"{name} must not import {target}"
            assert inside or not covers(deferred, target), f"{name} may import {target} only inside functions"


@every_module
def test_imports_of_others_are_declared(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        found = (re.match(r"[\w-]+", requirement) for requirement in requirements)
        return {IMPORT_NAMES.get(match[0], match[0]) for match in found if match}

    extras = project["optional-dependencies"]
    declared = names(project["dependencies"])
    optional = names([one for name in ("video", "chrono", "gguf", "quant") for one in extras[name]])
    for target, inside in imports(name):
        top = target.partition(".")[0]
        if top == "joyedit" or top in sys.stdlib_module_names:
            continue
        allowed = row(THIRD_PARTY, name)
        if allowed is None:
            allowed = declared - {"triton"} | (optional if inside else set())
        assert top in allowed, f"{name} must not import {top}"


@every_module
def test_file_has_a_docstring_and_a_readable_length(name):
    assert ast.get_docstring(tree(name)), f"{SOURCES[name]} has no module docstring"
    lines = len(SOURCES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{SOURCES[name]} has {lines} lines: split it"


@every_module
def test_library_does_not_print_and_opens_pickles_as_weights_only(name):
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{SOURCES[name]}:{node.lineno}"
        assert called != "print" or name == "joyedit.command.cli", f"{where} prints"
        assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), f"{where} calls {called}"
        if called == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
            assert safe == "True", f"{where} opens a pickle without weights_only=True"


def test_tests_and_benchmarks_import_ours_by_its_names():
    """A bare `kernels` is another project's package; ruff's ban is off where the references are allowed."""
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, f"{path} is too long"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {m.partition(".")[0] for m in modules} & {"kernels", "convert"}, path


def test_kernels_is_no_package():
    """`kernels/__init__.py` would shadow the package of that name which transformers and diffusers import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def kernel_entries(name: str) -> set[str]:
    """The compiled functions of a module that are launched, `entry[grid](...)`, and not called by others."""
    compiled = {
        node.name
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }
    launched = (node.func.value for node in ast.walk(tree(name)) if is_launch(node))
    return {value.id for value in launched if value.id in compiled}


def is_launch(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    )


def test_kernels_are_named_after_their_operations():
    """A profile shows nothing but these names."""
    found: list[str] = []
    for name in SOURCES:
        entries = kernel_entries(name) if name.startswith("joyedit.kernels.") else set()
        file = name.rpartition(".")[2]
        registered = re.findall(r'LIBRARY\.define\(\s*"(\w+)\(', SOURCES[name].read_text(encoding="utf-8"))
        for entry in entries:
            assert entry.startswith((file, *registered)), f"{name}: what does {entry} compute?"
        found += entries
    assert "rms_norm_forward" in found and len(found) == len(set(found)), "two kernels have one name"


def test_package_links_stay_links():
    for name in ("convert", "kernels"):
        link = ROOT / "joyedit" / name
        if (ROOT / name).exists():
            assert link.is_symlink() and os.readlink(link) == f"../{name}"


IMPORT_ALL_BLOCKED = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "diffusers", "transformers"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
late = ("torch._dynamo", "torch._inductor", "torch.distributed")
print(sorted(m for m in set(sys.modules) - before if m.startswith(late)))
"""


def test_every_module_imports_without_triton_and_the_references():
    names = [name for name in SOURCES if not name.startswith("joyedit.kernels") and "__main__" not in name]
    command = [sys.executable, "-c", IMPORT_ALL_BLOCKED, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"imported at import time: {done.stdout}"
