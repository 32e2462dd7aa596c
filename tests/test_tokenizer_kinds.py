"""Tokenizers of every kind, made at random: the ids of texts are those of AutoTokenizer itself."""

import functools
import inspect
import io
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from corpora import error_of
from hypothesis import Phase, event, given, note, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import tokenization
from tokenization import TextEncoder, check_vocabulary, load_tokenizer

CASES = 150
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>"]
ADDED = ["zebrafish", "<think>", " fish", "fish ", "self", "é日", "▁x", "\n\n", "0", "s>", "   "]
FRAGMENTS = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\0",
    "▁",
    "▁▁",
    "\xa0",
    "\u200b",
    "\ufeff",
    "\U0010ffff",
    "ﬁ",
    "é",
]
FRAGMENTS += [
    "é日本",
    "😀",
    "<0x0A>",
    "ab ",
    "}\n",
    "self",
    "return None",
    "the zebrafish swims",
    "aaaa",
    "-" * 9,
    "1234",
]
PROBES = ["It's the  zebrafish self.", " two <s> spaces</s>", "\n\nab 0 é日本", "▁x   fish <think>"]

fragments = st.sampled_from(FRAGMENTS + ADDED + SPECIAL) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
texts = st.lists(fragments, max_size=9).map("".join)


@functools.cache
def lines() -> list[str]:
    return [line for module in (json.decoder, random, shutil) for line in inspect.getsource(module).splitlines()]


@functools.cache
def sentencepiece_model(options: str) -> bytes:
    """Trains a model of a few hundred pieces."""
    model = io.BytesIO()
    rules = {"hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **json.loads(options)}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines()), model_writer=model, **rules)
    return model.getvalue()


@functools.cache
def byte_level(size: int, ignore_merges: bool) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL[:2], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return tokenizer.to_str()


sentencepiece_options = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["bpe", "bpe", "unigram"]),
        "vocab_size": st.sampled_from([400, 600]),
        "byte_fallback": st.sampled_from([True, True, False]),
        "normalization_rule_name": st.sampled_from(["identity", "identity", "nmt_nfkc"]),
        "remove_extra_whitespaces": st.sampled_from([False, False, True]),
        "allow_whitespace_only_pieces": st.booleans(),
    },
    optional={
        "add_dummy_prefix": st.just(False),
        "treat_whitespace_as_suffix": st.just(True),
        "user_defined_symbols": st.just(["<tool>", "▁▁x", "é日", "self"]),
        "control_symbols": st.just(["<|im_start|>"]),
    },
).map(lambda options: json.dumps(options, sort_keys=True))

added_tokens = st.lists(
    st.builds(
        AddedToken,
        st.sampled_from(ADDED),
        special=st.booleans(),
        normalized=st.booleans(),
        lstrip=st.booleans(),
        rstrip=st.booleans(),
        single_word=st.booleans(),
    ),
    max_size=2,
)
maybe = st.sampled_from([None, False, True])


@st.composite
def llama_folders(draw, folder: Path) -> PreTrainedTokenizerBase | None:
    """Writes a folder of LLaMA's kind. Returns the tokenizer it stands for, where AutoTokenizer cannot tell."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(draw(sentencepiece_options)))
    if draw(st.booleans()):
        return LlamaTokenizerFast.from_pretrained(folder)
    if draw(st.booleans()):
        LlamaConfig().save_pretrained(folder)
        return None
    choices = {"legacy": draw(maybe), "add_prefix_space": draw(maybe)}
    choices = {name: value for name, value in choices.items() if value is not None}
    added = draw(added_tokens)
    tokenizer = draw(st.sampled_from([LlamaTokenizer, LlamaTokenizerFast])).from_pretrained(folder, **choices)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    kind = draw(st.sampled_from(["whole", "stale", "without the model"]))
    if kind == "stale":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(draw(sentencepiece_options)))
    elif kind == "without the model" and (folder / "tokenizer.json").is_file():
        (folder / "tokenizer.model").unlink()
        content = json.loads((folder / "tokenizer_config.json").read_text())
        content.pop("add_prefix_space", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    note(f"{type(tokenizer).__name__} {kind} {choices} {added} {sorted(path.name for path in folder.iterdir())}")
    return None


@st.composite
def other_folders(draw, folder: Path) -> None:
    """Writes a folder with a tokenizer.json that no SentencePiece model is beside, with holes in its ids."""
    tables = json.loads(byte_level(draw(st.sampled_from([300, 500])), draw(st.booleans())))
    hole = draw(st.sampled_from([0, 7, 2**16]))
    vocabulary = tables["model"]["vocab"]
    last = len(vocabulary) - 1
    tables["model"]["vocab"] = {word: id_ + hole * (id_ == last) for word, id_ in vocabulary.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tables)), bos_token="<s>", eos_token="</s>"
    )
    if draw(st.booleans()):
        tokenizer.backend_tokenizer.normalizer = draw(st.sampled_from([normalizers.NFC(), normalizers.Lowercase()]))
    tokenizer.add_tokens(draw(added_tokens))
    tokenizer.save_pretrained(folder)


def truth(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def compare(encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> None:
    """The ids are the tokenizer's; of a special token spelled out, which a unigram model takes for a word, they have none."""
    unigram = isinstance(tokenizer.backend_tokenizer.model, models.Unigram)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    ids = encoder.tokenize(documents)
    framed = [document.tolist() for document in encoder.encode(documents)]
    assert framed == [[tokenizer.bos_token_id, *some, tokenizer.eos_token_id] for some in ids]
    for document, some in zip(documents, ids, strict=True):
        expected = truth(tokenizer, document)
        assert not special & set(some), document
        if not (unigram and any(token in document for token in SPECIAL)):
            assert some == expected, document


class TestKinds:
    found: dict[str, Any] = {}

    def check(self, folder: Path, tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> None:
        loaded = load_tokenizer(str(folder))
        encoder = TextEncoder(loaded)
        event(f"SentencePiece {bool(encoder.sentencepiece)}")
        many = "".join(documents) * 50
        documents = [*documents, *PROBES, many[: 2**12]]
        compare(encoder, tokenizer, documents)
        assert encoder.vocab_size == max(tokenizer.get_vocab().values()) + 1
        saved = folder / "final"
        loaded.save_pretrained(saved)
        compare(encoder, AutoTokenizer.from_pretrained(saved), documents)
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, *encoder.tokenize(PROBES)]
        ids.append(tokenizer(PROBES)["input_ids"] if tokenizer.get_added_vocab().keys() - {*SPECIAL} else None)
        assert self.found.setdefault(encoder.fingerprint, ids) == ids

    @settings(max_examples=CASES, deadline=None, phases=[Phase.generate])
    @given(st.data())
    def test_of_llama(self, data):
        with tempfile.TemporaryDirectory() as name:
            tokenizer = data.draw(llama_folders(Path(name))) or AutoTokenizer.from_pretrained(name)
            self.check(Path(name), tokenizer, data.draw(st.lists(texts, max_size=4)))

    @settings(max_examples=CASES // 2, deadline=None, phases=[Phase.generate])
    @given(st.data())
    def test_of_others(self, data):
        with tempfile.TemporaryDirectory() as name:
            data.draw(other_folders(Path(name)))
            self.check(Path(name), AutoTokenizer.from_pretrained(name), data.draw(st.lists(texts, max_size=4)))
