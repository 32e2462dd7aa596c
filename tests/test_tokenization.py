"""Tokenizers from folders and the hub, and the ids of documents."""

import json
from pathlib import Path

import pytest
from corpora import TEXTS, error_of, run_python
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizerFast

from tokenization import TextEncoder, load_tokenizer


class TestTokenizer:
    def test_loads_a_folder_with_only_tokenizer_model_and_says_nothing(self, tokenizer_folder):
        assert [path.name for path in tokenizer_folder.iterdir()] == ["tokenizer.model"]
        code = "import sys, tokenization; print(len(tokenization.load_tokenizer(sys.argv[1])))"
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

    @pytest.mark.parametrize(("hangs_up", "reason"), [(False, "refuses it (HTTP 401)"), (True, "cannot be reached")])
    def test_missing_hub_name_is_asked_for_once_and_refused_in_one_line(self, hangs_up, reason):
        code = "import tokenization; tokenization.load_tokenizer('nobody/nothing')"
        with HubServer(hangs_up=hangs_up) as hub:
            _, stderr = run_python(code, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0").communicate(timeout=240)
        assert [request[:2] for request in hub.requests] == [("GET", "/api/models/nobody/nothing")]
        last_line = stderr.splitlines()[-1]
        assert last_line.startswith("console.InputError: --tokenizer: nobody/nothing")
        assert reason in last_line
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
