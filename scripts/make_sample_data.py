"""Make a small corpus in RedPajama's format, and a tokenizer trained on it, from the files of a Python installation.

    python scripts/make_sample_data.py --output_dir quickstart

writes `data/*.jsonl`, one file for each of RedPajama's seven slices, and `tokenizer/`, a SentencePiece model with
LLaMA's settings that `AutoTokenizer` loads. The text is prose and code by people: source files and documentation of
the standard library and of installed packages. The same Python and packages give the same files.
"""

import argparse
import ast
import hashlib
import html
import io
import json
import math
import platform
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from tqdm import tqdm
from transformers import LlamaTokenizer, LlamaTokenizerFast

MIN_CHARACTERS = 300
MAX_CHARACTERS = 50_000
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
SITE_PACKAGES = [sysconfig.get_path("purelib")]  # without setuptools' vendored copies on sys.path
# Vendored packages, tests, and modules that hold tables or copies.
SKIPPED = re.compile(
    r"(^|/)(site-packages|dist-packages|_vendor|_?tests?|idle_test|encodings|pydoc_data|_sysconfigdata\w*)(/|\.)"
)
Document = tuple[str, dict[str, str]]  # text, and its source: the keys differ between slices, as in RedPajama


# Readers of the installation.


def python_sources(*packages: str) -> Iterator[tuple[str, str, str]]:
    """Yield (package, path in it, source) of every module of the packages, in an order that mixes subjects.

    The package "python" is the standard library.
    """
    folders = {name: Path(spec.origin).parent for name in packages if (spec := find_spec(name)) and spec.origin}
    if "python" in packages:
        folders["python"] = STANDARD_LIBRARY
    files = []
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            name = path.relative_to(folder).as_posix()
            if not SKIPPED.search(name):
                files.append((hashlib.sha256(name.encode()).digest(), package, name, path))
    for _, package, name, path in sorted(files):
        yield package, name, path.read_text(encoding="utf-8", errors="ignore")


def docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, its classes and functions, in source order."""
    if text := ast.get_docstring(node):
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child, f"{name}.{child.name}")


def module_docstrings(*packages: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (module name, its docstrings) of every module of the packages."""
    for package, path, source in python_sources(*packages):
        parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
        module = ".".join(parts if package == "python" else [package, *parts])
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source)
        except SyntaxError:
            continue
        yield module, list(docstrings(tree, module))


def distributions() -> list[metadata.Distribution]:
    found = metadata.distributions(path=SITE_PACKAGES)
    return sorted((each for each in found if each.read_text("METADATA")), key=lambda each: each.name.lower())


# Slices: each takes the text that resembles its namesake most.


def github() -> Iterator[Document]:
    """Source files of the standard library."""
    for package, path, source in python_sources("python"):
        yield source, {"package": package, "path": path, "language": "Python"}


def book() -> Iterator[Document]:
    """Long texts: the documentation of whole modules, with a chapter for each class and function."""
    for module, chapters in module_docstrings("python", "torch"):
        text = "\n\n\n".join(f"{name}\n\n{text}" for name, text in chapters)
        if len(text) > 10 * MIN_CHARACTERS:
            yield text, {"short_book_title": module}


def arxiv() -> Iterator[Document]:
    """Documentation of mathematical libraries, with formulas and references."""
    for module, documentation in module_docstrings("mpmath", "networkx", "sympy"):
        for name, text in documentation:
            yield text, {"module": module, "title": name}


def stackexchange() -> Iterator[Document]:
    """Documentation that answers a question with an example session."""
    for module, documentation in module_docstrings("numpy", "pandas"):
        for name, text in documentation:
            if ">>>" in text:
                yield text, {"module": module, "about": name, "language": "en"}


def wikipedia() -> Iterator[Document]:
    """Articles of the Python reference, each about one topic."""
    for title, text in topics.items():
        yield text, {"title": title, "source": "pydoc topics", "language": "en"}


def c4() -> Iterator[Document]:
    """Introductory pages of packages."""
    for distribution in distributions():
        if text := distribution.metadata.get_payload():  # type: ignore[attr-defined]
            yield text, {"package": distribution.name, "version": distribution.version}


def common_crawl() -> Iterator[Document]:
    """Pages, notes and licences that come with Python and its packages."""
    files = [("python", path.name, path) for path in sorted(STANDARD_LIBRARY.glob("*.txt"))]
    files += [("idlelib", path.name, path) for path in sorted((STANDARD_LIBRARY / "idlelib").glob("*"))]
    for distribution in distributions():
        package, record = distribution.name, distribution.read_text("RECORD") or ""
        for name in sorted(line.split(",")[0] for line in record.splitlines()):
            files.append((package, name, Path(str(distribution.locate_file(name)))))
    page = re.compile(r"\.(html|txt|rst|md)$|(^|/)(LICEN[CS]E|COPYING|NOTICE)$")
    for package, name, path in files:
        if page.search(name) and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            if name.endswith(".html"):
                text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", text))
            if len(text) > 30 * text.count("\n"):  # lists of names or words are not prose
                yield text, {"package": package, "file": name}


@dataclass(frozen=True)
class Slice:
    subset: str  # `red_pajama_subset` in each row
    file: str
    fraction: float  # of the corpus
    documents: Callable[[], Iterator[Document]]
    meta_is_string: bool = False  # in RedPajama, `meta` is a JSON string in some slices, an object in others


SLICES = (
    Slice("github", "github_sample.jsonl", 0.28, github),
    Slice("book", "book_sample.jsonl", 0.20, book),
    Slice("arxiv", "arxiv_sample.jsonl", 0.14, arxiv),
    Slice("stackexchange", "stackexchange_sample.jsonl", 0.12, stackexchange),
    Slice("c4", "c4_sample.jsonl", 0.11, c4, meta_is_string=True),
    Slice("common_crawl", "cc_2023-06_sample.jsonl", 0.08, common_crawl, meta_is_string=True),
    Slice("wikipedia", "wikipedia_sample.jsonl", 0.07, wikipedia),
)


# The corpus.


def split_long(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Split a text before unindented lines that follow a blank one: between paragraphs, functions or classes."""
    part = ""
    for paragraph in re.split(r"(?<=\n\n)(?=\S)", text):
        if part and len(part) + len(paragraph) > limit:
            yield part
            part = ""
        part += paragraph
    yield part


def parts(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents, with long ones split and short ones dropped."""
    for whole, meta in documents:
        for text in map(str.strip, split_long(whole)):
            if len(text) >= MIN_CHARACTERS:
                yield text, meta


class Novelty:
    """Recognizes documents that mostly repeat lines of earlier ones, such as licences and copied pages."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        lines = {hashlib.md5(line.encode()).digest(): len(line) for line in map(str.strip, text.splitlines()) if line}
        repeated = sum(length for digest, length in lines.items() if digest in self.seen)
        new = 2 * repeated < sum(lines.values())
        if new:
            self.seen.update(lines)
        return new


def write_corpus(folder: Path, megabytes: float) -> dict[str, int]:
    """Write a JSONL file per slice; return each slice's bytes of text, fewer if the installation has no more."""
    novelty = Novelty()
    sizes = {}
    with tqdm(total=int(megabytes * 1e6), unit="B", unit_scale=True, desc="sample data", disable=None) as progress:
        for piece in SLICES:
            size = 0
            with open(folder / piece.file, "w", encoding="utf-8") as file:
                for text, meta in parts(piece.documents()):
                    if size >= piece.fraction * megabytes * 1e6:
                        break
                    if novelty.is_new(text):
                        row = {
                            "text": text,
                            "meta": json.dumps(meta) if piece.meta_is_string else meta,
                            "red_pajama_subset": piece.subset,
                        }
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        size += len(text.encode())
                        progress.update(len(text.encode()))
            sizes[piece.subset] = size
    return sizes


# The tokenizer.


def corpus_lines(folder: Path) -> Iterator[str]:
    for piece in SLICES:
        with open(folder / piece.file, encoding="utf-8") as file:
            for row in file:
                yield from json.loads(row)["text"].split("\n")


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> bytes:
    """Return a serialized SentencePiece model, trained with the settings stored in LLaMA's own tokenizer.model.

    Raises:
        RuntimeError: the text has too few or too many distinct characters for the vocabulary size.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes) -> None:
    """Write the model, and the files with which AutoTokenizer loads its slow and fast tokenizers without a network."""
    vocab_file = folder / "tokenizer.model"
    vocab_file.write_bytes(model)
    LlamaTokenizer(str(vocab_file), legacy=False).save_pretrained(folder)
    LlamaTokenizerFast.from_pretrained(folder, legacy=False).save_pretrained(folder)


# The program.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write data/ and tokenizer/ to")
    parser.add_argument("--megabytes", type=float, default=6, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.megabytes < math.inf:
        parser.error(f"--megabytes {args.megabytes} must be a finite number above 0")

    settings = json.dumps(
        {
            "megabytes": args.megabytes,
            "vocab_size": args.vocab_size,
            "python": platform.python_version(),
            "program": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        }
    )
    manifest = args.output_dir / "sample_data.json"
    folders = [args.output_dir / "data", args.output_dir / "tokenizer"]
    if all(folder.is_dir() for folder in folders) and manifest.is_file() and manifest.read_text() == settings:
        print(f"sample data: {folders[0]} and {folders[1]} already exist")
        return
    for folder in folders:
        if folder.exists() and not manifest.is_file():
            parser.error(f"--output_dir: {folder} exists and was not made by this program; choose another folder")
    try:
        sizes = make(args, parser, manifest, folders, settings)
    except OSError as error:
        parser.error(f"--output_dir: {args.output_dir} cannot be written ({error.strerror}); give another folder")
    megabytes = ", ".join(f"{subset} {size / 1e6:.2f}" for subset, size in sizes.items())
    print(f"sample data: {sum(sizes.values()) / 1e6:.2f} MB in {folders[0]} ({megabytes})")
    print(f"sample data: tokenizer of {args.vocab_size} tokens in {folders[1]}")


def make(
    args: argparse.Namespace, parser: argparse.ArgumentParser, manifest: Path, folders: list[Path], settings: str
) -> dict[str, int]:
    """Make both folders or neither; return the bytes of text by slice."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".making-") as temporary:
        made = [Path(temporary, folder.name) for folder in folders]
        for folder in made:
            folder.mkdir()
        sizes = write_corpus(made[0], args.megabytes)
        try:
            model = train_tokenizer(corpus_lines(made[0]), args.vocab_size)
        except RuntimeError as error:
            parser.error(f"--vocab_size {args.vocab_size} does not suit {args.megabytes} MB of text: {error}")
        write_tokenizer(made[1], model)
        manifest.write_text("being made")  # marks incomplete folders as this program's
        for source, target in zip(made, folders, strict=True):
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
    manifest.write_text(settings)
    return sizes


if __name__ == "__main__":
    main()
