"""Weights to begin from: a Hugging Face model, in a folder or on the hub, of which each rank reads its own slices."""

import json
import pickle
from pathlib import Path

import torch
import xxhash
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, PreTrainedTokenizerBase

import hub
from checkpoint_utils import LazyTensors, check_model, mapped_tensors
from console import InputError, first_line, say
from files import exclusive_lock
from model_utils import parameter_specs
from sharded_state import frozen_parameters, restore

# What a folder may hold, in order of preference: an index of several files, or a single one.
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
DESCRIPTIONS = ("*.json", "*.model", "*.jinja")  # configuration and tokenizer
UNREADABLE = (  # what json, torch.load and safetensors raise on damaged files
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
FINGERPRINT_ROWS = 4  # of each tensor
GENERATION_CONFIG = "generation_config.json"
INPUT_EMBEDDING, OUTPUT_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


# ----------------------------------------------------------------------------------------------------- folder and hub


def find_model(name_or_path: str, flag: str) -> Path:
    """The folder of a model: `name_or_path` itself, or what the hub has under NAME or NAME@REVISION.

    Raises:
        InputError: there is no such folder, and the hub does not have or does not give it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{flag}: {name_or_path} is a file; give the folder that holds it")
    try:
        validate_repo_id(hub.split_revision(name_or_path)[0])
    except HFValidationError as error:
        raise InputError(f"{flag}: {name_or_path} does not exist; give a model folder or a hub name") from error
    lock = Path(HF_HUB_CACHE) / f".{name_or_path.replace('/', '--')}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(lock, f"{name_or_path} is being downloaded; waiting for it"):
            return _downloaded(name_or_path) or _download(name_or_path, flag)
    except HfHubHTTPError as error:
        raise InputError(
            f"{flag}: {name_or_path} is no folder, and the hub refuses it ({hub.status_of(error)})"
        ) from error
    except OSError as error:
        raise InputError(
            f"{flag}: {name_or_path} is no folder, and it cannot be downloaded ({type(error).__name__}); "
            "give a folder that holds the model"
        ) from error


def _downloaded(name_or_pin: str) -> Path | None:
    """The folder of an earlier download, if it is whole."""
    name, revision = hub.split_revision(name_or_pin)
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        pretrained_weights(folder, "")
    except (LocalEntryNotFoundError, InputError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _download(name_or_pin: str, flag: str) -> Path:
    """Fetches configuration, tokenizer, and weights in the one of their formats that comes first."""
    name, revision = hub.split_revision(name_or_pin)
    info = HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT_SECONDS)
    files = [file.rfilename for file in info.siblings or []]
    if "config.json" not in files:
        raise InputError(f"{flag}: {name} on the hub is not a Hugging Face model: it has no config.json")
    pattern = "model*.safetensors" if {INDICES[0], SINGLES[0]} & set(files) else "pytorch_model*.bin"
    say(f"downloading {name}, commit {info.sha}")
    return Path(
        snapshot_download(name, revision=info.sha if revision else None, allow_patterns=[*DESCRIPTIONS, pattern])
    )


def generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase, flag: str) -> dict[str, dict]:
    """How `generate` works with a model folder: its generation_config.json by name, if there is one.

    The tokenizer's EOS, which fine-tuning teaches, is among the tokens that end a text.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{flag}: {path} cannot be read ({first_line(error)}); restore or remove it") from error
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if tokenizer.eos_token_id not in ends:
        content["eos_token_id"] = [*ends, tokenizer.eos_token_id]
    return {GENERATION_CONFIG: content}


# ------------------------------------------------------------------------------------------------------------- weights


def pretrained_weights(folder: Path, flag: str) -> dict[str, Path]:
    """The file of each parameter in a Hugging Face model folder, safetensors or else .bin.

    Raises:
        InputError: the folder holds no such weights, or not all that its index names.
    """
    try:
        files = _weight_files(folder)
    except UNREADABLE as error:
        raise InputError(f"{flag}: the weights in {folder} cannot be read: {first_line(error)}") from error
    if not files:
        raise InputError(f"{flag}: {folder} holds no weights: none of {', '.join((*SINGLES, *INDICES))}")
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise InputError(f"{flag}: {folder} lacks {', '.join(missing)}, which its index names")
    return files


def _weight_files(folder: Path) -> dict[str, Path]:
    for index, single in zip(INDICES, SINGLES, strict=True):
        if (folder / index).is_file():
            weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        if (folder / single).is_file() and single.endswith(".bin"):
            return dict.fromkeys(mapped_tensors(folder / single), folder / single)
        if (folder / single).is_file():
            with safe_open(folder / single, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / single)
    return {}


def model_weights(folder: Path, config: LlamaConfig, flag: str) -> LazyTensors:
    """The weights of every parameter of `config`, by its name there, once all are there in their shapes.

    Raises:
        InputError: weights are missing, cannot be read, have another shape, or are of no parameter of the model.
    """
    files = pretrained_weights(folder, flag)
    if config.tie_word_embeddings:
        tied = files.pop(OUTPUT_EMBEDDING, None)
        if INPUT_EMBEDDING not in files and tied:
            raise InputError(
                f"{flag}: the weights in {folder} have {OUTPUT_EMBEDDING} for the tied {INPUT_EMBEDDING}; "
                "load the model with transformers and save it anew"
            )
    weights, specs = LazyTensors(files), {spec.name: spec.shape for spec in parameter_specs(config)}
    missing = [name for name in specs if name not in files]
    if missing:
        raise InputError(f"{flag}: the weights in {folder} lack {missing[0]} ({len(missing)} missing)")
    unknown = [name for name in files if name not in specs and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise InputError(
            f"{flag}: {folder} holds {unknown[0]}, which its config.json does not describe ({len(unknown)} such)"
        )
    try:
        shapes = {name: weights.shape(name) for name in sorted(specs, key=lambda name: str(files[name]))}
    except UNREADABLE as error:
        raise InputError(f"{flag}: the weights in {weights.path} cannot be read: {first_line(error)}") from error
    for name, shape in shapes.items():
        if shape != specs[name]:
            raise InputError(
                f"{flag}: {name} in {folder} has the shape {list(shape)}, and its config.json makes it "
                f"{list(specs[name])}"
            )
    return weights


def check_pretrained(folder: Path, config: LlamaConfig, flag: str = "--init_from") -> LazyTensors:
    """The weights of a model folder, which is refused before anything is allocated if they are not all of `config`."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag}: {folder} is not a Hugging Face model folder: it has no config.json")
    check_model(folder, config, flag)
    return model_weights(folder, config, flag)


def weights_fingerprint(weights: LazyTensors) -> str:
    """XXH3-64 of FINGERPRINT_ROWS rows of every tensor, by name, however they lie in files.

    Training changes nearly every number of whatever it trains, so that a sample tells models apart, and of 140 GB less
    than a thousandth is read. It would not tell of a damaged byte.
    """
    digests = {}
    for name in sorted(weights.files, key=lambda name: (str(weights.files[name]), name)):
        rows, digest = weights.shape(name)[0], xxhash.xxh3_64(name.encode())
        for row in range(0, rows, -(-rows // FINGERPRINT_ROWS)):
            digest.update(weights[name][row : row + 1].contiguous().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return xxhash.xxh3_64(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_pretrained(weights: LazyTensors, plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper) -> None:
    """Sets the model's weights, each rank reading its own slices, which is all the host memory that it takes.

    Beside adapters, which have no weights here, the frozen ones are set.
    """
    frozen = frozen_parameters(model)
    with torch.no_grad():
        for name, parameter in frozen.items():
            parameter.copy_(weights[name][:])
    if not frozen:
        restore(plugin, model, optimizer, lambda name, key: weights[name], adam_steps=0)
