"""Make a small set of prompts and completions from the documentation of Python's own modules.

    python scripts/make_sample_instructions.py --output_dir instructions

writes `train.jsonl` and `test.jsonl` with the columns `prompt` (the name of a function or class) and `completion` (the
first sentence of its documentation). The same Python gives the same files.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

from make_sample_data import module_docstrings

MAX_CHARACTERS = 80  # of a completion
TEST_FRACTION = 0.1


def pairs() -> list[dict[str, str]]:
    """Return a row for every documented public name, in an order that mixes modules."""
    found = {}
    for _, documentation in module_docstrings("python"):
        for name, text in documentation:
            sentence = re.split(r"(?<=\.)\s|\n\s*\n", text.strip())[0]
            sentence = " ".join(sentence.split())
            public = not any(part.startswith("_") for part in name.split("."))
            if public and name.count(".") in (1, 2) and sentence.endswith(".") and len(sentence) <= MAX_CHARACTERS:
                found[name] = {"prompt": f"What is {name}?", "completion": sentence}
    return [found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write train.jsonl and test.jsonl to")
    parser.add_argument("--examples", type=int, default=400, help="in both files together (default: %(default)s)")
    args = parser.parse_args()
    rows = pairs()[: args.examples]
    held_out = round(TEST_FRACTION * len(rows))
    for name, part in (("test", rows[:held_out]), ("train", rows[held_out:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        path = args.output_dir / f"{name}.jsonl"
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            path.unlink(missing_ok=True)
            parser.error(f"--output_dir: {path} cannot be written ({error.strerror}); give another folder")
        print(f"sample instructions: {len(part)} in {path}")


if __name__ == "__main__":
    main()
