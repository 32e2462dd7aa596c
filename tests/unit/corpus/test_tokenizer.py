"""Tokenizers from folders and the hub, and the ids of documents."""

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
from corpora import TEXTS, error_of, run_python
from corpus.encoder import TextEncoder
from corpus.tokenizer import load_tokenizer
from hub_server import Branches, HubServer


class TestTokenizer:
    def test_loads_a_folder_with_only_tokenizer_model_and_says_nothing(self, tokenizer_folder):
        assert [path.name for path in tokenizer_folder.iterdir()] == ["tokenizer.model"]
        code = "import sys; from corpus import tokenizer; print(len(tokenizer.load_tokenizer(sys.argv[1])))"
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
        code = "from corpus import tokenizer; print(len(tokenizer.load_tokenizer('some/one')))"
        with HubServer() as hub:
            hub.repositories["some/one"] = Branches(
                {"main": {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}}
            )
            places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
            stdout, stderr = run_python(code, **places, HF_HUB_OFFLINE="0").communicate(timeout=240)
        assert stdout == f"{len(loaded)}\n", stderr

    @pytest.mark.parametrize(("hangs_up", "reason"), [(False, "refuses it (HTTP 401)"), (True, "cannot be reached")])
    def test_missing_hub_name_is_asked_for_once_and_refused_in_one_line(self, hangs_up, reason):
        code = "from corpus import tokenizer; tokenizer.load_tokenizer('nobody/nothing')"
        with HubServer(hangs_up=hangs_up) as hub:
            _, stderr = run_python(code, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0").communicate(timeout=240)
        assert [request[:2] for request in hub.requests] == [("GET", "/api/models/nobody/nothing")]
        last_line = stderr.splitlines()[-1]
        assert last_line.startswith("runtime.console.InputError: --tokenizer: nobody/nothing")
        assert reason in last_line
        assert "Retrying" not in stderr

    @pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
    def test_missing_path(self, name):
        assert error_of(load_tokenizer, name).startswith("--tokenizer: ")

    def test_folder_without_or_with_damaged_files(self, tmp_path):
        assert "holds neither" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "is a Git LFS pointer" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("damaged")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))
        assert "is a file" in error_of(load_tokenizer, str(tmp_path / "tokenizer.model"))
        (tmp_path / "tokenizer.json").write_text("{}")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))

    def test_the_class_is_not_told(self, tokenizer, tmp_path):
        LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent).save_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        assert "tokenizer_config.json names no tokenizer_class; set it" in error_of(load_tokenizer, str(tmp_path))

    def test_without_bos_token(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings_of_file = json.loads((tmp_path / name).read_text())
            settings_of_file["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_of_file.pop("bos_token")
            (tmp_path / name).write_text(json.dumps(settings_of_file))
        assert "has no bos_token" in error_of(load_tokenizer, str(tmp_path))


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
    """Trains a vocabulary by its name above."""
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
        """Cut in a vocabulary where it is so, else left whole; blocks are crossed, and parts too long for them met."""
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
        """Of one that puts no space before a text that begins with one, too."""
        monkeypatch.setattr(corpus.encoder, "FEW_CHARACTERS", 0)
        encoder = bare_encoder if bare else encoder
        assert encoder.bare_leading_space is bare
        assert encoder.can_cut
        bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
        options = {"add_special_tokens": False, "split_special_tokens": True}
        expected = [[bos, *encoder.tokenizer(text, **options)["input_ids"], eos] for text in documents]
        assert [ids.tolist() for ids in encoder.encode(documents)] == expected
