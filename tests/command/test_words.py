"""What the command says of spelling, settings without effect, sizes, wrong files, long and odd text."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint, write_random_chronoedit_checkpoint
from joyedit.checkpoints.json_files import read_json
from joyedit.command import cli, demo
from joyedit.command.instruction import Instruction
from joyedit.command.photos import photo_name
from joyedit.loading import layouts
from joyedit.media import images

ROOT = Path(__file__).resolve().parents[2]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SQUARE = "joyimage-remove.png"  # a drawn scene that the small models know


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((96, 72)).convert("RGB").save("photo.png")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Edits by instruction take no time; the calls that are made."""
    calls = []

    def run(system, pipe, call, seeds, args):
        calls.append(call)
        return [{"output": Image.new("RGB", (32, 16), (seed % 256, 0, 0))} for seed in seeds]

    monkeypatch.setattr(Instruction, "run", run)
    return calls


def wrong(capsys, *words):
    """What is printed for wrong arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def metadata(name, **record):
    """A PNG that records this, as anybody may write it."""
    texts = PngInfo()
    texts.add_itxt("joyedit", json.dumps({"prompt": "x", **record}))
    Image.new("RGB", (8, 8)).save(name, pnginfo=texts)
    return name


# Arguments.


@pytest.mark.parametrize(
    "words", ["edit", "edit photo.png x --masks m.png", "edit photo.png x --steps 0", ""]
)
def test_wrong_arguments_are_one_line_that_names_the_help(capsys, words):
    err = wrong(capsys, *words.split())
    program = " ".join(["joyedit", *words.split()[:1]])
    assert err.startswith(f"{program}: error: ") and err.endswith(f"(see `{program} --help`)\n")
    assert err.count("\n") == 1 and len(err) < 200


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u200b", "\u3000"])
def test_an_empty_instruction_is_a_wrong_argument(capsys, no_work, run, blank):
    for words in (
        ["edit", "photo.png", blank],
        ["generate", blank],
        ["edit", "photo.png", "--target", blank],
    ):
        words += ["--source", "a cat"] if "--target" in words else []
        assert "is empty: say what to do" in wrong(capsys, *words)
    status, _, err = run("edit", "photo.png", "--config-from", metadata("blank.png", prompt=blank))
    assert status == 1 and "is empty: say what to do" in err


def test_a_source_may_be_empty(run):
    words = ("--source", "", "--target", "a red circle", "--steps", 2, "--num-maps-per-mask", 1, "-q")
    assert run("edit", "photo.png", *words)[0] == 0


def test_long_words_are_cut_wherever_they_are_repeated(capsys, run, quick):
    long = "a" * 20_000
    for words in (
        ["edit", "photo.png", "x", f"--{long}"],
        ["edit", "photo.png", "x", "--steps", long],
        ["edit", "photo.png", "x", "--part", long],
        ["edit", "photo.png", "x", "-o", long],
        ["edit", "photo.png", "x", "--dtype", long],
        ["edit", long, long, "x"],
        [long],
    ):
        assert len(wrong(capsys, *words)) < 1000
    for words in (("photo.png", long), (long, "x"), ("photo.png", "x", "-m", f"a/{long}")):
        err = run("edit", *words)[2]
        assert max(map(len, err.splitlines())) < 2500
    assert len(run("edit", "photo.png", long, "-o", "again.png")[2]) < 1000


# Settings without effect, and sizes.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--negative-prompt dull", "guidance 1"),
        ("--negative-prompt dull --guidance-scale 0.5", "guidance 0.5"),
        ("--negative-prompt dull --guidance-scale 2", None),
        ("--guidance-scale 1", None),
    ],
)
def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(run, quick, words, told):
    status, _, err = run("edit", "photo.png", "Make it red.", *words.split())
    lines = [line for line in err.splitlines() if "no effect" in line]
    assert status == 0 and lines == (
        [f"--negative-prompt has no effect at {told}: give a --guidance-scale above 1"] if told else []
    )


def test_of_captions_the_way_back_counts_too(run, tmp_path):
    captions = (
        "--source",
        "a red circle",
        "--target",
        "a blue circle",
        "--steps",
        2,
        "--negative-prompt",
        "x",
    )
    words = (
        "edit",
        "photo.png",
        *captions,
        "--num-maps-per-mask",
        1,
        "--guidance-scale",
        1,
        "--force",
        "-o",
        "a.png",
    )
    assert "no effect" in run(*words)[2]
    assert "no effect" not in run(*words, "--invert-guidance-scale", 2)[2]


@pytest.mark.slow
def test_a_preset_is_without_guidance(run, tmp_path):
    write_random_chronoedit_checkpoint(tmp_path / "chrono")
    words = (
        "photo.png",
        "x",
        "-m",
        "chrono",
        "--basesize",
        256,
        "--negative-prompt",
        "dull",
        "--preset",
        "distill",
    )
    assert "no effect at guidance 1" in run("edit", *words)[2]


def test_the_size_to_work_at_is_said_and_whether_it_crops(run, quick):
    said = "photograph of 96 x 72 less 24 columns, at scale 1.33 in 96 x 96; result of 96 x 96\n"
    assert said in run("edit", "photo.png", "x")[2]
    Image.new("RGB", (48, 48)).save("square.png")
    assert "photograph of 48 x 48, at scale 2 in 96 x 96" in run("edit", "square.png", "x")[2]
    Image.new("RGB", (96, 96)).save("fits.png")
    assert "photograph of" not in run("edit", "fits.png", "x")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-chronoedit", "tiny-diffedit"])
def test_a_photograph_is_said_to_be_stretched_only_where_it_could_be_less_so(run, name):
    texts = (
        ["x"] if name == "tiny-chronoedit" else ["--source", "x", "--target", "y", "--num-maps-per-mask", 1]
    )
    words = (*texts, "-m", name, "--steps", 2, "--force", "-o", "out.png", "--seed", 1)
    Image.new("RGB", (100, 40), "red").save("wide.png")
    assert "stretches" not in run("edit", "wide.png", *words)[2]  # roundings are nobody's choice
    err = run("edit", "wide.png", *words, "--height", 64, "--width", 64)[2]
    assert "this stretches the photograph: at " in err
    own = [int(word) for word in err.partition("photograph: at ")[2].split()[:3:2]]
    assert abs(own[0] / own[1] / 2.5 - 1) < 0.3
    assert (
        "stretches"
        not in run("edit", "wide.png", "--config-from", "out.png", "--height", 32, "--width", 80)[2]
    )


# Pictures.


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", *(pytest.param(s, marks=pytest.mark.slow) for s in (".jpeg", ".webp"))]
)
def test_results_keep_the_colour_profile(run, quick, suffix):
    Image.new("RGB", (96, 96), "red").save("photo.png", icc_profile=SRGB)
    assert run("edit", "photo.png", "x", "-o", f"out{suffix}")[0] == 0
    assert Image.open(f"out{suffix}").info["icc_profile"] == SRGB
    Image.new("CMYK", (96, 96)).save("cmyk.jpg", icc_profile=SRGB[:16] + b"CMYK" + SRGB[20:])
    assert run("edit", "cmyk.jpg", "x", "-o", f"other{suffix}")[0] == 0
    assert "icc_profile" not in Image.open(f"other{suffix}").info  # it is of other channels


def test_what_is_no_picture_is_named(run, no_work):
    Path("pointer.png").write_text(POINTER)
    Path("phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    Path("album").mkdir()
    for name, word in (
        ("pointer.png", "git-lfs pointer"),
        ("phone.heic", "pillow-heif"),
        ("album", "is a folder"),
    ):
        status, _, err = run("edit", name, "x")
        assert status == 1 and word in err and err.count("\n") == 1


# Words.


@pytest.mark.parametrize(
    ("model", "text", "told"),
    [
        ("tiny-joyimage", "Remove the blue square.", None),
        ("tiny-joyimage", "Remove the blue square", None),
        ("tiny-joyimage", "remove the blue square", None),
        ("tiny-joyimage", "REMOVE the BLUE square.", None),
        ("tiny-joyimage", "Please remove the blue square.", None),
        ("tiny-joyimage", "Could you erase the blue square?", None),
        ("tiny-joyimage", "Vaporise the BLUE Square.", ["vaporise"]),
        ("tiny-joyimage", "Make the cat Blue.", ["cat"]),
        ("tiny-chronoedit", "Remove the blue square.", None),
        ("tiny-chronoedit", "remove the blue square", None),
        ("tiny-chronoedit", "PLEASE REMOVE THE CAT", ["cat"]),
        ("tiny-diffedit", "A BLUE SQUARE ON A WHITE BACKGROUND", None),
    ],
)
def test_words_are_known_in_every_spelling(model, text, told):
    world = layouts.read_made_for(model).world
    assert world is not None
    assert world.unknown([text]) == (told or [])


def test_one_line_on_words_and_none_with_an_adapter(run, tmp_path):
    scene = ROOT / "joyedit" / "assets" / "demo" / SQUARE
    words = ("edit", scene, "vaporise the blue square", "--steps", 1, "--force", "-o", "out.png")
    (line,) = [line for line in run(*words)[2].splitlines() if "expect little" in line]
    assert "expect little of 'vaporise'; real edits need" in line
    network = layouts.load("tiny-joyimage", device="cpu")
    network.load_lora_weights(lora_of(network))
    network.save_lora_weights("style")
    status, _, err = run(*words, "--lora", "style")
    assert status == 0 and "expect little" not in err
    assert (
        "expect little of this photograph; real"
        in run("edit", ROOT / "examples" / "coffee.jpg", *words[2:], "--lora", "style")[2]
    )


def lora_of(pipe, scale=0.01):
    """An adapter of one layer of the transformer."""
    name, tensor = next((n, p) for n, p in pipe.transformer.named_parameters() if p.ndim == 2)
    layer = f"transformer.{name.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, tensor.shape[1], generator=generator) * scale
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": torch.ones(tensor.shape[0], 2)}


def test_generating_with_a_small_model_is_said_to_be_beyond_it(run, quick):
    status, _, err = run("generate", "A cat")
    assert (
        status == 0 and "tiny-joyimage was made to edit" in err and "cannot make a picture from text" in err
    )


# Models and files.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["edit", "photo.png", "x", "-m", "tiny-joyimag"], "did you mean 'tiny-joyimage'?"),
        (["info", "Tiny-DiffEdit"], "did you mean 'tiny-diffedit'?"),
        (["convert", "tinychronoedit", "new"], "did you mean 'tiny-chronoedit'?"),
        (["edit", "photo.png", "x", "--device", "mps"], "device='mps': this PyTorch finds no Apple GPU"),
        (["edit", "photo.png", "x", "--device", "xpu:3"], "device='xpu:3': nothing can be computed there"),
        (["edit", "photo.png", "x", "--device", "gpu"], "device='gpu': write 'auto', 'cpu'"),
        (["edit", "photo.png", "x", "--device", "meta"], "device='meta': nothing can be computed there"),
    ],
)
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="an Apple GPU is there")
def test_nearly_right_names(run, words, told):
    status, out, err = run(*words)
    assert (status, out) == (1, "") and told in err and err.count("\n") == 1


def test_checkpoints_that_are_something_else_are_named(run, no_work, tmp_path):
    write_random_checkpoint(tmp_path / "good")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    config = "text_encoder/config.json"

    def refused(change, told, *more):
        shutil.copytree("good", "bad")
        change()
        for words in (["edit", "photo.png", "x", "-m", "bad"], *more):
            status, _, err = run(*words)
            assert status == 1 and told in err and err.count("\n") == 1, err
        shutil.rmtree("bad")

    pointer = "is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`"
    refused(
        lambda: Path("bad", weights).write_text(POINTER), pointer, ["info", "bad"], ["info", f"bad/{weights}"]
    )
    refused(lambda: Path("bad/tokenizer/tokenizer.json").write_text(POINTER), pointer)
    Path("style.safetensors").write_text(POINTER)
    assert pointer in run("edit", "photo.png", "x", "--lora", "style.safetensors")[2]
    raw = {**read_json(tmp_path / "good" / config), "quantization_config": {"quant_method": "bits\x1b[31m"}}
    with pytest.raises(ValueError, match=r"weights are quantized \(bits\\x1b\[31m\)"):
        joyedit.Qwen3VLForConditionalGeneration.Config.from_dict(raw)


def test_downloads_that_were_broken_off_are_named(run, tmp_path):
    write_random_checkpoint(tmp_path / "bad")
    part = Path("bad/.cache/huggingface/download/transformer/x.incomplete")
    part.parent.mkdir(parents=True)
    part.touch()
    shutil.rmtree("bad/transformer")
    status, _, err = run("edit", "photo.png", "x", "-m", "bad")
    assert status == 1 and "a download was broken off (1 files in" in err
    Path("bad/transformer").mkdir()
    Path("bad/transformer/config.json").write_text("{}")
    assert (
        "holds no weights" in (err := run("edit", "photo.png", "x", "-m", "bad")[2]) and "broken off" in err
    )
    Path("bad/model_index.json").unlink()
    assert "broken off" in run("edit", "photo.png", "x", "-m", "bad")[2]


def test_broken_off_downloads_of_the_cache(run, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    write_random_checkpoint(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab12.incomplete").touch()
    shutil.rmtree(repository / "snapshots" / commit / "transformer")
    words = ("-m", "org/tiny", "--offline", "--cache-dir", tmp_path / "hub")
    status, _, err = run("edit", "photo.png", "x", *words)
    assert status == 1 and "run once online" in err and "a download was broken off" in err


# Records of strangers.


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"num_inference_steps": 10**9}, "num_inference_steps 1000000000 is not within 1 and 10000"),
        ({"num_inference_steps": True}, "the recorded num_inference_steps is damaged: True"),
        ({"num_inference_steps": 10**400}, "is not within 1 and 10000"),
        ({"seed": 2**70}, "seed 1180591620717411303424 is not within"),
        ({"height": 10**6, "width": 16}, "height 1000000 is not within"),
        ({"height": 16384, "width": 16384}, "16384 x 16384 pixels is more than"),
        ({"basesize": 10**7}, "basesize 10000000 is not within"),
        ({"guidance_scale": float("nan")}, "the recorded guidance_scale is damaged: nan"),
        ({"guidance_scale": 10**400}, "the recorded guidance_scale is damaged"),
        ({"lora": ["a", 3]}, "the recorded lora is damaged"),
        ({"lora": []}, "the recorded lora is damaged"),
        ({"parts": {"vae": 3}}, "the recorded parts is damaged"),
        ({"num_inference_steps": "\x1b[31m" + "5" * 20_000}, "\\x1b[31m55"),
        (
            {"input": {"name": "\x9b31m\u202etxt", "sha256": "x"}, "num_inference_steps": 0},
            "(\\x9b31m\\u202etxt)",
        ),
    ],
)
def test_recorded_numbers_are_bounded_and_words_plain(run, no_work, record, told):
    digest = hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()
    record = {"input": {"name": "photo.png", "sha256": digest}, **record}
    status, out, err = run("edit", "photo.png", "--config-from", metadata("bad.png", **record))
    assert (status, out) == (1, "") and told in err and err.count("\n") <= 2
    assert all(letter.isprintable() for letter in err.replace("\n", "")) and len(err) < 1000


def test_numbers_of_a_checkpoint_are_bounded(run, no_work, tmp_path):
    write_random_checkpoint(tmp_path / "bad")
    index = Path("bad/model_index.json")
    for said in ({"call": {"num_inference_steps": 10**9}}, {"basesize": 10**6}):
        index.write_text(json.dumps({**json.loads(index.read_text()), "made_for": said}))
        status, _, err = run("edit", "photo.png", "x", "-m", "bad")
        assert status == 1 and str(10**9 if "call" in said else 10**6) in err


def test_info_shows_no_sequence_that_a_terminal_obeys(run):
    said = "red\x1b]0;owned\x07\x9b2J\u202egnp.\u2066\x7f\n\U000e0041"
    metadata("odd.png", prompt=said, **{"in\x1bput": {"name": said}})
    for words in (["info", "odd.png"], ["info", "odd.png", "--json"]):
        out = run(*words)[1]
        assert "red" in out and all(letter.isprintable() for letter in out.replace("\n", ""))
    assert json.loads(run("info", "odd.png", "--json")[1])["prompt"] == said
    assert "Ünïcode 猫" in run("info", metadata("plain.png", prompt="Ünïcode 猫"))[1]


def test_log_and_tracebacks_are_plain(run, monkeypatch):
    def fail(*_):
        cli.log.warning("seen \x1b[31m\u202e")
        raise ValueError("odd \x1b[2J\x9b")

    monkeypatch.setattr(Instruction, "run", fail)
    for words in ([], ["-v"]):
        status, _, err = run("edit", "photo.png", "x", *words)
        assert status == 1 and "\\x1b[31m\\u202e" in err and "joyedit: error: odd \\x1b[2J\\x9b\n" in err
        assert not set(err) & set("\x1b\x9b\u202e")


# URLs.


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("HTTPS://example.org/a/my%20cat.png?key=secret", "my cat.png"),
        ("HtTp://me:secret@example.org/photo@2x.png#secret", "photo@2x.png"),
        ("http://me:sec/ret@example.org/cat.png", "cat.png"),
        ("http://me:sec/ret@example.org", "photo"),
        ("http://me:secret@example.org/", "photo"),
        ("http://[::1]:8080/cat.png", "cat.png"),
        ("http://example.org/a%1b[31m%2e.png", "a_[31m..png"),
    ],
)
def test_the_name_of_a_picture_on_the_web(url, name):
    assert photo_name(url) == name


def test_a_url_is_one_in_any_case_and_its_key_goes_nowhere(run, quick, monkeypatch):
    seen = []
    content = Path("photo.png").read_bytes()
    monkeypatch.setattr(images, "download", lambda url, *_: [seen.append(url), content][1])
    status, out, err = run("edit", "HTTP://me:hidden@example.org/cat.png?k=hidden", "x", "--seed", 1)
    assert (status, out) == (0, "cat-edit-1.png\n") and seen == [
        "HTTP://me:hidden@example.org/cat.png?k=hidden"
    ]
    assert "hidden" not in err and b"hidden" not in Path("cat-edit-1.png").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "edit photo.png --prompt-file {}",
        "edit photo.png x -m {}",
        "edit photo.png x --lora {}",
        "edit photo.png x --part vae={}",
        "edit photo.png x -o {}",
        "edit photo.png x --config-from {}",
        "edit photo.png x --video {}",
        "info {}",
        "convert {} new",
    ],
)
def test_a_url_elsewhere_is_refused_unseen(capsys, words):
    err = wrong(capsys, *words.format("https://me:secret@huggingface.co/org/name").split())
    assert "a URL is not read here" in err and "secret" not in err
    assert "here org/name" in wrong(capsys, *words.format("HTTPS://huggingface.co/org/name").split())


# The demo.


def test_a_second_demo_goes_to_a_new_folder(run, monkeypatch):
    def pretend(folder, *, force, disable_progress):
        made.append((str(folder), force))
        folder.mkdir(exist_ok=True)
        return folder / "demo.png"

    made: list = []
    monkeypatch.setattr(demo, "run", pretend)
    assert "there already" not in run("demo")[2]
    assert "joyedit-demo is there already: this goes to joyedit-demo-2" in run("demo")[2]
    run("demo"), run("demo", "--force"), run("demo", "--out", "mine"), run("demo", "--out", "mine")
    names = ["joyedit-demo", "joyedit-demo-2", "joyedit-demo-3", "joyedit-demo", "mine", "mine"]
    assert made == [(name, i == 3) for i, name in enumerate(names)]


def test_arguments_are_read_without_anything_heavy():
    code = (
        "import sys; from joyedit.command import parsing; print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
