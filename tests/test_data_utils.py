"""Tokenizing, packing and ordering, on real files and against slow, obvious references."""

import functools
import itertools
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import TEXTS, error_of, reference_stream, run_python, stream_of, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaTokenizerFast

import dataset_shards
from data_utils import IGNORE_INDEX, PackedDataset, TextEncoder, load_tokenizer, mark_documents
from dataset_preparation import prepare_dataset
from train_utils import next_batches


class TestTokenizer:
    def test_loads_a_folder_with_only_tokenizer_model_and_says_nothing(self, tokenizer_folder):
        assert [path.name for path in tokenizer_folder.iterdir()] == ["tokenizer.model"]
        code = "import sys, data_utils; print(len(data_utils.load_tokenizer(sys.argv[1])))"
        assert run_python(code, tokenizer_folder).communicate(timeout=60) == ("600\n", "")

    def test_loads_a_saved_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert TextEncoder(load_tokenizer(str(tmp_path))).fingerprint == TextEncoder(tokenizer).fingerprint

    def test_loads_what_transformers_5_saves(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        (tmp_path / "special_tokens_map.json").unlink()
        saved = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**saved, "extra_special_tokens": ["<unk>"]}))
        loaded = load_tokenizer(str(tmp_path))
        texts = ["def f(x):\n    return  it's", "  café </s> 日本"]
        assert TextEncoder(loaded).tokenize(texts) == TextEncoder(fast).tokenize(texts)
        assert loaded.additional_special_tokens == ["<unk>"]

    def test_missing_hub_name_fails_fast_with_one_line(self):
        code = "import sys, data_utils; data_utils.load_tokenizer('nobody/nothing')"
        started = time.monotonic()
        process = run_python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < 20
        assert "console.InputError: --tokenizer: nobody/nothing" in stderr.splitlines()[-1]
        assert "Retrying" not in stderr

    @pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
    def test_missing_path(self, name):
        assert error_of(load_tokenizer, name).startswith("--tokenizer: ")

    def test_folder_without_or_with_damaged_files(self, tmp_path):
        assert "holds neither" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))
        assert "is a file" in error_of(load_tokenizer, str(tmp_path / "tokenizer.model"))
        (tmp_path / "tokenizer.json").write_text("{}")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))

    def test_without_bos_token(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings_of_file = json.loads((tmp_path / name).read_text())
            settings_of_file["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_of_file.pop("bos_token")
            (tmp_path / name).write_text(json.dumps(settings_of_file))
        assert "has no bos_token" in error_of(load_tokenizer, str(tmp_path))


class TestTextEncoder:
    def test_documents_are_framed_and_decode_to_themselves(self, tokenizer):
        encoder = TextEncoder(tokenizer)
        texts = [text for text in TEXTS if text]
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert encoder.sentencepiece.decode(ids[1:-1].tolist()) == text

    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
    def test_any_text_comes_back(self, tokenizer, text):
        if "▁" not in text:  # SentencePiece's own sign for a space
            encoder = TextEncoder(tokenizer)
            assert encoder.sentencepiece.decode(encoder.encode([text])[0][1:-1].tolist()) == text

    @pytest.mark.parametrize("fast", [False, True])
    def test_special_tokens_in_a_text_stay_text(self, tokenizer, tmp_path, fast):
        if fast:  # without its tokenizer.model
            LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent).save_pretrained(tmp_path)
            (tmp_path / "tokenizer.model").unlink()
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        encoder = TextEncoder(tokenizer)
        assert bool(encoder.sentencepiece) is not fast
        for text in ("</s>", "one</s>two", "<s>[INST]</s>"):
            ids = encoder.encode([text])[0][1:-1]
            assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids.tolist())
            assert tokenizer.decode(ids).strip() == text
        assert encoder.encode([]) == []

    def test_fingerprint_depends_on_the_ids_alone(self, tokenizer, tokenizer_folder):
        fast = LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>")
        again = load_tokenizer(str(tokenizer_folder))
        again("some use", truncation=True, max_length=2)
        fingerprint = TextEncoder(tokenizer).fingerprint
        assert TextEncoder(again).fingerprint == fingerprint != TextEncoder(fast).fingerprint


class TestPacking:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        files=st.lists(
            st.lists(st.text(alphabet="aé \n</s>1😀", max_size=40), min_size=1, max_size=8), min_size=1, max_size=3
        ),
        max_length=st.integers(1, 40),
        unit_bytes=st.integers(1, 300),
        num_workers=st.sampled_from([1, 2]),
    )
    def test_equals_the_obvious_reference(
        self, tokenizer, tmp_path_factory, monkeypatch, files, max_length, unit_bytes, num_workers
    ):
        monkeypatch.setattr(dataset_shards, "MIN_UNIT_BYTES", unit_bytes)
        folder = tmp_path_factory.mktemp("packing")
        for number, texts in enumerate(files):
            write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in texts])
        expected = reference_stream(tokenizer, itertools.chain(*files))
        prepare = functools.partial(prepare_dataset, str(folder), tokenizer, folder / "cache", num_workers)
        if not expected:
            assert str(folder) in error_of(prepare)
            return
        prepared = prepare()
        assert stream_of(prepared).dtype == np.uint16
        assert stream_of(prepared).tolist() == expected
        if len(expected) < max_length:
            message = error_of(PackedDataset, prepared, max_length)
            assert "--max_length" in message
            assert f" {max_length} " in message
            assert f" {len(expected)} " in message
            return
        dataset = PackedDataset(prepared, max_length)
        items = [dataset[index] for index in range(len(dataset))]
        assert [item["input_ids"].tolist() for item in items] == [
            expected[start : start + max_length] for start in range(0, len(expected) - max_length + 1, max_length)
        ]
        assert all(torch.equal(item["input_ids"], item["labels"]) for item in items)
        assert items[0]["input_ids"].dtype == items[0]["labels"].dtype == torch.int64
        assert dataset.tail_tokens == len(expected) % max_length

    def test_works_in_loader_processes_and_when_pickled(self, tokenizer, words):
        dataset = PackedDataset(prepare_dataset(str(words[0]), tokenizer, words[1]), 16)
        direct = torch.stack([dataset[index]["input_ids"] for index in range(len(dataset))])
        loader = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=4, num_workers=2)
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), direct)
        with pytest.raises(IndexError):
            dataset[len(dataset)]

    def test_fingerprint_follows_the_tokens_not_the_place(self, tokenizer, tmp_path):
        for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
            (tmp_path / name).mkdir()
            write_jsonl(tmp_path / name / "x.jsonl", [{"text": text}])
        a, b, c = (
            PackedDataset(prepare_dataset(str(tmp_path / name), tokenizer, tmp_path / "cache"), 2).fingerprint
            for name in "abc"
        )
        assert a == b != c

    def test_damaged_folder(self, tokenizer, words, tmp_path):
        folder = prepare_dataset(str(words[0]), tokenizer, tmp_path)
        shard = folder / "tokens-00000.bin"
        os.truncate(shard, shard.stat().st_size - 2)
        assert f"--dataset: {shard} has {shard.stat().st_size} bytes" in error_of(PackedDataset, folder, 8)
        shard.unlink()
        assert str(shard) in error_of(PackedDataset, folder, 8)
        (folder / "manifest.json").write_text("{")
        assert str(folder / "manifest.json") in error_of(PackedDataset, folder, 8)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_folder_that_goes_away_ends_the_run_in_one_line(self, words, tokenizer, tmp_path, num_workers):
        prepared = Path(shutil.copytree(prepare_dataset(str(words[0]), tokenizer, words[1]), tmp_path / "prepared"))
        loader = DataLoader(PackedDataset(prepared, 16), batch_size=2, num_workers=num_workers)
        prepared.rename(tmp_path / "moved")
        _, gone = next_batches(iter(loader), 1)
        prepared.mkdir()
        (prepared / "tokens-00000.bin").write_bytes(b"\0\0")
        _, cut = next_batches(iter(loader), 1)
        for reason in (gone, cut):
            assert reason.startswith(f"--dataset: {prepared / 'tokens-00000.bin'} has gone or changed")
            assert "\n" not in reason

    def test_loader_process_ends_with_its_rank_whatever_it_is_doing(self):
        code = """
            import os, time
            from torch.utils.data import DataLoader
            import signals

            class Slow:
                def __len__(self): return 9
                def __getitem__(self, index): time.sleep(600)

            loader = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=signals.follow_rank))
            time.sleep(1)
            os._exit(1)
        """
        process = run_python(code)
        process.communicate(timeout=60)  # to the end of all that hold its output

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_token_beyond_the_vocabulary_ends_the_run_in_one_line(self, words, tokenizer, tmp_path, num_workers):
        """Of a shard too large to be checked when it is opened."""
        prepared = Path(shutil.copytree(prepare_dataset(str(words[0]), tokenizer, words[1]), tmp_path / "prepared"))
        dataset = PackedDataset(prepared, 16)
        shard = prepared / dataset.shards[0]["file"]
        with open(shard, "r+b") as file:
            file.write(b"\xff\xff")
        batches, reason = next_batches(iter(DataLoader(dataset, batch_size=2, num_workers=num_workers)), 1)
        assert batches == []
        assert reason.startswith(f"--dataset: {shard} is damaged: it holds the token 65535 of a vocabulary of")
        assert "\n" not in reason


class TestMarkDocuments:
    @settings(deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
    def test_positions_restart_and_first_tokens_are_not_predicted(self, lengths, cut, one_token_for_both):
        """Documents of BOS, `length` tokens and EOS; the sequence starts `cut` tokens into the first."""
        bos, eos = (1, 1) if one_token_for_both else (1, 2)
        cut = min(cut, lengths[0] + 1)
        stream = [[bos, *range(3, 3 + length), eos] for length in lengths]
        positions = [place for document in stream for place in range(len(document))][cut:]
        for place in range(len(stream[0]) - cut):
            positions[place] = place
        ids = torch.tensor(list(itertools.chain(*stream))[cut:])
        item = mark_documents({"input_ids": ids, "labels": ids.clone()}, bos, eos)
        assert item["position_ids"].tolist() == positions
        assert item["labels"].tolist() == [
            IGNORE_INDEX if place == 0 else token for place, token in zip(positions, ids.tolist(), strict=True)
        ]

    def test_a_bos_spelled_out_is_text(self, sample_tokenizer):
        text = "a <s> b</s><s> c"
        (ids,) = TextEncoder(sample_tokenizer).encode([text])
        assert (ids == sample_tokenizer.bos_token_id).sum() == 1
        assert sample_tokenizer.decode(ids[1:-1]) == text
