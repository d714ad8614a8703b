"""Cut the recorded tokenizer and image-processor outputs down to what the tests need on any machine.

    python tests/goldens/copy_text_and_images.py [--data FOLDER]

FOLDER (default: ../shared/data beside the checkout) holds goldens/ recorded from transformers' Qwen2Tokenizer
and Qwen2VLImageProcessor and diffusers' buckets. Writes beside this file qwen_tiny/ (558 tokens, and
ids.json), size_rules.json and processor.safetensors (a picture and its patches, as the uint8 levels behind
the floats).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    goldens = parser.parse_args().data / "goldens"

    folder = HERE / "qwen_tiny"
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(goldens / "tiny-joyimage-edit" / "tokenizer" / name, folder / name)
    recorded = json.loads((goldens / "tokenizers" / "qwen_tiny.json").read_text(encoding="utf-8"))
    write_json(folder / "ids.json", recorded)

    tensors = load_file(goldens / "joyimage" / "processor.safetensors")
    kept = {}
    for name in ("enlarged",):
        kept[f"{name}.image"] = tensors[f"{name}.image_u8"]
        kept[f"{name}.image_grid_thw"] = tensors[f"{name}.image_grid_thw"]
        values = tensors[f"{name}.pixel_values"].unflatten(1, (3, 2, 16, 16))
        levels = (values[:, :, 0] * 127.5 + 127.5).round()
        assert torch.equal(values[:, :, 0], values[:, :, 1]) and torch.equal(
            (levels - 127.5) / 127.5, values[:, :, 0]
        )
        kept[f"{name}.levels"] = levels.to(torch.uint8)
    save_file(kept, HERE / "processor.safetensors")

    rules = json.loads((goldens / "joyimage" / "size_rules.json").read_text(encoding="utf-8"))
    rows = [[row["h"], row["w"], *row["smart_resize"], *row["bucket"]] for row in rules["sizes"]]
    write_json(HERE / "size_rules.json", {"columns": "h, w, smart_resize h, w, bucket h, w", "rows": rows})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
