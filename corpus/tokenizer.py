"""Loads a tokenizer from a folder or the hub, and checks it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from corpus.vocabulary import dropped_characters, tables_of
from runtime import hub
from runtime.console import InputError, first_line

FRAME = ("bos_token", "eos_token")
LLAMA_TOKENIZER = "hf-internal-testing/llama-tokenizer"


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hugging Face hub, as AutoTokenizer does.

    A folder with only `tokenizer.model` is enough; it is read as if a LLaMA model's config.json were there too.

    Raises:
        InputError: there is no tokenizer, it lacks a BOS or EOS token of its own, or its ids are random.
    """
    if not name_or_path.strip():
        raise InputError("--tokenizer: the name is empty; give a folder or a hub name, or leave the flag out")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise InputError(f"--tokenizer: {name_or_path} is a file; give the folder that holds it")
    if not path.exists() and (path.is_absolute() or name_or_path.startswith((".", "~"))):
        raise InputError(f"--tokenizer: {name_or_path} does not exist; give a folder with a tokenizer or a hub name")
    if path.is_dir():
        hub.refuse_pointers(sorted(path.glob("tokenizer*")), "--tokenizer")
    else:
        hub.check_name(name_or_path, "--tokenizer", "a folder with a tokenizer")
    try:
        tokenizer = _from_folder(path) if path.is_dir() else _from_hub(name_or_path)
        if not tokenizer:  # transformers returns False for a damaged tokenizer.model
            raise ValueError("damaged tokenizer.model")
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        if path.is_dir() and (problem := _problem_of_settings(path)):
            raise InputError(f"--tokenizer: {problem}") from error
        raise InputError(
            f"--tokenizer: cannot load {name_or_path} ({first_line(error)}); "
            "give a folder that holds tokenizer.model or tokenizer.json with tokenizer_config.json"
        ) from error
    _check(tokenizer, name_or_path)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    missing = [kind for kind in FRAME if not getattr(tokenizer, kind)]
    if missing:
        raise InputError(f"--tokenizer: {name} has no {' and no '.join(missing)}; set it in its tokenizer_config.json")
    ids, tables = tokenizer.get_vocab(), tables_of(tokenizer) if tokenizer.is_fast else None
    unknown = unknown_id(tokenizer, tables)
    for kind in FRAME:
        token = getattr(tokenizer, kind)
        if token not in ids or ids[token] == unknown:
            problem = "is the unknown token" if token in ids else "is not in its vocabulary"
            raise InputError(
                f"--tokenizer: {name} has '{token}' as its {kind}, which {problem}; correct its tokenizer_config.json"
            )
    if tables and (dropout := tables["model"].get("dropout")):
        raise InputError(
            f"--tokenizer: {name} has a dropout of {dropout}, so its ids are random; set it to null in tokenizer.json"
        )
    if tables and (dropped := dropped_characters(tables)):
        raise InputError(
            f"--tokenizer: {name} drops {dropped} from texts, since its model has no unknown token; train it with an "
            "unk_token, or with ByteLevel.alphabet() as its initial_alphabet"
        )


def check_same_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, flag: str) -> None:
    """Raise InputError if a model folder has a tokenizer with other tokens for the same ids.

    Added tokens may differ, since models have ids in reserve for them.
    """
    try:
        own = _from_folder(folder)
    except Exception:  # it has none, or one that cannot be read
        return
    added = {*own.get_added_vocab().values(), *tokenizer.get_added_vocab().values()}
    tokens = {id_: token for token, id_ in own.get_vocab().items() if id_ not in added}
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if tokens.get(id_, token) != token:
            raise InputError(
                f"--tokenizer: its token {id_} is {token!r}, and that of {flag} {folder} is {tokens[id_]!r}; give "
                f"--tokenizer {folder}, or remove its tokenizer files if its weights are to learn other tokens"
            )


def unknown_id(tokenizer: PreTrainedTokenizerBase, tables: dict[str, Any] | None) -> int | None:
    """Return the id of unknown text, or None if the model knows all text, as GPT-2's does despite its `unk_token`.

    Args:
        tables: `tables_of` a fast tokenizer.
    """
    if tables is None:
        return tokenizer.unk_token_id
    model = tables["model"]
    return model.get("unk_id", tokenizer.get_vocab().get(model.get("unk_token")))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1; this exceeds the number of tokens if some ids are unused."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Raise InputError if the tokenizer has ids that the model has no embedding for."""
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        holes = "" if size == len(tokenizer) else f" (its {len(tokenizer)} tokens have ids up to {size - 1})"
        raise InputError(
            f"--tokenizer: its vocabulary of {size}{holes} is larger than the model's of {config.vocab_size}; give the "
            "model's own tokenizer, or a model with as many embeddings"
        )


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    settings, has_model = folder / "tokenizer_config.json", (folder / "tokenizer.model").is_file()
    if not (settings.is_file() or (folder / "tokenizer.json").is_file() or has_model):
        raise InputError(
            f"--tokenizer: {folder} holds neither tokenizer.model nor tokenizer.json; give a folder with one"
        )
    if has_model and not settings.is_file() and not (folder / "config.json").is_file():
        return LlamaTokenizerFast.from_pretrained(folder, legacy=True)
    return _load(str(folder))


def _load(name: str, **choice: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer that AutoTokenizer can load, or that transformers 5 has saved."""
    content = get_tokenizer_config(name, **choice)
    # transformers 5 has a new name for the class that reads only tokenizer.json, and lists the extra special tokens.
    loader = PreTrainedTokenizerFast if content.get("tokenizer_class") == "TokenizersBackend" else AutoTokenizer
    options: dict[str, Any] = {"trust_remote_code": False, **choice}
    if isinstance(extra := content.get("extra_special_tokens"), list):
        options |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return loader.from_pretrained(name, **options)


def _problem_of_settings(folder: Path) -> str | None:
    """Return the setting that keeps transformers from loading the folder, and its remedy, or None."""
    settings = folder / "tokenizer_config.json"
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
        values = {kind: content.get(kind, kind) for kind in FRAME}
    except (OSError, ValueError, AttributeError):
        return None
    empty = [kind for kind, value in values.items() if not (value.get("content") if isinstance(value, dict) else value)]
    if empty:
        return f"{settings} leaves {' and '.join(empty)} empty; set it to the token in the vocabulary"
    if not content.get("tokenizer_class") and not (folder / "config.json").is_file():
        return f"{settings} names no tokenizer_class; set it, as PreTrainedTokenizerFast for tokenizer.json alone"
    if content.get("add_prefix_space") is not None and not (folder / "tokenizer.model").exists():
        return f"{settings} sets add_prefix_space, which needs tokenizer.model beside it; add it or remove the setting"
    return None


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    name, revision = hub.split_revision(name)
    choice = {"revision": revision or "main"}
    try:
        return _load(name, local_files_only=True, **choice)
    except (OSError, ValueError):
        hub.check_cache(name, "--tokenizer")
        _check_hub_has(name, revision)
        return _load(name, **choice)


def _check_hub_has(name: str, revision: str | None) -> None:
    """Raise InputError at once if the hub has no such tokenizer; from_pretrained would retry for most of a minute."""
    try:
        HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        raise InputError(
            f"--tokenizer: {name} is not a folder, and the hub refuses it ({hub.status_of(error)}); check the name"
        ) from error
    except OSError as error:
        raise InputError(
            f"--tokenizer: {name} is neither a folder nor in the hub's cache on this machine, and the hub cannot be "
            "reached; give a folder that holds tokenizer.model"
        ) from error
