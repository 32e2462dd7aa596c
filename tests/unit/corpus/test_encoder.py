"""The ids of documents, against SentencePiece and the tokenizer itself."""

import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast

import corpus.encoder
from corpora import TEXTS
from corpus.encoder import TextEncoder
from corpus.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TextEncoder(tokenizer)


@pytest.fixture(scope="module")
def bare_encoder(sample_tokenizer):
    return TextEncoder(sample_tokenizer)


class TestTextEncoder:
    def test_documents_are_framed_and_decode_to_themselves(self, tokenizer, encoder):
        texts = [text for text in TEXTS if text]
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert encoder.sentencepiece.decode(ids[1:-1].tolist()) == text

    @settings(deadline=None)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
    def test_any_text_comes_back(self, encoder, text):
        if "▁" not in text:  # SentencePiece's own sign for a space
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


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
CUT = {
    "LLaMA's": {},
    "without a space before a text": {"add_dummy_prefix": False},
    "of tokens longer than a word": {"split_by_whitespace": False, "split_by_unicode_script": False},
    "with symbols of its own": {"user_defined_symbols": ["<tool>", "▁▁x", "é日", "ab▁", "0", "\t"]},
}
NOT_CUT = {
    "of unigrams": {"model_type": "unigram"},
    "without bytes": {"byte_fallback": False},
    "with spaces behind words": {"treat_whitespace_as_suffix": True},
    "of other forms of a character": {"normalization_rule_name": "nmt_nfkc"},
    "without double spaces": {"remove_extra_whitespaces": True},
    "with line ends in tokens": {"user_defined_symbols": ["\n\n", "}\n"]},
}
FRAGMENTS = [" ", "  ", "\t", "\n", "\n\n", "\r\n", "\0", "▁", "▁▁", "\xa0", "\u2003", "\u200b", "\ufeff", "\U0010ffff"]
FRAGMENTS += ["é日本", "日", "😀", "</s>", "<s>", "<unk>", "<0x0A>", "<tool>", "ab ", "0", "}\n", "self", "return None"]
FRAGMENTS += ["a" * 99, "-" * 70, " " * 40, "日" * 50]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)).map(
    "".join
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A function that trains a vocabulary of CUT or NOT_CUT and returns its file."""
    lines = (inspect.getsource(json.decoder) + inspect.getsource(corpus.encoder)).splitlines()
    paths = {}

    def train(name):
        if name not in paths:
            model = io.BytesIO()
            options = {**LLAMA, **{**CUT, **NOT_CUT}[name], "vocab_size": 600, "hard_vocab_limit": False}
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **options
            )
            paths[name] = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
            paths[name].write_bytes(model.getvalue())
        return str(paths[name])

    return train


class TestParts:
    @pytest.mark.parametrize("name", [*CUT, *NOT_CUT])
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        documents=st.lists(texts, max_size=5),
        sizes=st.sampled_from([(7, 8), (150, 90), (2**22, 2**16)]),
        threads=st.integers(1, 3),
        dtype=st.sampled_from(["<u2", "<u4"]),
    )
    def test_ids_are_those_of_whole_texts(self, vocabulary, monkeypatch, name, documents, sizes, threads, dtype):
        """Texts are cut with the vocabularies CUT only. They cross blocks, and some parts are too long for a block."""
        for constant, size in zip(("BLOCK_BYTES", "PIECE_CHARACTERS"), sizes, strict=True):
            monkeypatch.setattr(corpus.encoder, constant, size)
        monkeypatch.setattr(corpus.encoder, "FEW_CHARACTERS", 0)
        encoder = TextEncoder(LlamaTokenizer(vocabulary(name), legacy=True))
        encoder.dtype = np.dtype(dtype)
        assert encoder.can_cut is (name in CUT)
        model = sentencepiece.SentencePieceProcessor(model_file=vocabulary(name))
        expected = [[1, *model.encode(text), 2] for text in documents]
        encoded = encoder.encode(documents, threads)
        assert [ids.tolist() for ids in encoded] == expected
        assert {ids.dtype for ids in encoded} <= {encoder.dtype}

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(texts, max_size=5), st.booleans())
    def test_ids_are_those_of_the_tokenizer(self, encoder, bare_encoder, monkeypatch, documents, bare):
        """Also those of a tokenizer that puts no space before a text that begins with one."""
        monkeypatch.setattr(corpus.encoder, "FEW_CHARACTERS", 0)
        encoder = bare_encoder if bare else encoder
        assert encoder.bare_leading_space is bare
        assert encoder.can_cut
        bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
        options = {"add_special_tokens": False, "split_special_tokens": True}
        expected = [[bos, *encoder.tokenizer(text, **options)["input_ids"], eos] for text in documents]
        assert [ids.tolist() for ids in encoder.encode(documents)] == expected
