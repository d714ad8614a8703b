"""What `joyedit batch` makes is what `joyedit edit` makes, also in shards that are killed, and where the
examples for schedulers start it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit import AutoencoderKLWan
from tests.command.test_parallel import commanded

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--seed", "7", "--steps", "1", "--device", "cpu")
pytestmark = pytest.mark.slow


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    return tmp_path


def draw(count, sizes=((96, 72), (72, 96), (96, 96))):
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(f"photos/{number:02}.png")


def start(*words, **variables):
    """A process of its own, with the environment of a scheduler."""
    return subprocess.Popen(
        [str(word) for word in words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def joyedit(*words):
    return start(sys.executable, "-m", "joyedit", *words)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def finished(processes):
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        yield out.split()


def test_two_shards_one_broken_file_and_one_that_is_killed(desk, run):
    draw(40)
    Path("photos/05.png").write_bytes(b"no picture")
    words = ("batch", "photos", "Make it red", "--out", "out", *QUICK)
    killed, other = (joyedit(*words, "--shard", f"{index}/2") for index in (0, 1))
    printed = [killed.stdout.readline().strip() for _ in range(3)]
    killed.send_signal(signal.SIGKILL)
    printed += killed.communicate()[0].split()
    out, err = other.communicate()
    assert (killed.returncode, other.returncode) == (-signal.SIGKILL, 0), err
    assert 3 <= len(printed) < 19 and len(out.split()) == 20
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    assert {*map(Path, [*printed, *out.split()])} <= {*before}

    status, again, err = run(*words, "--shard", "0/2")
    assert status == 1 and "20 edits" in err and "1 failed: see out/errors-0.jsonl" in err
    results = {Path("out", f"{number:02}-edit-7.png") for number in range(40) if number != 5}
    assert {*Path("out").iterdir()} == {*results, Path("out/batch.json"), Path("out/errors-0.jsonl")}
    assert {*before}.isdisjoint(map(Path, again.split())) and len(before) + len(again.split()) == 39
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    (error,) = map(json.loads, Path("out/errors-0.jsonl").read_text().splitlines())
    assert error["file"] == "photos/05.png" and "is not in an image format" in error["message"]
    for number in ("00", "17", "22", "39"):
        assert run("edit", f"photos/{number}.png", "Make it red", "-o", f"{number}.png", *QUICK)[0] == 0
        assert Path(f"{number}.png").read_bytes() == Path(f"out/{number}-edit-7.png").read_bytes()
    assert len({path.read_bytes() for path in results}) == 39


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_ended_leaves_whole_files_and_goes_on(desk, run, number):
    draw(12)
    process = joyedit("batch", "photos", "Make it red", "--out", "out", *QUICK)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and err.endswith(
        "joyedit: interrupted\n" if number == signal.SIGINT else "joyedit: ended by SIGTERM\n"
    )
    left = {path.name for path in Path("out").iterdir()} - {"batch.json"}
    assert 1 <= len(left) < 12 and all(pixels(Path("out", name)).any() for name in left)
    status, out, _ = run("batch", "photos", "Make it red", "--out", "out", *QUICK)
    assert status == 0 and len(out.split()) == 12 - len(left)


SYSTEMS = {
    "tiny-joyimage": (("Make it red",), ((96, 72),)),
    "tiny-chronoedit": (("Make it red", "--guidance-scale", "3"), ((96, 72), (72, 96))),
    "tiny-diffedit": (("--source", "a red circle", "--target", "a blue circle"), ((64, 64), (64, 48))),
}


@pytest.mark.parametrize("model", SYSTEMS)
def test_every_system_edits_alone_and_together(desk, run, model):
    """In float32: bytes alone, rounding together."""
    told, sizes = SYSTEMS[model]
    draw(4, sizes)
    words = (*told, "--model", model, "--seed", 7, "--steps", 4, "--dtype", "float32", "--device", "cpu")
    assert run("batch", "photos", *words, "--out", "one")[0] == 0
    assert run("batch", "photos", *words, "--out", "two", "--batch-size", 2)[0] == 0
    names = sorted(path.name for path in Path("one").glob("*.png"))
    assert names == [f"{number:02}-edit-7.png" for number in range(4)]
    for number in ("01", "03"):
        assert run("edit", f"photos/{number}.png", *words, "-o", f"{number}.png")[0] == 0
        assert Path(f"{number}.png").read_bytes() == Path(f"one/{number}-edit-7.png").read_bytes()
    for name in names:
        assert abs(pixels(f"one/{name}") - pixels(f"two/{name}")).max() <= 1
    assert abs(pixels("one/00-edit-7.png") - pixels("one/02-edit-7.png")).max() > 20


def test_lines_together_with_masks_and_words_of_their_own(desk, run):
    draw(3, ((96, 72),))
    Image.new("L", (96, 72), 255).resize((96, 72)).save("white.png")
    half = Image.new("L", (96, 72))
    half.paste(255, (0, 0, 48, 72))
    half.save("half.png")
    each = [
        {"photo": "photos/00.png", "mask": "half.png", "prompt": "Make it red"},
        {"photo": "photos/01.png", "mask": "white.png", "prompt": "Make the circle larger", "seed": 3},
        {"photo": "photos/01.png", "mask": "half.png", "prompt": "Make it blue", "seed": 9},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, each)))
    words = ("--size", "input", "--steps", 2, "--dtype", "float32", "--seed", 7, "--device", "cpu")
    named = [{**one, "output": f"{number}.png"} for number, one in enumerate(each)]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, named)))
    for folder, size in (("one", 1), ("three", 3)):
        assert run("batch", "jobs.jsonl", "--out", folder, "--batch-size", size, *words)[0] == 0
    for number, one in enumerate(each):
        own = ("--mask", one["mask"], *words, "--seed", one.get("seed", 7))
        assert run("edit", one["photo"], one["prompt"], "-o", f"{number}.png", *own)[0] == 0
        assert Path(f"{number}.png").read_bytes() == Path(f"one/{number}.png").read_bytes()
        assert abs(pixels(f"one/{number}.png") - pixels(f"three/{number}.png")).max() <= 1


def test_lines_with_references(desk, run, tmp_path_factory):
    """One as a text, several as a list, beside a photograph and alone."""
    model = tmp_path_factory.mktemp("model") / "plus"
    write_random_checkpoint(model, seed=4, dtype=torch.float32, plus=True)
    draw(3)
    each = [
        {"photo": "photos/00.png", "reference": "photos/01.png", "prompt": "Combine them"},
        {"photo": "photos/00.png", "reference": ["photos/02.png", "photos/01.png"], "prompt": "Combine them"},
        {"reference": "photos/02.png", "prompt": "Make it red", "height": 32, "width": 48},
    ]
    named = [{**one, "output": f"{number}.png"} for number, one in enumerate(each)]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, named)))
    words = ("--model", model, *QUICK)
    assert run("batch", "jobs.jsonl", "--out", "out", *words)[0] == 0
    for number, one in enumerate(each):
        references = one["reference"] if isinstance(one["reference"], list) else [one["reference"]]
        own = [word for name in references for word in ("--reference", name)]
        own += [] if "photo" in one else ["--height", 32, "--width", 48]
        start = ["edit", one["photo"]] if "photo" in one else ["generate"]
        assert run(*start, one["prompt"], *own, *words, "-o", f"{number}.png")[0] == 0
        assert Path(f"{number}.png").read_bytes() == Path(f"out/{number}.png").read_bytes()


def test_a_photograph_of_two_lines_is_encoded_once(desk, run, monkeypatch):
    draw(1)
    each = [{"photo": "photos/00.png", "prompt": f"Make it {word}"} for word in ("red", "blue")]
    named = [{**one, "output": f"{number}.png"} for number, one in enumerate(each)]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, named)))
    encode, encoded = AutoencoderKLWan.encode, []

    def counting(vae, *args, **options):
        encoded.append(args)
        return encode(vae, *args, **options)

    monkeypatch.setattr(AutoencoderKLWan, "encode", counting)
    assert run("batch", "jobs.jsonl", "--out", "out", *QUICK)[0] == 0
    together = len(encoded)
    assert run("edit", "photos/00.png", "Make it blue", "-o", "one.png", *QUICK)[0] == 0
    # To see whether the small model knows such pictures, and for the edits.
    assert together == len(encoded) - together == 2
    assert Path("out/1.png").read_bytes() == Path("one.png").read_bytes()


def test_two_processes_of_one_part(desk, run):
    """Both end well, whoever of them makes which."""
    draw(4)
    words = ("batch", "photos", "Make it red", "--out", "out", *QUICK)
    for out in finished([joyedit(*words), joyedit(*words)]):
        assert {*out} <= {f"out/{number:02}-edit-7.png" for number in range(4)}
    assert {path.name for path in Path("out").iterdir()} == {
        "batch.json", *(f"{number:02}-edit-7.png" for number in range(4)),
    }  # fmt: skip
    for number in range(4):
        assert (
            run("edit", f"photos/{number:02}.png", "Make it red", "-o", "one.png", "--force", *QUICK)[0] == 0
        )
        assert Path("one.png").read_bytes() == Path(f"out/{number:02}-edit-7.png").read_bytes()


def test_several_processes_make_each_together(desk, run, workers):
    """The second one has no photographs: it is told them, and writes nothing."""
    Path("0").mkdir()
    draw(4)
    Path("photos/01.png").write_bytes(b"no picture")
    Path("photos").rename("0/photos")
    words = ("Make it red", "--guidance-scale", 2.5, "--dtype", "float32", *QUICK)
    first, second = workers.run(
        commanded, desk, "batch", "photos", *words, "--out", "out", "--parallel", "cfg=2"
    )
    made = [f"out/{number}-edit-7.png" for number in ("00", "02", "03")]
    assert first[0] == 1 and sorted(first[1].split()) == made and first[3] == ["out"]
    assert second == (0, "", "", []) and "4 edits: 3 made" in first[2]
    assert json.loads(Path("0/out/errors-0.jsonl").read_text())["file"] == "photos/01.png"
    for name in made:
        status, *_ = run("edit", f"0/photos/{name[4:6]}.png", *words, "-o", f"{name[4:6]}.png")
        assert status == 0 and (pixels(f"{name[4:6]}.png") == pixels(Path("0", name))).all()
    again = workers.run(commanded, desk, "batch", "photos", *words, "--out", "out", "--parallel", "cfg=2")
    assert [one[:2] for one in again] == [(1, ""), (0, "")]


def test_tasks_of_a_slurm_array(desk):
    draw(3)
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    script = ("bash", ROOT / "examples" / "slurm_array.sh", "photos", "Make it red", "--out", "out", *QUICK)
    tasks = [start(*script, **python, **array, SLURM_ARRAY_TASK_ID=number) for number in ("3", "5")]
    first, second = finished(tasks)
    assert (first, sorted(second)) == (["out/00-edit-7.png"], ["out/01-edit-7.png", "out/02-edit-7.png"])


def test_pods_of_an_indexed_job(desk):
    draw(3)
    job = yaml.safe_load((ROOT / "examples" / "kubernetes_job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable == {"name": "JOB_COMPLETIONS", "value": str(job["spec"]["completions"])}
    assert job["spec"]["completionMode"] == "Indexed" and container["command"][0] == "python"
    # One broken picture ends its own index, after its tries, and no other; a drained node ends none.
    assert job["spec"]["backoffLimitPerIndex"] == 3 and "backoffLimit" not in job["spec"]
    assert job["spec"]["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}],
    }  # fmt: skip
    local = {"/data/photos": "photos", "/data/results": "out", "/data/model": "tiny-joyimage"}
    words = [local.get(word, word) for word in container["args"]]
    command = (sys.executable, *container["command"][1:], *words, *QUICK)
    pods = [start(*command, JOB_COMPLETION_INDEX=index, JOB_COMPLETIONS="2") for index in "01"]
    first, second = finished(pods)
    assert (first, sorted(second)) == (["out/00-edit-7.png"], ["out/01-edit-7.png", "out/02-edit-7.png"])


def test_what_ray_maps(desk, run):
    draw(2)
    Path("photos/broken.png").write_bytes(b"no picture")
    Path("photos/more").mkdir()
    for name in ("photos/00.jpg", "photos/more/00.png", "photos/.hidden.png"):
        Path(name).write_bytes(Path("photos/00.png").read_bytes())
    spec = importlib.util.spec_from_file_location("ray_data", ROOT / "examples" / "ray_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {"model": "tiny-joyimage", "instruction": "Make it red", "steps": 1}
    found = module.rows_of(Path("photos"), Path("out"), 7, settings)
    names = {
        "00.jpg": "00-jpg",
        "00.png": "00-png",
        "01.png": "01",
        "broken.png": "broken",
        "more/00.png": "more/00",
    }
    assert {one["path"]: one["output"] for one in found} == {
        f"photos/{name}": f"out/{stem}-edit-7.png" for name, stem in names.items()
    }
    for seed, changed in ((7, {**settings, "instruction": "Make it blue"}), (8, settings)):
        with pytest.raises(ValueError, match="out holds another batch"):
            module.rows_of(Path("photos"), Path("out"), seed, changed)
    editor = module.Editor(**settings, seed=7)
    rows = editor({name: np.array([one[name] for one in found[1:]]) for name in ("path", "output")})
    assert rows["path"] == [one["path"] for one in found[1:]]
    assert rows["output"] == [one["output"] for one in found[1:]]
    assert rows["error"][:2] == ["", ""] and rows["error"][3] == ""
    assert "is not in an image format" in rows["error"][2] and not Path(rows["output"][2]).exists()
    assert run("edit", "photos/01.png", "Make it red", "-o", "one.png", *QUICK)[0] == 0
    assert (pixels("one.png") == pixels("out/01-edit-7.png")).all()
    before = Path("out/01-edit-7.png").stat().st_mtime_ns
    again = {name: np.array([found[2][name]]) for name in ("path", "output")}
    assert editor(again)["error"] == [""] and Path("out/01-edit-7.png").stat().st_mtime_ns == before
