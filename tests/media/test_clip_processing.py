"""CLIP's tokenizer and image processor: equal to transformers, in every published set of files."""

import json
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPTokenizer as Reference
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from joyedit.media.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.text.clip_tokenizer import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    "a an photo of the cat dog red bowl fruits pears in style it's don't 1 2 , . ! !! ( ) : été über кот 猫"
)
HARD = [
    "",
    " ",
    "\n\t \u3000\u2028 \x0b\x85\u180e\u200b",
    "A Photo OF a  CAT,\n\nin the   bowl!!!",
    "İi ı ß ẞ ÀÉÎ Σς ǅ ﬁ Å \u2126 e\u0301 \u0344 \u1e9b\u0323 각 각 ＦＵＬＬ ﷺ",
    "it's DON'T 'S 'ſ we'Ll they''re 'd",
    "12345 1.5e-3 ½ ² ① १२",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &#39; &nbsp;<br/>",
    "(masterpiece:1.2), [a|b] {c} http://example.com/a_b?c=d&e=f#g",
    "👩🏽‍🚀🇩🇪 \u200d\ufeff नमस्ते العربية עברית ไทย 日本語",
    "\u0000\u0001\ufffe\U0010ffff\u202e",
    f"{START}a{END}b {START.upper()}{END.upper()} <|endoftext <|STARTOFtext|>",
    f"{END}{END}\u0338 {START}\u0338",
    "! !!! a! !a wow!?",
    "</w> a</w> <w>",
    "x" * 300,
    "word " * 120,
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of letters, marks, spaces, emoji and pieces of special tokens, up to 40 pieces long."""
    rng = random.Random(seed)
    ranges = (range(32, 127), range(0xA0, 0x250), range(0x300, 0x330), range(0x4E00, 0x4E40))
    pieces = [chr(c) for codes in ranges for c in codes]
    pieces += [*"\n\r\t\x1c\u2028\u3000'’", "\U0001f600", "\u200d", "\uac00", "\u1100", "\u1161"]
    pieces += [START, END, START.upper(), END.upper(), "<|", "|>", "'ll", " the ", "cat", "CAT", "!"]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(count)]


def write_vocabulary(folder: Path) -> None:
    """A vocabulary of bytes and some words, laid out as the published one: bytes, bytes that end a word,
    merges, the two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [symbol[byte] for byte in (*printable, *others)]
    tokens += [token + "</w>" for token in tokens]
    merges = []
    for word in WORDS.split():
        parts = [symbol[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in tokens]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def flagged(text: str, **flags) -> dict:
    return {
        "content": text,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    } | flags


SPECIAL = {"bos_token": flagged(START), "eos_token": flagged(END), "unk_token": flagged(END)}
SETTINGS = {
    **{"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77},
    **{"tokenizer_class": "CLIPTokenizer", "pad_token": END},
    **{role: {"__type": "AddedToken", **token} for role, token in SPECIAL.items()},
}
NEWER = {
    **SETTINGS,
    **{"bos_token": START, "eos_token": END, "unk_token": END, "clean_up_tokenization_spaces": True},
}
PUBLISHED = {
    "Stable Diffusion 1": (SETTINGS, {**SPECIAL, "pad_token": END}),
    "Stable Diffusion 2": (SETTINGS, {**SPECIAL, "pad_token": "!"}),
    "config alone": (SETTINGS, None),
    "config alone, other padding": ({**SETTINGS, "pad_token": "!"}, None),
    "map alone": (None, {**SPECIAL, "pad_token": END}),
    "vocabulary alone": (None, None),
    "with added tokens": ({**NEWER, "added_tokens_decoder": (START, END)}, {**SPECIAL, "pad_token": END}),
    "with added padding": (
        {**NEWER, "pad_token": "!", "added_tokens_decoder": ("!", START, END)},
        {**SPECIAL, "pad_token": "!"},
    ),
}


def write_folder(folder: Path, settings: dict | None = SETTINGS, special: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    write_vocabulary(folder)
    if settings and "added_tokens_decoder" in settings:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        listed = {
            vocab[text]: flagged(text, special=True, normalized=text != "!")
            for text in settings["added_tokens_decoder"]
        }
        settings = {**settings, "added_tokens_decoder": listed}
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "tokenizer")


@pytest.fixture
def tiny(folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def check_equal(ours: CLIPTokenizer, theirs, texts: list[str]) -> None:
    assert len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


QUICK = ("Stable Diffusion 1", "map alone", "with added padding")


@pytest.mark.parametrize(
    "published", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_every_published_set_of_files_equals_transformers(published, tmp_path):
    folder = write_folder(tmp_path / "given", *PUBLISHED[published])
    ours, theirs = CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder)
    check_equal(ours, theirs, HARD + random_texts(400))
    assert ours.model_max_length == 77
    assert ours.pad_token == ("!" if "2" in published or "padding" in published else END)

    theirs.save_pretrained(tmp_path / "theirs")
    check_equal(CLIPTokenizer.from_pretrained(tmp_path / "theirs"), theirs, HARD + random_texts(200, seed=1))
    ours.save_pretrained(tmp_path / "ours")
    again = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    check_equal(again, Reference.from_pretrained(tmp_path / "ours"), HARD + random_texts(200, seed=2))
    check_equal(again, theirs, HARD)
    assert again.model_max_length == 77 and not list((tmp_path / "ours").glob(".*"))
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """Our and their tokenizer by the name of the model whose settings they have."""
    pairs = {}
    for model in ("clip-tokenizer", "stable-diffusion-v1-5", "stable-diffusion-2-1"):
        folder = tmp_path_factory.mktemp("real") / model
        shutil.copytree(shared_data / "clip-tokenizer", folder)
        if model != "clip-tokenizer":
            shutil.copytree(shared_data / model / "tokenizer", folder, dirs_exist_ok=True)
        pairs[model] = CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder)
    return pairs


def test_real_vocabulary_equals_transformers(real):
    for ours, theirs in real.values():
        assert len(ours) == 49408
        check_equal(ours, theirs, HARD + random_texts(700, seed=3))
    sd1, sd2 = real["stable-diffusion-v1-5"][0], real["stable-diffusion-2-1"][0]
    assert (sd1.bos_token_id, sd1.eos_token_id, sd1.pad_token_id, sd2.pad_token_id) == (
        49406,
        49407,
        49407,
        0,
    )
    assert sd1.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert sd1.encode("wow!") == [49406, 2781, 256, 49407] and sd2.encode("wow!")[-2:] == [0, 49407]


def test_real_vocabulary_gives_the_recorded_ids(real, shared_data):
    def recorded(name):
        path = shared_data / "goldens" / "tokenizers" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8"))

    fixed = dict(padding="max_length", truncation=True, max_length=77)
    ours = real["clip-tokenizer"][0]
    for row in recorded("clip")["raw"]:
        assert ours.encode(row["text"]) == row["ids"], row["text"]
    for row in recorded("clip")["padded77"]:
        assert ours(row["text"], **fixed).input_ids == row["ids"], row["text"]
    ours = real["stable-diffusion-2-1"][0]
    for row in recorded("clip_sd2")["padded77"]:
        assert ours(row["text"], **fixed).input_ids == row["ids"], row["text"]


@pytest.mark.parametrize(
    "call",
    [
        dict(padding="max_length", truncation=True),
        dict(padding="max_length", truncation=True, max_length=77),
        dict(padding="max_length", truncation=True, max_length=6),
        dict(padding="max_length", max_length=9),
        dict(padding="longest", truncation=True, max_length=7),
        dict(padding=True),
        dict(truncation=True, max_length=2),
        dict(truncation=True),
        dict(),
    ],
    ids=str,
)
def test_padding_and_truncation_equal_transformers(call, folder, tiny):
    theirs = Reference.from_pretrained(folder)
    texts = ["", "the red cat", "a photo of the dog, 2 pears " * 20, f"a{END}", "   "]
    for given in (texts, texts[2]):
        expected = theirs(given, **call)
        assert tiny(given, **call) == {name: expected[name] for name in ("input_ids", "attention_mask")}
    if call.get("padding") in (True, "max_length", "longest") and call.get("truncation"):
        expected, made = theirs(texts, return_tensors="pt", **call), tiny(texts, return_tensors="pt", **call)
        assert made.input_ids.dtype == torch.int64 and torch.equal(made.input_ids, expected.input_ids)
        assert torch.equal(made.attention_mask, expected.attention_mask)


def test_long_prompts_keep_their_first_75_tokens(tiny):
    row = tiny.encode("cat " * 200)
    cut = tiny("cat " * 200, padding="max_length", truncation=True).input_ids
    assert len(row) == 202 and cut == [*row[:76], tiny.eos_token_id]
    assert tiny.decode(row[76:-1]) == " ".join(["cat"] * 125)
    assert tiny("", padding="max_length").input_ids == [tiny.bos_token_id] + [tiny.eos_token_id] * 76


# Tokens that come and go with a textual inversion.


def test_added_tokens_equal_transformers(folder, tiny, tmp_path):
    theirs = Reference.from_pretrained(folder)
    before = len(tiny)
    names = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "MyStyle", "moNa  lisa"]
    assert tiny.append_tokens(names) == list(range(before, before + 5))
    theirs.add_tokens(names)
    texts = [
        "a <cat-toy> in MyStyle",
        "a<cat-toy>b <CAT-TOY> mystyle xmystylex Mona Lisa mona  lisa",
        "<cat-toy> <cat-toy>_1 <cat-toy>_2 <cat-toy>_3 <cat-toy>_11<cat-toy>!",
    ]
    check_equal(tiny, theirs, texts + HARD)
    assert tiny.encode("a <cat-toy>")[2] == before and len(tiny) == before + 5 and tiny.vocab_size == before
    tiny.save_pretrained(tmp_path)
    for opened in (CLIPTokenizer.from_pretrained(tmp_path), tiny):
        check_equal(opened, Reference.from_pretrained(tmp_path), texts + HARD)


def test_removed_tokens_leave_no_trace(tiny):
    texts = HARD + ["a <one> <two> <three> <four>"]
    plain = [tiny.encode(text) for text in texts]
    before = len(tiny)
    tiny.append_tokens(["<one>", "<two>", "<three>", "<four>"])
    assert tiny.remove_tokens(["<three>", "<one>"]) == [before + 2, before]
    assert tiny.convert_tokens_to_ids(["<one>", "<two>", "<three>", "<four>"]) == [
        None,
        before,
        None,
        before + 1,
    ]
    assert len(tiny) == before + 2 and tiny.encode("<two><four>")[1:-1] == [before, before + 1]
    assert tiny.decode([before, before + 1]) == "<two><four>"
    assert tiny.append_tokens(["<one>"]) == [before + 2]
    assert tiny.remove_tokens(["<two>", "<one>", "<four>"]) == [before, before + 2, before + 1]
    assert [tiny.encode(text) for text in texts] == plain and len(tiny) == before
    assert tiny.append_tokens([]) == tiny.remove_tokens([]) == []


def test_tokens_that_cannot_be_added_or_removed(tiny):
    before = len(tiny)
    for names, message in [
        (["<new>", "ca"], "'ca' is in the vocabulary"),
        (["cat</w>"], "in the vocabulary"),
        ([START], "in the vocabulary"),
        (["<new>", "<new>"], "'<new>' is in the vocabulary"),
        (["<new>", " "], "' ' is blank"),
        ([""], "'' is blank"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny.append_tokens(names)
        assert len(tiny) == before
    tiny.append_tokens(["<new>"])
    for name in ("<other>", "cat</w>", END, "!"):
        with pytest.raises(ValueError, match=r"was not added; those that were: \['<new>'\]"):
            tiny.remove_tokens(["<new>", name])
    assert len(tiny) == before + 1


def test_token_lookups_equal_transformers(folder, tiny):
    theirs = Reference.from_pretrained(folder)
    for tokens in ("cat</w>", ["!", "a</w>", START]):
        assert tiny.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert tiny.convert_ids_to_tokens([0, 300, 512]) == theirs.convert_ids_to_tokens([0, 300, 512])
    rows = [tiny.encode("a cat!"), tiny.encode("the dog's")]
    assert tiny.batch_decode(rows, True) == theirs.batch_decode(rows, skip_special_tokens=True)
    assert tiny.batch_decode(rows, True) == ["a cat !", "the dog 's"]
    assert tiny.decode(torch.tensor(rows[0])) == tiny.decode(rows[0])


def test_one_tokenizer_serves_several_threads(tiny):
    texts = random_texts(200, seed=4)
    expected = {n: tiny(texts, padding="max_length", truncation=True, max_length=n) for n in (5, 77)}
    made: dict[int, list] = {5: [], 77: []}

    def work(length: int) -> None:
        for _ in range(5):
            made[length].append(tiny(texts, padding="max_length", truncation=True, max_length=length))

    threads = [threading.Thread(target=work, args=(length,)) for length in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {length: [batch] * 5 for length, batch in expected.items()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: (f / "merges.txt").unlink(), FileNotFoundError, "no tokenizer.json, and not both"),
        (lambda f: (f / "vocab.json").write_text('{"a": '), ValueError, "vocab.json and merges.txt"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\na b c\n"), ValueError, "merges.txt"),
        (
            lambda f: edit_json(f / "tokenizer_config.json", pad_token="<none>"),
            ValueError,
            "pad_token '<none>'",
        ),
        (
            lambda f: edit_json(f / "tokenizer_config.json", bos_token="<none>"),
            ValueError,
            "bos_token '<none>'",
        ),
        (
            lambda f: edit_json(f / "tokenizer_config.json", do_lower_case=False),
            ValueError,
            "do_lower_case=False",
        ),
        (
            lambda f: edit_json(f / "tokenizer_config.json", add_prefix_space=True),
            ValueError,
            "add_prefix_space",
        ),
    ],
)
def test_broken_folders_are_refused_with_the_file_named(break_it, error, message, tmp_path):
    folder = write_folder(tmp_path / "files")
    break_it(folder)
    with pytest.raises(error, match=message):
        CLIPTokenizer.from_pretrained(folder)


def test_calls_that_make_no_sense_are_refused(tiny):
    for wrong in (None, 3, ["a", None], b"a"):
        with pytest.raises(TypeError, match="text must be a str or a list of str"):
            tiny(wrong)
    with pytest.raises(ValueError, match="max_length=1: must be at least 2"):
        tiny("a", truncation=True, max_length=1)
    with pytest.raises(ValueError, match="padding='left'"):
        tiny("a", padding="left")


# The image processor.


def photo(width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    small = PIL.Image.fromarray(noise).resize((max(1, width // 3), max(1, height // 3)))
    return PIL.Image.blend(PIL.Image.fromarray(noise), small.resize((width, height)), 0.7).convert(mode)


OLD_FILE = {
    **{"crop_size": 224, "size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"},
    **{f"do_{what}": True for what in ("center_crop", "convert_rgb", "normalize", "resize")},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
NEW_FILE = {
    **{"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}, "resample": 3},
    **{f"do_{what}": True for what in ("center_crop", "convert_rgb", "normalize", "rescale", "resize")},
    **{"rescale_factor": 0.00392156862745098, "image_processor_type": "CLIPImageProcessor"},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIZES = [(300, 200), (201, 397), (97, 311), (640, 221), (8, 5), (225, 224), (224, 225)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_equal_transformers(size, mode):
    picture = photo(*size, mode)
    made = CLIPImageProcessor()(picture)["pixel_values"]
    expected = CLIPImageProcessorPil()(images=[picture], return_tensors="np")["pixel_values"]
    assert made.shape == (1, 3, 224, 224) and made.dtype == torch.float32 and made.is_contiguous()
    assert np.array_equal(made.numpy(), expected)


def test_pixels_are_the_cropped_and_normalised_ones():
    picture = photo(451, 300)
    resized = picture.resize((336, 224), PIL.Image.Resampling.BICUBIC).crop((56, 0, 280, 224))
    made = CLIPImageProcessor()([picture, resized])["pixel_values"]
    levels = np.asarray(resized).astype(np.float64) / 255
    mean, std = NEW_FILE["image_mean"], NEW_FILE["image_std"]
    expected = ((levels - mean) / std).transpose(2, 0, 1)
    assert np.abs(made.numpy() - expected).max() <= 2e-6
    array = np.asarray(picture).astype(np.float32) / 255
    assert torch.equal(CLIPImageProcessor()(array[None])["pixel_values"], made[:1])
    assert torch.equal(
        CLIPImageProcessor()(torch.from_numpy(array).permute(2, 0, 1))["pixel_values"], made[:1]
    )


@pytest.mark.parametrize(
    "file",
    [OLD_FILE, NEW_FILE, {**NEW_FILE, "size": {"shortest_edge": 40, "longest_edge": None}, "crop_size": 32}],
    ids=["old", "new", "other sizes"],
)
def test_files_open_and_are_saved_for_both(file, tmp_path):
    (tmp_path / "feature_extractor").mkdir()
    (tmp_path / "feature_extractor" / "preprocessor_config.json").write_text(
        json.dumps({**file, "new_key": 1})
    )
    ours = CLIPImageProcessor.from_pretrained(tmp_path, subfolder="feature_extractor")
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "feature_extractor")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    picture = photo(123, 77)
    expected = theirs(images=[picture], return_tensors="np")["pixel_values"]
    for name in ("feature_extractor", "ours", "theirs"):
        opened = CLIPImageProcessor.from_pretrained(tmp_path / name)
        assert np.array_equal(opened(picture)["pixel_values"].numpy(), expected), name
        again = CLIPImageProcessorPil.from_pretrained(tmp_path / name)
        assert np.array_equal(again(images=[picture], return_tensors="np")["pixel_values"], expected), name
    saved = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert saved["new_key"] == 1 and saved["image_processor_type"] == "CLIPImageProcessor"
    assert CLIPImageConfig.from_dict(saved).to_dict() == ours.config.to_dict() == saved
    assert ours.config.replace(size=300).size == 300


@pytest.mark.parametrize(
    "path",
    [
        *(f"{name}/feature_extractor" for name in ("stable-diffusion-v1-5", "stable-diffusion-2-1")),
        "chronoedit-14b/image_processor",
    ],
)
def test_published_settings(path, shared_data):
    opened = CLIPImageProcessor.from_pretrained(shared_data / path)
    picture = photo(300, 200)
    assert torch.equal(opened(picture)["pixel_values"], CLIPImageProcessor()(picture)["pixel_values"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"size": {"height": 224, "width": 224}}, "only a shortest_edge"),
        ({"size": 0}, "size=0, crop_size"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type='ViTImageProcessor'"),
    ],
    ids=str,
)
def test_image_settings_that_are_not_supported_are_refused(changes, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**NEW_FILE, **changes}))
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{message}"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_images_that_are_refused(tmp_path):
    processor = CLIPImageProcessor()
    with pytest.raises(ValueError, match="image of 1 x 9000000 pixels is too narrow"):
        processor(PIL.Image.new("RGB", (1, 9_000_000)))
    with pytest.raises(ValueError, match="images is an empty list"):
        processor([])
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor(photo(9, 9), return_tensors="np")
    with pytest.raises(FileNotFoundError):
        CLIPImageProcessor.from_pretrained(tmp_path)
