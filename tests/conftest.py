"""A small corpus, its tokenizer, and pretraining runs on them."""

import argparse
import functools
import gzip
import inspect
import itertools
import json
import os
import pickle
import pydoc
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed import TCPStore
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import benchmark
import pretrain as pretrain_program
from corpora import write_jsonl
from corpus.prepare import prepare_dataset
from corpus.tokenizer import load_tokenizer
from data_utils import PackedDataset
from instruction_rows import ROWS
from launching import ROOT, Run, free_port, start_pretrain
from runs import EPOCH, SECRET, SEQUENCE_LENGTH
from runtime import ranks
from runtime.console import InputError
from scripts.make_sample_data import train_tokenizer
from training import session

NOBODY = 65534  # user id

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the programs that the tests start would ignore it too


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU even if there is a GPU


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A folder with the corpus in `data`, and in `tokenizer` a tokenizer with the vocabulary of the model `test`."""
    folder = tmp_path_factory.mktemp("sample")
    program = [sys.executable, ROOT / "scripts" / "make_sample_data.py"]
    subprocess.run([*program, "--output_dir", folder, "--megabytes", "0.5", "--vocab_size", "1024"], check=True)
    return folder


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process cannot write to, next to a writable one, `open`; root becomes another user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for folder, mode in (("locked", 0o555), ("open", 0o777)):
            Path(name, folder).mkdir()
            Path(name, folder).chmod(mode)
        root = os.getuid() == 0
        if root:
            os.setresuid(NOBODY, 0, 0)  # os.access checks the real user
        try:
            yield Path(name, "locked")
        finally:
            if root:
                os.setresuid(0, 0, 0)


@pytest.fixture
def become_rank_0(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Function that makes this process rank 0 of `size`, with a store as from torchrun; the other ranks never start."""
    stores = []

    def become_rank_0(size: int) -> None:
        port = free_port()
        stores.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))
        numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in {**numbers, **place}.items():
            monkeypatch.setenv(name, value)

    yield become_rank_0
    if ranks.meeting.cache_info().currsize:
        ranks.meeting().over.set()
    ranks.meeting.cache_clear()


@pytest.fixture
def objections(monkeypatch, tmp_path, become_rank_0) -> Callable[..., list[str]]:
    """Function that returns the problems that a program's main() finds before the launch, for flags and ranks."""

    def objections(program: ModuleType, flags: list, ranks: int = 1) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        for owner in (benchmark, session):
            monkeypatch.setattr(owner, "launch", lambda *_: pytest.fail("no problem was found"))
        if ranks > 1:
            become_rank_0(ranks)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as raised:
            program.main()
        assert sorted(tmp_path.rglob("*")) == before
        assert all("\n" not in problem for problem in raised.value.problems)
        return list(raised.value.problems)

    return objections


@pytest.fixture
def problems(objections, tmp_path, sample_flags, sample_dataset) -> Callable[..., list[str]]:
    """Function that returns the problems that pretrain.py finds before the launch."""

    def problems(*args, ranks: int = 1) -> list[str]:
        folders = ["-o", tmp_path / "checkpoint", "-t", tmp_path / "tb_logs"]
        return objections(pretrain_program, [*sample_flags, "-p", "zero2", *folders, *args], ranks)

    return problems


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sample_tokenizer(sample) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(sample / "tokenizer"))


@pytest.fixture(scope="session")
def sample_dataset(sample, sample_tokenizer, cache_dir) -> PackedDataset:
    return PackedDataset(prepare_dataset(str(sample / "data"), sample_tokenizer, cache_dir), SEQUENCE_LENGTH)


@pytest.fixture(scope="session")
def few_data(sample, sample_tokenizer, tmp_path_factory) -> Path:
    """A file with one document of EPOCH sequences of SEQUENCE_LENGTH tokens, so that a short run has epochs."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    rows = [json.loads(row)["text"] for row in (sample / "data" / "github_sample.jsonl").open(encoding="utf-8")]
    ids = sample_tokenizer("\n".join(rows), add_special_tokens=False)["input_ids"]
    text = sample_tokenizer.decode(ids[: EPOCH * SEQUENCE_LENGTH + SEQUENCE_LENGTH // 2])
    path.write_text(json.dumps({"text": text}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sample_flags(sample, cache_dir) -> list:
    """Flags of a small, quick run."""
    data = ["-d", sample / "data", "--tokenizer", sample / "tokenizer", "--cache_dir", cache_dir]
    return ["-c", "test", *data, "-l", SEQUENCE_LENGTH, "-s", "4"]


@pytest.fixture(scope="session")
def start(tmp_path_factory, sample_flags, sample_dataset) -> Callable[..., Run]:
    """Function that starts a small run in its own folder, or in `folder`; `with start(...) as run:` ends it."""
    numbers = itertools.count()
    root = tmp_path_factory.mktemp("runs")

    def start(*args, folder: Path | None = None, **kwargs) -> Run:
        return start_pretrain(*sample_flags, *args, folder=folder or root / str(next(numbers)), **kwargs)

    return start


@pytest.fixture(scope="session")
def pretrain(start) -> Callable[..., Run]:
    """Function that runs to the end, and fails if the run does, unless `check=False`, which ranks do under torchrun."""

    def pretrain(*args, check: bool = True, **kwargs) -> Run:
        with start(*args, torchrun=not check, **kwargs) as run:
            run.wait()
            assert run.returncode == 0 or not check, run.output()
            return run

    return pretrain


@pytest.fixture(scope="session")
def finished_run(pretrain, few_data) -> Run:
    """Three steps of zero2 in bf16, one epoch of `few_data`, with checkpoints after step 2 and at the end."""
    secrets = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}
    return pretrain("-d", few_data, "-p", "zero2", "-x", "bf16", "-b", 8, "-s", 1, "-i", 2, env=secrets)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with only `tokenizer.model`: a tokenizer like LLaMA's, trained on the standard library's docs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    modules = (argparse, inspect, itertools, functools, json, gzip, pickle, pydoc, subprocess, textwrap)
    corpus = "\n".join(pydoc.plain(pydoc.render_doc(module)) for module in modules)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(corpus.splitlines(), vocab_size=600))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """A tokenizer like Llama 3's: no space before a text, and tokens of two line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in ROWS for text in row.values()] + ["Answer:green", "\n\n", "\n\n1 2 3", "0|"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A file of 48 JSONL rows, and a cache for the session: (source, cache_dir)."""
    folder = tmp_path_factory.mktemp("words")
    write_jsonl(folder / "words.jsonl", [{"text": f"row {i} " * (i % 7 + 1)} for i in range(48)])
    return folder / "words.jsonl", folder / "cache"
