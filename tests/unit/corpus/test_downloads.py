"""Data sets on the hub with the layouts of real ones: found, downloaded, resumed, and read again without a network."""

import errno
import gzip
import hashlib
import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

from corpora import documents_in, error_of, reference_stream, stream_of
from corpus import downloads
from corpus.encoder import TextEncoder
from corpus.prepare import prepare_dataset
from corpus.rows import read_documents, read_rows
from corpus.sources import resolve_source
from corpus.units import make_units
from data_utils import StreamedDataset
from hub_server import Branches, HubServer, connect
from launching import ROOT, Run

SCRIPT = b"raise SystemExit('a loading script is never run')\n"
SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
FULL = "togethercomputer/RedPajama-Data-1T"
INSTRUCTIONS = "yizhongw/self_instruct"
CRAWL = "en_head_0000.json.gz.dedup.classifier.jsonl.zst"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve the two default data sets and the full RedPajama with their loading scripts; the cache here is empty."""
    with HubServer() as server:
        slices = {
            "arxiv": lines({"text": "arxiv one", "meta": {"year": 2023, "authors": ["x"]}}),
            "book": lines({"text": "book one", "meta": {"title": "t"}}, {"text": "book two", "meta": {}}),
            "cc_2019-30": lines({"text": "crawl one", "meta": "{'wiki_prob': 1}", "pred_label": "x"}),
            "wikipedia": lines({"text": "wiki one"}),
        }
        files = {f"{name}_sample.jsonl": content for name, content in slices.items()}
        description = {"README.md": b"---\n---\n", ".gitattributes": b"", "dataset_infos.json": b"{}"}
        server.repositories[SAMPLE] = Branches(
            {"main": {**description, "RedPajama-Data-1T-Sample.py": SCRIPT, **files}}
        )
        base = f"{server.url}/files/redpajama-data-1T/v1.0.0"
        server.files = {
            "redpajama-data-1T/v1.0.0/arxiv/arxiv_0.jsonl": lines({"text": "paper one"}),
            "redpajama-data-1T/v1.0.0/arxiv/arxiv_1.jsonl": lines({"text": "paper two"}),
            f"redpajama-data-1T/v1.0.0/common_crawl/2019-30/{CRAWL}": zstd(lines({"text": "crawl one"})),
            f"redpajama-data-1T/v1.0.0/common_crawl/2020-05/{CRAWL}": zstd(lines({"text": "crawl two"})),
        }
        urls = {"arxiv": [], "common_crawl": [], "book": [f"{base}/book/book.jsonl"]}
        for path in server.files:
            urls[path.split("/")[2]].append(f"{server.url}/files/{path}")
        lists = {f"urls/{name}.txt": "\n".join(found).encode() for name, found in urls.items()}
        server.repositories[FULL] = Branches({"main": {**description, "RedPajama-Data-1T.py": SCRIPT, **lists}})
        rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "id": i} for i in range(3)]
        converted = {
            f"{name}/{split}/0000.parquet": parquet(rows if split == "train" else rows[:1])
            for name in ("super_natural_instructions", "self_instruct")
            for split in ("train", "test")
        }
        server.repositories[INSTRUCTIONS] = Branches(
            {"main": {**description, "self_instruct.py": SCRIPT}, "refs/convert/parquet": converted}
        )
        connect(monkeypatch, server, tmp_path / "hf")
        yield server


def texts_of(source):
    return [(document.slice, document.text) for document in documents_in(source)]


class TestNames:
    def test_redpajama_sample(self, hub):
        source = resolve_source(SAMPLE)
        assert source.commit == hub.repositories[SAMPLE].commit("main")
        assert texts_of(source) == [
            ("arxiv", "arxiv one"),
            ("book", "book one"),
            ("book", "book two"),
            ("common_crawl", "crawl one"),
            ("wikipedia", "wiki one"),
        ]
        assert "4 files" in source.remark
        chosen = resolve_source(SAMPLE, slices=["wikipedia", "cc_2019-30"])
        assert [text for _, text in texts_of(chosen)] == ["crawl one", "wiki one"]
        message = error_of(resolve_source, SAMPLE, slices=["wiki"])
        assert message.startswith("--dataset_slices: ")
        assert "arxiv, book, common_crawl, wikipedia" in message

    def test_redpajama_by_its_lists_of_urls(self, hub):
        source = resolve_source(FULL, slices=["arxiv", "common_crawl"])
        assert texts_of(source) == [
            ("arxiv", "paper one"),
            ("arxiv", "paper two"),
            ("common_crawl", "crawl one"),
            ("common_crawl", "crawl two"),
        ]
        assert len({file.fetch() for file in source.files}) == 4
        message = error_of(resolve_source, FULL)
        assert "book/book.jsonl is not available (404" in message
        assert "--dataset_slices" in message
        asked = len(hub.requests)
        assert resolve_source(FULL, slices=["arxiv", "common_crawl"]) == source
        assert len(hub.requests) == asked + 1  # the same commit: no file is asked for again

    def test_instructions_by_the_converted_branch(self, hub):
        source = resolve_source(INSTRUCTIONS, configuration="super_natural_instructions")
        (file,) = source.files
        rows = [row.columns for row in read_rows(file.fetch(), ["prompt", "completion"])]
        assert [row["completion"] for row in rows] == ["answer 0", "answer 1", "answer 2"]
        assert [row.columns["id"] for row in read_rows(file.fetch(), (), start_row=1)] == [1, 2]
        (held_out,) = resolve_source(INSTRUCTIONS, configuration="super_natural_instructions", split="test").files
        assert len(list(read_rows(held_out.fetch(), ()))) == 1
        assert "choose of self_instruct, super_natural_instructions" in error_of(
            resolve_source, INSTRUCTIONS, configuration="none"
        )
        assert "has no column 'text', only: prompt, completion, id" in error_of(
            lambda: texts_of(resolve_source(INSTRUCTIONS, slices=["self_instruct"]))
        )

    def test_any_other_data_set(self, hub):
        hub.repositories["some/one"] = Branches(
            {
                "main": {
                    "data/train-00000-of-00001.parquet": parquet([{"text": "train"}]),
                    "data/test-00000-of-00001.parquet": parquet([{"text": "test"}]),
                    "logo.png": b"x",
                },
                "v1": {"more.jsonl.gz": gzip.compress(lines({"text": "older"}))},
            }
        )
        source = resolve_source("some/one")
        assert texts_of(source) == [("data", "train")]
        assert "1 of other splits (data/test-00000-of-00001.parquet), 1 .png" in source.remark
        assert texts_of(resolve_source("some/one", revision="v1")) == [("more", "older")]

    def test_names_that_cannot_be_read(self, hub):
        hub.repositories["gated/one"] = Branches({"main": {"x.jsonl": lines({"text": "x"})}}, gated=True)
        hub.repositories["script/one"] = Branches({"main": {"one.py": SCRIPT, "images.tar": b"x"}})
        cases = {
            "no/where": "the hub has no such data set that you may read; check the name, or set HF_TOKEN",
            "gated/one": "is gated; accept its terms on its page of the hub, then log in with `hf auth login`",
            "script/one": "only images.tar, one.py (its loading script is not run); unpack images.tar first (tar -xf",
            "a/b/c": "does not exist; give a file, a folder or a hub name",
            "./here": "does not exist; give a file, a folder or a hub name",
        }
        for name, expected in cases.items():
            message = error_of(resolve_source, name)
            assert message.startswith(f"--dataset: {name}")
            assert expected in message
        message = error_of(resolve_source, SAMPLE, revision="v9")
        assert message == f"--dataset_revision: {SAMPLE} has no branch, tag or commit 'v9' on the hub"


class TestDownloads:
    def test_resumed_where_it_broke_off(self, hub, tokenizer, tmp_path, monkeypatch):
        """A file of the hub and one behind a URL."""
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes written at a time; the default is 10 MB
        text = "word " * 5000
        hub.repositories["some/one"] = Branches({"main": {"big.jsonl": lines({"text": text})}})
        hub.files["redpajama-data-1T/v1.0.0/arxiv/arxiv_0.jsonl"] = lines({"text": text})
        hub.break_off = {"big.jsonl": 9500, "/files/redpajama-data-1T/v1.0.0/arxiv/arxiv_0.jsonl": 7500}
        folder = prepare_dataset("some/one", tokenizer, tmp_path / "cache")
        assert stream_of(folder).tolist() == reference_stream(tokenizer, [text])
        assert hub.downloads("big.jsonl") == [None, "bytes=9000-"]
        folder = prepare_dataset(FULL, tokenizer, tmp_path / "cache", 2, slices=["arxiv"])
        assert stream_of(folder).tolist() == reference_stream(tokenizer, [text, "paper two"])
        assert hub.downloads("arxiv_0.jsonl") == [None, "bytes=7000-"]

    def test_resumed_after_a_kill(self, hub):
        (file, _) = resolve_source(FULL, slices=["arxiv"]).files
        fetched = file.fetch()
        key = fetched.name.partition(".")[0]
        fetched.with_name(f"arxiv_0.jsonl.{key}.part").write_bytes(fetched.read_bytes()[:7])
        fetched.unlink()
        assert [document.text for document in read_documents(file.fetch(), file.slice)] == ["paper one"]
        assert hub.downloads("arxiv_0.jsonl") == [None, "bytes=7-"]

    def test_a_part_that_is_too_long(self, hub):
        (file, _) = resolve_source(FULL, slices=["arxiv"]).files
        fetched = file.fetch()
        fetched.rename(fetched.with_name(f"arxiv_0.jsonl.{fetched.name.partition('.')[0]}.part")).open("a").write(
            "more"
        )
        assert error_of(file.fetch).endswith(f"has {file.size + 4} bytes instead of {file.size}; start again")
        assert file.fetch().stat().st_size == file.size

    def test_full_disk(self, hub, monkeypatch, tmp_path):
        def no_room(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        (file, _) = resolve_source(FULL, slices=["arxiv"]).files
        monkeypatch.setattr(downloads, "http_get", no_room)
        assert error_of(file.fetch) == (
            f"HF_HOME: cannot write downloads to {tmp_path}/hf (No space left on device); make room there and start "
            "again to go on, or set HF_HOME to a folder with more"
        )

    @pytest.mark.parametrize("home", ["/proc/hf", "/dev/null"])
    def test_home_that_cannot_be_written(self, hub, monkeypatch, tokenizer, tmp_path, home):
        """The error names it, not the output folder."""
        connect(monkeypatch, hub, Path(home))
        message = error_of(prepare_dataset, SAMPLE, tokenizer, tmp_path)
        assert message.startswith(f"HF_HOME: cannot write downloads to {home}")
        assert message.endswith("; set HF_HOME to a folder that can be written to, with enough room")

    def test_the_token_goes_to_the_hub_alone(self, hub, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        for name, slices in ((SAMPLE, ()), (FULL, ["arxiv"])):
            texts_of(resolve_source(name, slices=slices))
        tokens = {(path.startswith("/files/"), token) for path, token in hub.tokens}
        assert tokens == {(True, None), (False, "Bearer hf_secret")}
        assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    def test_files_of_unknown_size(self, hub, tokenizer, tmp_path, capsys):
        """All files of a slice; a download that was killed is not resumed, since it may have been whole."""
        hub.without_length = {f"/files/{path}" for path in hub.files if "arxiv" in path}
        source = resolve_source(FULL, slices=["arxiv"])
        assert source.remark.endswith("2 files behind URLs, 0.00 GB and 2 of unknown size")
        assert [len(unit) for unit in make_units(source)] == [1, 1]
        fetched = source.files[0].fetch()
        fetched.rename(fetched.with_name(f"arxiv_0.jsonl.{hashlib.sha256(b'').hexdigest()[:12]}.part"))
        folder = prepare_dataset(FULL, tokenizer, tmp_path / "cache", 2, slices=["arxiv"])
        assert stream_of(folder).tolist() == reference_stream(tokenizer, ["paper one", "paper two"])
        assert hub.downloads("arxiv_0.jsonl") == [None, None]
        message = error_of(StreamedDataset, source, TextEncoder(tokenizer), 16, seed=0, buffer=8)
        assert message.startswith("--streaming: the size of arxiv/arxiv_0.jsonl is not known")

    def test_new_content_of_the_same_size(self, hub, tmp_path, capsys):
        """A run that began with the old content keeps it, and never gets the new one in its place."""
        path, listings = "redpajama-data-1T/v1.0.0/arxiv/arxiv_0.jsonl", tmp_path / "hf" / "downloads" / "listings"
        first = resolve_source(FULL, slices=["arxiv"])
        unversioned = first.files[0].fetch().with_name("arxiv_0.jsonl")  # the place in earlier versions of the program
        hub.files[path] = lines({"text": "paper six"})
        listings.rename(tmp_path / "forgotten")
        unversioned.write_bytes(lines({"text": "paper old"}))
        second = resolve_source(FULL, slices=["arxiv"])
        assert second.files[0].size == first.files[0].size
        assert texts_of(second)[0] == ("arxiv", "paper six")
        assert texts_of(first)[0] == ("arxiv", "paper one")
        assert not unversioned.exists()
        assert len(hub.downloads("arxiv_0.jsonl")) == 2
        first.files[0].fetch().unlink()
        url = first.files[0].origin
        for _ in range(2):
            message = error_of(first.files[0].fetch)
            assert message == f"--dataset: {url} has changed since it was listed; delete {listings} and start again"
        assert capsys.readouterr().out == ""

    def test_files_of_unknown_version(self, hub, capsys):
        hub.without_version = True
        assert texts_of(resolve_source(FULL, slices=["arxiv"]))[0] == ("arxiv", "paper one")
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("--dataset: the server tells neither ETag nor date of 2 files (http")
        assert "delete what changed in" in line

    def test_a_server_at_fault_is_asked_again(self, hub, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        path = "/files/redpajama-data-1T/v1.0.0/arxiv/arxiv_0.jsonl"
        hub.failures = {("HEAD", path): [503, 429], ("GET", path): [500, 502]}
        folder = prepare_dataset(FULL, tokenizer, tmp_path / "cache", slices=["arxiv"])
        assert stream_of(folder).tolist() == reference_stream(tokenizer, ["paper one", "paper two"])
        assert not any(hub.failures.values())
        source = resolve_source(FULL, slices=["common_crawl"])
        (tmp_path / "hf" / "downloads" / "listings").rename(tmp_path / "forgotten")
        path = "/" + source.files[0].origin.partition("://")[2].partition("/")[2]
        hub.failures = {("GET", path): [404]}
        message = error_of(source.files[0].fetch)
        assert message.startswith(f"--dataset: {source.files[0].origin} is not available (404")
        assert "--dataset_slices" in message
        hub.failures = {("GET", path): [503] * 99, ("HEAD", path): [503] * 99}
        assert "cannot be downloaded (503" in error_of(source.files[0].fetch)
        assert "is not available (503" in error_of(resolve_source, FULL, slices=["common_crawl"])

    def test_without_a_network_after_the_first_time(self, hub, tokenizer, tmp_path, monkeypatch):
        folder = prepare_dataset(SAMPLE, tokenizer, tmp_path / "cache")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["source"], manifest["commit"]) == (SAMPLE, hub.repositories[SAMPLE].commit("main"))
        asked = len(hub.requests)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()
        assert prepare_dataset(SAMPLE, tokenizer, tmp_path / "cache") == folder
        assert prepare_dataset(SAMPLE, tokenizer, tmp_path / "another") != folder  # from the downloads alone
        assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in error_of(resolve_source, FULL)
        assert len(hub.requests) == asked
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        reset_sessions()
        hub.repositories[SAMPLE].branches["main"]["arxiv_sample.jsonl"] = lines({"text": "changed"})
        assert prepare_dataset(SAMPLE, tokenizer, tmp_path / "cache") != folder

    def test_a_hub_that_hangs_up(self, hub, capsys):
        """The last listing is used, and what was downloaded."""
        source = resolve_source(SAMPLE)
        texts = texts_of(source)
        hub.hangs_up = True
        assert resolve_source(SAMPLE) == source
        assert texts_of(source) == texts
        said = f"the hub cannot be reached (ConnectionError); {SAMPLE} is read as it was listed the last time\n"
        assert capsys.readouterr().out == said

    def test_program(self, hub, tokenizer_folder, tmp_path):
        """scripts/prepare_dataset.py with its default data set, and its error as people see it."""
        program = [sys.executable, ROOT / "scripts" / "prepare_dataset.py", "--tokenizer", tokenizer_folder]
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        with Run([*program, "--output", tmp_path / "out"], tmp_path / "run", environment) as run:
            assert run.wait() == 0, run.output()
        assert "tokenized 5 documents" in run.stdout
        with Run([*program, "-d", "no/where", "--output", tmp_path / "x"], tmp_path / "bad", environment) as run:
            assert run.wait() == 2
        assert run.stderr.startswith("prepare_dataset.py: error: --dataset: no/where is no file")
        assert run.stderr.count("\n") == 1
