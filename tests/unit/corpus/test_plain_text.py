"""Random tokenizers of every kind: the ids of texts are those of AutoTokenizer itself."""

import functools
import hashlib
import inspect
import io
import json
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import sentencepiece
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

from corpora import error_of
from corpus.chat_template import prompt_ids
from corpus.encoder import TextEncoder
from corpus.tokenizer import check_vocabulary, load_tokenizer
from runtime.console import InputError

CASES = 100
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

LLAMA = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False}

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
    """Writes a folder with a LLaMA tokenizer. Returns the expected one if AutoTokenizer cannot load the folder."""
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
    """Writes a folder with a tokenizer.json, without a SentencePiece model, some of whose ids are unused."""
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
    """The ids are the tokenizer's, and none of them is special, though a unigram model makes those from text."""
    unigram = isinstance(tokenizer.backend_tokenizer.model, models.Unigram)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    # A byte-level model makes tokens of one character from text, also those that are special.
    characters = {id_ for id_ in special if len(tokenizer.convert_ids_to_tokens(id_)) == 1}
    ids = encoder.tokenize(documents)
    framed = [document.tolist() for document in encoder.encode(documents)]
    assert framed == [[tokenizer.bos_token_id, *some, tokenizer.eos_token_id] for some in ids]
    for document, some in zip(documents, ids, strict=True):
        expected = truth(tokenizer, document)
        assert not (special - characters) & set(some), document
        if special.isdisjoint(expected) and not (unigram and "<unk>" in document):
            assert some == expected, document


class TestKinds:
    found: ClassVar[dict[str, list]] = {}  # ids by fingerprint

    def check(self, folder: Path, tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> None:
        loaded = load_tokenizer(str(folder))
        try:
            encoder = TextEncoder(loaded)
        except InputError as refusal:
            token = re.search("--tokenizer: '(.*)' is both a piece of its model and an added token", str(refusal))[1]
            copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            copied.encode_special_tokens = True
            assert (
                truth(tokenizer, f"{token} {token}") != copied.encode(f"{token} {token}", add_special_tokens=False).ids
            )
            return
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

    @settings(max_examples=CASES, deadline=None, phases=set(Phase) - {Phase.explain})
    @given(st.data())
    def test_of_llama(self, data):
        with tempfile.TemporaryDirectory() as name:
            tokenizer = data.draw(llama_folders(Path(name))) or AutoTokenizer.from_pretrained(name)
            self.check(Path(name), tokenizer, data.draw(st.lists(texts, max_size=4)))

    @settings(max_examples=CASES // 2, deadline=None, phases=set(Phase) - {Phase.explain})
    @given(st.data())
    def test_of_others(self, data):
        with tempfile.TemporaryDirectory() as name:
            data.draw(other_folders(Path(name)))
            self.check(Path(name), AutoTokenizer.from_pretrained(name), data.draw(st.lists(texts, max_size=4)))


@pytest.fixture
def write(tmp_path):
    """Writes a numbered folder with a LLaMA tokenizer of these SentencePiece options and settings."""

    def write(rules: dict | None = None, added: Sequence[AddedToken | str] = (), **settings_of_file) -> Path:
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        options = {**LLAMA, **(rules or {})}
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(json.dumps(options, sort_keys=True)))
        if added:
            tokenizer = LlamaTokenizerFast.from_pretrained(folder)
            tokenizer.add_tokens(list(added))
            tokenizer.save_pretrained(folder)
        if settings_of_file:
            path = folder / "tokenizer_config.json"
            content = json.loads(path.read_text()) if added else {"tokenizer_class": "LlamaTokenizer"}
            path.write_text(json.dumps({**content, **settings_of_file}))
        return folder

    return write


@pytest.mark.parametrize("normalized", [False, True])
def test_a_piece_added_again_with_other_settings_is_refused(write, normalized):
    """Copies of the tokenizer, such as the one that training saves, would make other ids."""
    folder = write({"user_defined_symbols": ["self"]})
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("self", normalized=normalized)])
    tokenizer.save_pretrained(folder)
    if normalized:
        with pytest.raises(InputError, match="--tokenizer: 'self' is both a piece of its model and an added token"):
            encoder_of(folder)
    else:
        assert encoder_of(folder).tokenize(["aself b"]) == [truth(AutoTokenizer.from_pretrained(folder), "aself b")]


def encoder_of(folder: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(str(folder)))


class TestFastPath:
    @pytest.mark.parametrize("settings_of_file", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
    @pytest.mark.parametrize(
        "rules", [{}, {"add_dummy_prefix": False}, {"normalization_rule_name": "nmt_nfkc"}, {"vocab_size": 600}]
    )
    def test_of_llama_is_sentencepiece_cut_into_parts(self, write, rules, settings_of_file):
        encoder = encoder_of(write(rules, **settings_of_file))
        assert encoder.sentencepiece
        assert encoder.can_cut

    def test_needs_the_same_tables(self, write):
        """Each change either leaves the ids of the probes as they are, or makes the tokenizer a different one."""
        folder = write(added=["<pad>"])
        tables = json.loads((folder / "tokenizer.json").read_text())
        tables["added_tokens"] = [token for token in tables["added_tokens"] if token["content"] != "<pad>"]
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_text())
        content["added_tokens_decoder"] = {}
        path.write_text(json.dumps(content))
        merges = tables["model"]["merges"]

        def sentencepiece_of(model: dict, **changes) -> bool:
            changed = {**tables, "model": {**tables["model"], **model}, **changes}
            (folder / "tokenizer.json").write_text(json.dumps(changed))
            encoder = encoder_of(folder)
            compare(encoder, AutoTokenizer.from_pretrained(folder), PROBES)
            return bool(encoder.sentencepiece)

        assert sentencepiece_of({})
        assert not sentencepiece_of({"merges": merges[:-1]})
        assert not sentencepiece_of({"merges": [*merges[:-9], *merges[:-10:-1]]})
        assert not sentencepiece_of({"byte_fallback": False})
        assert not sentencepiece_of({}, normalizer=None)
        *others, last = tables["model"]["vocab"].items()
        assert not sentencepiece_of({"vocab": dict([*others, (last[0], last[1] + 1)])})
        assert not sentencepiece_of({}, pre_tokenizer={"type": "Digits", "individual_digits": True})

    def test_long_texts(self, write):
        """Texts longer than any part, with a part longer than a piece."""
        for rules in (
            {},
            {"add_dummy_prefix": False},
            {"model_type": "unigram"},
            {"normalization_rule_name": "nmt_nfkc"},
        ):
            folder = write(rules, legacy=False)
            text = "".join(random.Random(7).choices([*FRAGMENTS, *ADDED], k=9000))
            compare(
                encoder_of(folder), AutoTokenizer.from_pretrained(folder), [text, " " * 70_000 + text, "self" * 20_000]
            )


class TestFaults:
    def test_added_tokens_are_used_and_special_ones_stay_text(self, write):
        folder = write(added=["zebrafish", AddedToken("<|end|>", special=True)])
        tokenizer, text = AutoTokenizer.from_pretrained(folder), "a zebrafish<|end|></s>"
        (ids,) = encoder_of(folder).tokenize([text])
        assert tokenizer.convert_tokens_to_ids("zebrafish") in ids
        assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")} & set(ids)
        assert ids == truth(tokenizer, text)
        assert tokenizer.decode(ids).endswith("<|end|></s>")

    @pytest.mark.parametrize("ignore_merges", [False, True])
    def test_a_letter_that_is_used_for_padding_stays_in_the_text(self, ignore_merges):
        tables = Tokenizer.from_str(byte_level(300, ignore_merges))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tables, bos_token="<s>", eos_token="</s>", pad_token="!")
        text = "Hi! Oh!! <s>!</s>"
        (ids,) = TextEncoder(tokenizer).tokenize([text])
        assert ids == truth(tokenizer, text)
        assert ids.count(tokenizer.pad_token_id) == text.count("!")
        tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
        assert prompt_ids(tokenizer, "Hi!!", chat=True) == tokenizer.apply_chat_template([{"content": "Hi!!"}])
        tokenizer.eos_token = "!"
        assert "its BOS or EOS token is '!', which text cannot do without" in error_of(TextEncoder, tokenizer)

    def test_text_without_any_token_is_refused(self):
        words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
        encoder = TextEncoder(tokenizer)
        assert encoder.tokenize(["a"]) == [[2]]
        assert error_of(encoder.tokenize, ["b"]).startswith("--tokenizer: it has no token for some text (")
        tokenizer.chat_template = "{{ messages[0].content }}"
        assert error_of(prompt_ids, tokenizer, "b", chat=True).startswith("--tokenizer: it has no token for some text")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_slow_tokenizers(self, write, legacy):
        """A special token stays text and an added one is used, one by one and in a batch."""
        folder = write({"normalization_rule_name": "nmt_nfkc"})
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
        for added in ([], ["zebrafish"]):
            tokenizer.add_tokens(added)
            encoder = TextEncoder(tokenizer)
            for text in [*PROBES, "<s>two</s>", " </s>  x", "zebrafish</s>"]:
                (ids,) = encoder.tokenize([text])
                assert encoder.tokenize([text, text]) == [ids, ids]
                assert not {1, 2} & set(ids)
                if "zebrafish" not in text or not added:
                    tokens = tokenizer.tokenize(text, split_special_tokens=True)
                    assert ids == tokenizer.convert_tokens_to_ids(tokens)
                else:
                    assert len(tokenizer) - 1 in ids

    @pytest.mark.parametrize("value", ["", None, {"content": "", "__type": "AddedToken"}, "<unk>"])
    @pytest.mark.parametrize("kind", ["bos_token", "eos_token"])
    def test_documents_are_not_framed_by_the_unknown_token(self, write, kind, value):
        message = error_of(load_tokenizer, str(write(**{kind: value})))
        assert message.startswith("--tokenizer: ")
        assert kind in message
        assert "tokenizer_config.json" in message

    def test_one_token_may_be_all_where_text_makes_none(self, tmp_path):
        """GPT-2's tokenizer is such a one."""
        tokenizer = Tokenizer.from_str(byte_level(300, False))
        token = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **token).save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path)).bos_token_id == 1

    def test_ids_with_holes(self, tmp_path):
        tables = json.loads(byte_level(300, False))
        tables["model"]["vocab"]["!"] = 73961
        tokenizer = Tokenizer.from_str(json.dumps(tables))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path))
        encoder = TextEncoder(loaded)
        assert (encoder.dtype, encoder.vocab_size) == (np.dtype("<u4"), 73962)
        assert encoder.encode(["!"])[0].tolist() == [0, 73961, 1]
        check_vocabulary(loaded, LlamaConfig(vocab_size=73962))
        message = error_of(check_vocabulary, loaded, LlamaConfig(vocab_size=73961))
        assert "73962 (its 300 tokens have ids up to 73961) is larger than the model's of 73961" in message

    def test_random_ids_are_refused(self, write):
        folder = write(added=["zebrafish"])
        tables = json.loads((folder / "tokenizer.json").read_text())
        tables["model"]["dropout"] = 0.1
        (folder / "tokenizer.json").write_text(json.dumps(tables))
        assert "has a dropout of 0.1" in error_of(load_tokenizer, str(folder))

    def test_prefix_setting_without_its_model(self, write):
        folder = write(added=["zebrafish"], add_prefix_space=True)
        (folder / "tokenizer.model").unlink()
        assert "sets add_prefix_space, which needs tokenizer.model" in error_of(load_tokenizer, str(folder))

    def test_fingerprint_tells_plain_extended_and_stale_folders_apart(self, write):
        plain, special, ordinary = (
            write(),
            write(added=[AddedToken("<|end|>", special=True)]),
            write(added=["zebrafish"]),
        )
        stripped = write(added=[AddedToken("<|end|>", special=True, lstrip=True)])
        stale = write(added=["zebrafish"])
        shutil.copy(write({"vocab_size": 600}) / "tokenizer.model", stale)
        folders = [plain, special, ordinary, stripped, stale, write(eos_token="<s>"), write({"vocab_size": 600})]
        fingerprints = [encoder_of(folder).fingerprint for folder in folders]
        assert fingerprints[4] == fingerprints[2]  # only its tokenizer.json is read
        assert len(set(fingerprints)) == len(folders) - 1

    def test_fingerprint_of_plain_folders_stays_what_it_was(self, write):
        """Prepared folders and checkpoints hold the fingerprint."""
        for settings_of_file, bare in (({}, False), ({"legacy": False}, True)):
            folder = write(**settings_of_file)
            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            content = json.dumps([1, 2, True, bare]).encode() + model.serialized_model_proto()
            assert encoder_of(folder).fingerprint == hashlib.sha256(content).hexdigest()
