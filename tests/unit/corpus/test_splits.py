"""Data sets of every layout are read as `datasets.load_dataset` reads them, on the hub and in a local folder."""

import gzip
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from datasets.data_files import SPLIT_KEYWORDS
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import finetune
from corpora import documents_in, error_of
from corpus.rows import FILE_SUFFIXES, read_documents
from corpus.sources import resolve_source
from corpus.splits import NAMES_A_SPLIT
from hub_server import Branches, HubServer, connect
from runtime.console import InputError
from training.flags import take

NUMBERS = itertools.count()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        connect(monkeypatch, server, tmp_path / "hf")
        yield server


def content(path: str) -> bytes:
    """Return a file with two rows, whose texts name the file."""
    texts = [f"{path} {row}" for row in range(2)]
    if path.endswith(".parquet"):
        output = io.BytesIO()
        pa.parquet.write_table(pa.table({"text": texts}), output)
        return output.getvalue()
    lines = "text\n" + "\n".join(texts) if path.endswith(".csv") else "\n".join(json.dumps({"text": t}) for t in texts)
    return gzip.compress(lines.encode()) if path.endswith(".gz") else lines.encode()


def card(configurations: list[dict] | None) -> bytes:
    front = {"license": "mit"} | ({"configs": configurations} if configurations else {})
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# A data set\n".encode()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return str(folder)


def texts_of(name: str, **request) -> list[str]:
    return [document.text for document in documents_in(resolve_source(name, **request))]


def files_of(name: str, **request) -> list[str]:
    return [file.path for file in resolve_source(name, **request).files]


FOLDERS = st.sampled_from(["", "", "", "data/", "en/", "fr/x/", "train/", "test/", "x-train/", "__MACOSX/", ".git/"])
NAMES = ("train", "test", "a", "b", "contest", "dev-1", "wiki_train_1", "Train", ".hidden", "evaluation.v2", "eval")
SHARDS = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "all-00000-of-00001")
SUFFIXES = st.sampled_from([".jsonl", ".jsonl", ".json", ".jsonl.gz", ".parquet", ".parquet", ".csv", ".png"])


@st.composite
def data_sets(draw):
    """Draw the files of a data set, all of one kind if it has no card, and a configuration to ask for, or None."""
    kind = draw(st.sampled_from(["no card", "card", "configurations", "configurations"]))
    suffixes = draw(st.lists(SUFFIXES, min_size=1, max_size=1 if kind == "no card" else 2))
    path = st.builds("{}{}{}".format, FOLDERS, st.sampled_from(NAMES + SHARDS), st.sampled_from(suffixes))
    paths = draw(st.lists(path, min_size=1, max_size=6, unique=True))
    configurations, names = None, [None, "default", "en"]
    if kind == "configurations":
        globs = ["*.jsonl", "**/*.jsonl", "data/*", "en/**", "**", "*/[a-m]*", "t*", "./*", "missing.jsonl"]
        pattern = st.sampled_from(paths) | st.sampled_from(paths) | st.sampled_from(globs)
        patterns = pattern | st.lists(pattern, min_size=1, max_size=2)
        splits = st.sampled_from([("train",), ("train", "test"), ("test",), ("validation", "train")])
        by_split = splits.flatmap(lambda names: st.tuples(*(st.tuples(st.just(name), patterns) for name in names)))
        by_split = by_split.map(lambda pairs: [{"split": split, "path": path} for split, path in pairs])
        setting = st.fixed_dictionaries(
            {},
            optional={
                "data_files": patterns | by_split,
                "data_dir": st.sampled_from(["data", "en", "fr", "fr/x/"]),
                "default": st.just(True),
            },
        )
        names = draw(st.lists(st.sampled_from(["default", "en", "fr", "a"]), min_size=1, max_size=3, unique=True))
        configurations = [{"config_name": name, **draw(setting)} for name in names]
    wanted = draw(st.sampled_from([None, None, *names, *names, "nowhere"]))
    files = {path: content(path) for path in paths}
    return files if kind == "no card" else files | {"README.md": card(configurations)}, wanted


class TestAsDatasets:
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data_sets())
    def test_the_same_rows_or_a_refusal(self, hub, tmp_path, drawn):
        files, wanted = drawn
        number = next(NUMBERS)
        folder = write(tmp_path / str(number), files)
        hub.repositories[f"some/set{number}"] = Branches({"main": files})
        datasets.disable_progress_bars()
        try:
            cache = str(tmp_path / "datasets")
            expected, problem = datasets.load_dataset(folder, wanted, split="train", cache_dir=cache)["text"][:], ""
        except Exception as error:
            expected, problem = None, f"{type(error).__name__}: {error}"
        found = {}
        for name in (folder, f"some/set{number}"):
            try:
                found[name] = sorted(texts_of(name, configuration=wanted, flag="--task_name"))
            except InputError as error:
                found[name], message = None, str(error)
                assert re.fullmatch("(--dataset|--task_name): .*", message)
        ours = found[folder]
        assert ours == found[f"some/set{number}"]
        event(f"datasets {'reads' if expected else 'refuses'}, we {'read' if ours else 'refuse'}")
        if expected is not None:
            readable = all(text.rpartition(" ")[0].lower().endswith(FILE_SUFFIXES) for text in expected)
            once = sorted(set(expected))  # `datasets` repeats a file that two patterns match
            assert ours == (once if readable else None)
        elif b"configs" in files.get("README.md", b"") and re.search("Unknown split|Config name is missing", problem):
            assert ours is None
        elif "BuilderConfig" in problem and ours is not None:  # the name of a folder or file counts too
            assert all(wanted in re.split(r"[/.]", text) for text in ours)

    def test_every_keyword_of_datasets_is_recognized(self):
        assert all(NAMES_A_SPLIT.search(word) for words in SPLIT_KEYWORDS.values() for word in words)


def both(hub, tmp_path, files: dict[str, bytes]) -> tuple[str, str]:
    """Put the same files into a local folder and on the hub."""
    hub.repositories["some/one"] = Branches({"main": files})
    return write(tmp_path / "clone", files), "some/one"


FILES = {path: content(path) for path in ("full.jsonl", "sample.jsonl", "held.jsonl", "fr.jsonl")}


class TestConfigurations:
    def test_of_a_card(self, hub, tmp_path):
        """A sample of the data is not read beside the whole, and the split `test` of the card is not trained on."""
        splits = [{"split": "train", "path": "full.jsonl"}, {"split": "test", "path": ["held.jsonl"]}]
        configurations = [
            {"config_name": "whole", "data_files": splits, "default": True},
            {"config_name": "sample", "data_files": "sample.jsonl"},
            {"config_name": "fr", "data_files": ["fr.*"]},
        ]
        for name in both(hub, tmp_path, FILES | {"README.md": card(configurations)}):
            assert files_of(name) == ["full.jsonl"]
            remark = resolve_source(name).remark
            assert "1 of other splits (held.jsonl), 2 of other configurations (fr.jsonl, ...), 1 .md" in remark
            assert files_of(name, split="test") == ["held.jsonl"]
            source = resolve_source(name, slices=["fr", "whole"])
            assert [(file.path, file.slice) for file in source.files] == [("fr.jsonl", "fr"), ("full.jsonl", "whole")]
            assert files_of(name, configuration="sample") == ["sample.jsonl"]
            assert error_of(resolve_source, name, slices=["fr", "de"]) == (
                f"--dataset_slices: {name} has no configuration de; choose of whole, sample, fr"
            )

    def test_none_chosen(self, hub, tmp_path):
        configurations = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("full", "fr")]
        for name in both(hub, tmp_path, FILES | {"README.md": card(configurations)}):
            data = take(finetune.Data, finetune.parse_args(["--model_path", "model", "-d", name]))
            assert error_of(finetune.find_source, data, "train") == (
                f"--dataset: {name} has several configurations; choose by --task_name: full, fr"
            )
            assert "choose by --dataset_slices: full, fr" in error_of(resolve_source, name)
            french, german = (replace(data, task_name=name) for name in ("fr", "de"))
            assert [file.path for file in finetune.find_source(french, "train").files] == ["fr.jsonl"]
            assert error_of(finetune.find_source, german, "train") == (
                f"--task_name: {name} has no configuration de; choose of full, fr"
            )

    def test_by_folders_and_files(self, hub, tmp_path):
        files = {path: content(path) for path in ("en/train.jsonl", "en/test.jsonl", "fr/train.jsonl", "de.jsonl")}
        for name in both(hub, tmp_path, files):
            (file,) = resolve_source(name, configuration="en").files
            assert [document.text for document in read_documents(file.fetch(), file.slice)] == [
                "en/train.jsonl 0",
                "en/train.jsonl 1",
            ]
            assert len(files_of(name, configuration="en", split="test")) == 1
            assert files_of(name, configuration="de") == ["de.jsonl"]
            assert error_of(resolve_source, name, configuration="nowhere", flag="--task_name") == (
                f"--task_name: {name} has no 'nowhere'; choose of de, en, fr"
            )

    def test_a_card_that_cannot_be_followed(self, hub, tmp_path):
        configuration = {"config_name": "default", "data_files": "full.jsonl"}
        cases = {
            b"---\nconfigs: [\n---\n": "the configurations in README.md of ",
            card([{"data_files": "full.jsonl"}]): "must include `config_name`",
            card([configuration | {"config_name": 2024}]): "(the name 2024 is no text without quotes)",
            card([configuration | {"default": True}, {"config_name": "a", "default": True}]): "several default configs",
            card([configuration | {"data_files": "/etc/*.json"}]): "names /etc/*.json, which is no file of the",
            card([configuration | {"data_files": "../x.jsonl"}]): "names ../x.jsonl, which is no file of the data set",
            card([configuration | {"data_files": "missing.jsonl"}]): "names missing.jsonl, which is not there",
            card([configuration | {"field": "data"}]): "sets field, which is not supported",
            card([configuration | {"data_files": [{"split": "test", "path": "full.jsonl"}]}]): (
                "has no split 'train', only test; give its files as a folder"
            ),
        }
        for text, expected in cases.items():
            for name in both(hub, tmp_path, FILES | {"README.md": text}):
                message = error_of(resolve_source, name)
                assert message.startswith("--dataset: ")
                assert expected in message

    def test_standalone_card(self, hub, tmp_path):
        text = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": "fr.jsonl"}]}).encode()
        for name in both(hub, tmp_path, FILES | {"README.md": card(None), ".huggingface.yaml": text}):
            assert files_of(name) == ["fr.jsonl"]


class TestLeftOut:
    def test_descriptions_and_hidden_files(self, hub, tmp_path):
        files = {"a.jsonl": content("a.jsonl"), "__MACOSX/a.jsonl": b"\0\5\26\7", ".cache/b.jsonl": b"?"}
        files |= dict.fromkeys(("stats.json", "dataset_infos.json", "tokenizer_config.json"), b"{}")
        local, name = both(hub, tmp_path, files)
        assert files_of(local) == files_of(name) == ["a.jsonl"]
        said = "1 dataset_infos.json, 1 stats.json, 1 tokenizer_config.json"
        assert resolve_source(local).remark == f"left out in {local}: 1 hidden (__MACOSX/a.jsonl), {said}"
        assert resolve_source(name).remark.endswith(f"left out: 2 hidden (.cache/b.jsonl, ...), {said}")

    def test_no_split_and_another_kind(self, hub, tmp_path):
        files = {path: content(path) for path in ("train.jsonl", "train.parquet", "train_2.jsonl", "more.jsonl")}
        for name in both(hub, tmp_path, files | {"README.md": card(None)}):
            assert files_of(name) == ["train.jsonl", "train_2.jsonl"]
            said = "1 of another kind than most (train.parquet), 1 of no split (more.jsonl)"
            assert said in resolve_source(name).remark

    @pytest.mark.parametrize(
        ("suffix", "remedy"), [("jsonl.xz", "xz -d"), ("json.bz2", "bzip2 -d"), ("zip", "unzip"), ("tar", "tar -xf")]
    )
    def test_archives(self, hub, tmp_path, suffix, remedy):
        files = {f"train.{suffix}": b"?"}
        local, name = both(hub, tmp_path, files)
        for place in (local, f"{local}/train.{suffix}", name):
            message = error_of(resolve_source, place)
            assert f"train.{suffix} first ({remedy}" in message

    def test_one_of_several_files_is_packed(self, hub, tmp_path):
        for name in both(hub, tmp_path, {"a.jsonl": content("a.jsonl"), "b.jsonl.xz": b"?"}):
            assert "of a kind that is not read (b.jsonl.xz)" in error_of(resolve_source, name)
