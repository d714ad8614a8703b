"""The Qwen tokenizer, and the processor that joins it to pictures: equal to transformers and recorded ids."""

import json
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import Qwen2Tokenizer as Reference
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from joyedit.media.images import Qwen2VLImageConfig, Qwen2VLImageProcessor
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor
from joyedit.text.tokenizer import Batch

TINY = Path(__file__).parents[1] / "goldens" / "qwen_tiny"
SYSTEM = (
    "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n"
)
EDIT = (
    SYSTEM
    + "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX_IDS = [
    *(
        151644,
        8948,
        198,
        1124,
        77,
        74785,
        279,
        2168,
        553,
        44193,
        279,
        1894,
        11,
        6083,
        11,
        1379,
        11,
        10434,
        11,
    ),
    *(12194, 11, 1467, 11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198, 151644),
]
HARD = [
    "",
    " ",
    "\n\n \t\r\n",
    "e\u0301 \u0344 \u1e9b\u0323 ﬁ Å \u2126 각 각",  # composed, decomposed and compatibility forms
    "<think>\u0338</think> <|im_start|>\u0338",
    "<|im_start|><|im_start|> <|im_end|x <|image_pad|><|image_pad|>",
    "\u0000\u0001\ufffe\U0010ffff\u202e",
    "IT'S we'Ll 'S 'ſ 12345 1.5e-3 ½",
    "👩🏽‍🚀🇩🇪 \u200d\ufeff नमस्ते",
    "a" * 5000 + " word" * 3000,
]


@pytest.fixture(scope="module")
def tiny() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def real(shared_data) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(shared_data / "joyai-image-edit", subfolder="tokenizer")


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of letters, marks, spaces, line ends, emoji and pieces of chat tokens, up to 40 pieces long."""
    rng = random.Random(seed)
    chars = [
        chr(c) for c in (*range(32, 127), *range(0xA0, 0x250), *range(0x300, 0x330), *range(0x4E00, 0x4E40))
    ]
    chars += [*"\n\r\t  \u2028\u3000'’", "\U0001f600", "\u200d", "\uac00", "\u1100", "\u1161"]
    chars += [
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<think>",
        "</tool_call>",
        "<|",
        "|>",
        "'ll",
        " the",
    ]
    return ["".join(rng.choices(chars, k=rng.randint(0, 40))) for _ in range(count)]


def copy_tiny(folder: Path, *left_out: str) -> Path:
    """The tokenizer's folder, writable, without ids.json and the files named."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("ids.json", *left_out))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def check_recorded(tokenizer: Qwen2Tokenizer, recorded: dict) -> None:
    assert len(tokenizer) == recorded["length"]
    for part in ("raw", "t_image", "t_multi_unexpanded"):
        for row in recorded[part]:
            assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
    assert tokenizer.batch_decode([row["ids"] for row in recorded["raw"]]) == recorded["decoded_raw"]
    batch = tokenizer(recorded["padded_batch"]["texts"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == recorded["padded_batch"]["input_ids"]
    assert batch.attention_mask.tolist() == recorded["padded_batch"]["attention_mask"]


def test_tiny_vocabulary_gives_the_recorded_ids(tiny):
    check_recorded(tiny, json.loads((TINY / "ids.json").read_text(encoding="utf-8")))


def test_real_vocabulary_gives_the_recorded_ids(real, shared_data):
    check_recorded(
        real, json.loads((shared_data / "goldens/tokenizers/qwen_real.json").read_text(encoding="utf-8"))
    )
    assert (len(real), real.vocab_size, real.pad_token_id, real.eos_token_id) == (
        151669,
        151643,
        151643,
        151645,
    )


def test_templates_have_the_published_lengths_and_prefix(real):
    edit = real.encode(EDIT.format("a cat"))
    assert (
        edit[:34] == PREFIX_IDS
        and edit[34:36] == [872, 198]
        and edit[-5:] == [151645, 198, 151644, 77091, 198]
    )
    assert len(real.encode(SYSTEM + "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n")) == 43
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), real)
    for (width, height), length in {(1024, 1024): 1069, (832, 1152): 981}.items():
        made = processor(text=EDIT.format("a cat"), images=PIL.Image.new("RGB", (width, height)))
        assert made.input_ids.shape == (1, length)


def check_equal(ours: Qwen2Tokenizer, theirs, texts: list[str]) -> None:
    assert len(ours) == len(theirs)
    split = theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for text in texts:
        assert ours.backend.pre_tokenizer.pre_tokenize_str(text) == split(text), text
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), (
            text
        )


def test_tiny_vocabulary_equals_transformers(tiny):
    check_equal(tiny, Reference.from_pretrained(TINY), HARD + random_texts(2000))


def test_real_vocabulary_equals_transformers(real, shared_data):
    theirs = Reference.from_pretrained(shared_data / "joyai-image-edit" / "tokenizer")
    check_equal(real, theirs, HARD + random_texts(3000, seed=1))


@pytest.mark.parametrize(
    "left_out",
    [
        ("merges.txt", "vocab.json"),
        ("tokenizer.json", "added_tokens.json"),
        ("tokenizer.json", "tokenizer_config.json"),
    ],
    ids=["tokenizer.json", "added tokens from the config", "added_tokens.json alone"],
)
def test_every_published_set_of_files_equals_transformers(left_out, tmp_path, tiny):
    folder = copy_tiny(tmp_path / "files")
    tiny.backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**special, "additional_special_tokens": ["<|im_start|>", "<|image_pad|>"]})
    )
    for name in left_out:
        (folder / name).unlink()
    ours, theirs = Qwen2Tokenizer.from_pretrained(folder), Reference.from_pretrained(folder)
    check_equal(ours, theirs, HARD + random_texts(300, seed=2))
    assert (ours.pad_token, ours.eos_token) == (theirs.pad_token, theirs.eos_token)


@pytest.mark.parametrize(
    "call",
    [
        dict(padding=True),
        dict(padding="longest", truncation=True, max_length=7),
        dict(padding="max_length", max_length=9),
        dict(padding="max_length", truncation=True, max_length=5),
        dict(truncation=True, max_length=3),
        dict(truncation=True),
        dict(),
    ],
    ids=str,
)
def test_padding_and_truncation_equal_transformers(call, tiny):
    theirs = Reference.from_pretrained(TINY)
    texts = ["", "the red cat", "<|im_start|>user\nadd snow, 你好<|im_end|>", "a"]
    for given in (texts, texts[1]):
        expected = theirs(given, **call)
        assert tiny(given, **call) == {name: expected[name] for name in ("input_ids", "attention_mask")}
    if call.get("padding") in (True, "max_length") and call.get("truncation"):
        expected = theirs(texts, return_tensors="pt", **call)
        made = tiny(texts, return_tensors="pt", **call)
        assert made.input_ids.dtype == torch.int64 and torch.equal(made.input_ids, expected.input_ids)
        assert torch.equal(made.attention_mask, expected.attention_mask)


def test_token_lookups_equal_transformers(tiny):
    theirs = Reference.from_pretrained(TINY)
    for tokens in ("<|image_pad|>", ["Ġ", "<think>", "<|endoftext|>"]):
        assert tiny.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert tiny.convert_ids_to_tokens([0, 300, 532]) == theirs.convert_ids_to_tokens([0, 300, 532])
    assert tiny.convert_tokens_to_ids("no such token") is None
    assert tiny.decode(torch.tensor([64, 65])) == tiny.decode([64, 65]) == theirs.decode([64, 65])
    assert tiny.decode(64) == theirs.decode(64)


def test_saved_tokenizer_opens_equal_here_and_in_transformers(tiny, tmp_path):
    tiny.chat_template, before = "{{ messages }}\n", tiny.chat_template
    tiny.save_pretrained(tmp_path / "saved")
    tiny.chat_template = before
    again = Qwen2Tokenizer.from_pretrained(tmp_path / "saved")
    theirs = Reference.from_pretrained(tmp_path / "saved")
    check_equal(again, theirs, HARD + random_texts(300, seed=3))
    for text in HARD + random_texts(300, seed=3):
        assert again.encode(text) == tiny.encode(text)
    assert (
        (theirs.pad_token_id, theirs.eos_token_id) == (again.pad_token_id, again.eos_token_id) == (532, 534)
    )
    assert theirs.model_max_length == again.model_max_length == 262144
    assert again.chat_template == "{{ messages }}\n"
    assert not list((tmp_path / "saved").glob(".*"))
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


def test_folder_saved_by_transformers_opens_equal(tiny, tmp_path):
    Reference.from_pretrained(TINY).save_pretrained(tmp_path)
    ours = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert [ours.encode(text) for text in HARD] == [tiny.encode(text) for text in HARD]
    assert (ours.pad_token_id, ours.eos_token_id) == (532, 534)


def test_saving_into_an_older_folder_replaces_its_special_tokens(tiny, tmp_path):
    folder = copy_tiny(tmp_path / "old")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    tiny.save_pretrained(folder)
    assert Qwen2Tokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"


def test_truncation_and_padding_in_tokenizer_json_do_not_act(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    raw["truncation"] = {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        **{"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Qwen2Tokenizer.from_pretrained(tmp_path).encode("the red cat") == tiny.encode("the red cat")


def test_texts_that_are_not_text_are_refused(tiny):
    for wrong in (None, 3, ["a", None], [["a"]], {"a": 1}, b"a"):
        with pytest.raises(TypeError, match="text must be a str or a list of str"):
            tiny(wrong)
    with pytest.raises(ValueError, match="not valid Unicode"):
        tiny.encode("half a pair \ud83d")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(padding="left"), "padding='left'"),
        (dict(max_length=5), "needs truncation"),
        (dict(max_length=0, truncation=True), "must be positive"),
        (dict(return_tensors="tf"), "return_tensors='tf'"),
        (dict(pad_to_multiple_of=8), "pad_to_multiple_of=8 is not supported: pad with"),
        (dict(truncation="left"), "truncation='left'"),
        (dict(padding_side="left"), "padding_side: always 'right'"),
        (dict(return_tensors="pt"), "pass padding=True"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(call, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(["a", "two words"], **call)
    with pytest.raises(TypeError):
        tiny("a", pad_to_multiple=8)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: (f / "merges.txt").unlink(), FileNotFoundError, "no tokenizer.json, and not both"),
        (lambda f: (f / "vocab.json").write_text('{"a": '), ValueError, "vocab.json"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\na b c\n"), ValueError, "merges.txt"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ValueError, "tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("[1]"), ValueError, "tokenizer_config.json"),
        (
            lambda f: edit_json(f / "tokenizer_config.json", pad_token="<none>"),
            ValueError,
            "pad_token '<none>'",
        ),
        (
            lambda f: edit_json(f / "tokenizer_config.json", add_bos_token=True),
            ValueError,
            "add_bos_token=True",
        ),
        (
            lambda f: edit_json(
                f / "tokenizer_config.json", added_tokens_decoder={"900": {"content": "<gap>"}}
            ),
            ValueError,
            "'<gap>' has id 900, but comes out as 532",
        ),
    ],
)
def test_broken_folders_are_refused_with_the_file_named(break_it, error, message, tmp_path):
    folder = copy_tiny(tmp_path / "files")
    break_it(folder)
    with pytest.raises(error, match=message):
        Qwen2Tokenizer.from_pretrained(folder)


def test_missing_folder_and_unknown_option_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Qwen2Tokenizer.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    with pytest.raises(TypeError, match="did you mean 'revision'"):
        Qwen2Tokenizer.from_pretrained(TINY, revison="main")


def test_one_tokenizer_serves_several_threads(tiny):
    texts = random_texts(200, seed=4)
    expected = [tiny(texts, padding="max_length", truncation=True, max_length=n) for n in (5, 50)]
    made: dict[int, list] = {5: [], 50: []}

    def work(length: int) -> None:
        for _ in range(5):
            made[length].append(tiny(texts, padding="max_length", truncation=True, max_length=length))

    threads = [threading.Thread(target=work, args=(length,)) for length in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {5: [expected[0]] * 5, 50: [expected[1]] * 5}


SMALL = Qwen2VLImageConfig(min_pixels=1024, max_pixels=65536)


@pytest.fixture
def processor(tiny) -> Qwen3VLProcessor:
    return Qwen3VLProcessor(Qwen2VLImageProcessor(SMALL), tiny)


def photo(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(noise)


def test_placeholders_become_as_many_tokens_as_the_picture_has(processor):
    pictures = [photo(64, 96, 1), photo(128, 32, 2), photo(64, 64, 3)]
    texts = [
        EDIT.format("<|vision_start|><|image_pad|><|vision_end|>join"),
        EDIT.format("a longer instruction"),
    ]
    made = processor(text=texts, images=pictures, padding=True)
    assert made.image_grid_thw.tolist() == [[1, 6, 4], [1, 2, 8], [1, 4, 4]]
    assert made.pixel_values.shape == (24 + 16 + 16, 1536) and made.pixel_values.dtype == torch.float32
    pads = (made["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert pads == [6 + 4, 4]
    expanded = [
        texts[0].replace("<|image_pad|>", "X" * 6, 1).replace("<|image_pad|>", "X" * 4, 1),
        texts[1].replace("<|image_pad|>", "X" * 4),
    ]
    for row, mask, text in zip(made.input_ids, made.attention_mask, expanded, strict=True):
        assert row[mask.bool()].tolist() == processor.tokenizer.encode(text.replace("X", "<|image_pad|>"))
    alone = [processor.image_processor(one)["pixel_values"] for one in pictures]
    assert torch.equal(made.pixel_values, torch.cat(alone))


def test_text_alone_has_no_pictures(processor):
    made = processor(text=["a cat", "a"], padding=True)
    assert sorted(made) == ["attention_mask", "input_ids"]
    with pytest.raises(AttributeError, match="has no 'pixel_values'"):
        _ = made.pixel_values


@pytest.mark.parametrize("images", [None, [photo(64, 64)] * 2, [photo(64, 64)] * 3])
def test_number_of_pictures_and_placeholders_must_agree(images, processor):
    prompt = EDIT.format("a cat") if images is None or len(images) == 2 else EDIT.format("<|image_pad|>")
    with pytest.raises(ValueError, match="placeholders"):
        processor(text=prompt, images=images)


def test_batch_moves_tensors_and_casts_those_of_floating_point():
    batch = Batch(ids=torch.ones(2, dtype=torch.int64), pixels=torch.ones(2), name="kept").to(
        "cpu", torch.bfloat16
    )
    assert (batch.ids.dtype, batch.pixels.dtype, batch.name) == (torch.int64, torch.bfloat16, "kept")


def write_processor(folder: Path, newer: bool) -> None:
    size = {"shortest_edge": 4096, "longest_edge": 16384}
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": size,
        "patch_size": 16,
        "new_key": 1,
    }
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2}
    if newer:
        both = {"image_processor": images, "video_processor": videos, "processor_class": "Qwen3VLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(both))
        images = {**images, "size": {"shortest_edge": 1, "longest_edge": 2}}  # of an older save: not read
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


@pytest.mark.parametrize("newer", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
def test_processor_opens_and_saves_both_kinds_of_folder(newer, tmp_path, tiny):
    folder = copy_tiny(tmp_path / "given")
    write_processor(folder, newer)
    opened = Qwen3VLProcessor.from_pretrained(folder)
    assert (opened.image_processor.config.min_pixels, opened.image_processor.config.max_pixels) == (
        4096,
        16384,
    )
    opened.save_pretrained(tmp_path / "saved")
    again = Qwen3VLProcessor.from_pretrained(tmp_path / "saved")
    assert again.image_processor.config.to_dict() == {
        **opened.image_processor.config.to_dict(),
        "processor_class": "Qwen3VLProcessor",
    }
    assert again.image_processor.config["new_key"] == 1 and again.video_settings["fps"] == 2
    call = dict(text=EDIT.format("a cat"), images=photo(70, 45))
    for name, value in opened(**call).items():
        assert torch.equal(value, again(**call)[name])
    assert Qwen3VLProcessor.from_pretrained(folder, tokenizer=tiny).tokenizer is tiny


def test_saved_processor_opens_in_transformers(tmp_path, processor):
    """As far as transformers goes without torchvision: the tokenizer, and its PIL image processor."""
    processor.save_pretrained(tmp_path)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    picture = photo(64, 96)
    expected = theirs(images=[picture], return_tensors="np")
    made = processor.image_processor(picture)
    assert np.abs(expected["pixel_values"] - made["pixel_values"].numpy()).max() <= 1e-6
    assert expected["image_grid_thw"].tolist() == made["image_grid_thw"].tolist()
    assert theirs.size.shortest_edge == 1024 and theirs.size.longest_edge == 65536
    check_equal(processor.tokenizer, Reference.from_pretrained(tmp_path), HARD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"resample": 2}, "resample=2"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type='CLIPImageProcessor'"),
        ({"size": {"height": 64, "width": 64}}, "shortest_edge"),
    ],
    ids=str,
)
def test_image_settings_that_are_not_supported_are_refused(changes, message, tmp_path):
    folder = copy_tiny(tmp_path / "given")
    write_processor(folder, newer=False)
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{message}"):
        Qwen3VLProcessor.from_pretrained(folder)


def test_processor_without_image_settings_or_image_token_is_refused(tmp_path, tiny):
    folder = copy_tiny(tmp_path / "given")
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        Qwen3VLProcessor.from_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 532}')
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no '<.image_pad.>'"):
        Qwen3VLProcessor(Qwen2VLImageProcessor(), Qwen2Tokenizer.from_pretrained(folder))
