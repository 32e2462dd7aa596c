"""Fixtures that several tests of preparations share."""

import inspect
import pydoc

import pytest

from corpora import write_jsonl
from corpus import units
from corpus.encoder import TextEncoder
from corpus.prepare import prepare_folder
from corpus.sources import resolve_source


@pytest.fixture
def prepared(tokenizer, tmp_path, monkeypatch):
    """A folder prepared in several units, and a function that prepares missing parts of it again."""
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1000)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i} " * 9} for i in range(60)])
    encoder = TextEncoder(tokenizer)

    def prepare(**options):
        return prepare_folder(resolve_source(str(path)), encoder, tmp_path / "out", 1, **options)

    assert prepare()
    return tmp_path / "out", prepare


@pytest.fixture
def slow_source(tmp_path):
    """A file that takes a few seconds to tokenize."""
    return write_jsonl(tmp_path / "slow.jsonl", [{"text": inspect.getsource(pydoc)[i * 10 :]} for i in range(160)])
