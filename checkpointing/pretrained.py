"""Weights of a Hugging Face model, in a folder or on the hub; each rank reads only its own slices."""

import contextlib
import fnmatch
import json
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, PreTrainedTokenizerBase

from checkpointing.folder import check_model
from checkpointing.reader import LazyTensors, is_safetensors, mapped_tensors
from engine.boost import Engine
from engine.shards import first_not_finite, frozen_parameters, is_finite, restore
from model_utils import parameter_specs
from runtime import hub
from runtime.collectives import gather
from runtime.console import InputError, first_line, say
from runtime.files import exclusive_lock, is_plain_name

# Files that may hold a folder's weights; the first that exists is used, as in transformers (modeling_utils,
# _get_resolved_checkpoint_files).
CHOICES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LOAD = "load it with transformers, AutoModelForCausalLM.from_pretrained({}), and give the output of save_pretrained"
_META = "Meta's own format; convert it with `python -m transformers.models.llama.convert_llama_weights_to_hf`"
OTHER_FORMATS = {  # other files that a folder may hold: description and remedy
    "model-*-of-*.safetensors": f"weights without their index, {CHOICES[1]}; download the folder again",
    "pytorch_model-*-of-*.bin": f"weights without their index, {CHOICES[3]}; download the folder again",
    "model.*.safetensors": f"a variant of the weights; {_LOAD.format('FOLDER, variant=NAME')}",
    "pytorch_model.*.bin": f"a variant of the weights; {_LOAD.format('FOLDER, variant=NAME')}",
    "consolidated*.pth": _META,
    "consolidated*.safetensors": _META,
    "*.gguf": f"GGUF weights; {_LOAD.format('FOLDER, gguf_file=NAME')}",
    "tf_model*": f"TensorFlow weights; {_LOAD.format('FOLDER, from_tf=True')}",
    "flax_model*": f"Flax weights; {_LOAD.format('FOLDER, from_flax=True')}",
    "*.onnx": "an inference graph; give the folder of the model that it was exported from",
    "zero_to_fp32.py": "a DeepSpeed checkpoint; run that file to convert it to pytorch_model.bin",
    "*.distcp": "a torch.distributed checkpoint; export it with the program that made it",
}
FORMATS = (None, "pt", "mlx")  # in safetensors metadata: formats that store tensors in transformers' layout
FLOATING = ("float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16")  # in torch, in safetensors
DESCRIPTIONS = ("*.json", "*.model", "*.jinja")  # configuration and tokenizer
UNREADABLE = (  # errors of json, torch.load and safetensors on damaged files
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
BASE = "model."  # prefix of all weights but the output embedding
INPUT_EMBEDDING, OUTPUT_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def find_model(name_or_path: str, flag: str) -> Path:
    """Return the folder of a model: `name_or_path` itself, or a download of the hub's NAME or NAME@REVISION.

    Raises:
        InputError: there is no such folder, and the hub does not have the model or refuses it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{flag}: {name_or_path} is a file; give the folder that holds it")
    hub.check_name(name_or_path, flag, "a model folder")
    lock = Path(HF_HUB_CACHE) / f".{name_or_path.replace('/', '--')}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # huggingface_hub locks single files: without this lock each rank would ask the hub for every file.
        with exclusive_lock(lock, f"{name_or_path} is being downloaded; waiting for it"):
            return _downloaded(name_or_path) or _download(name_or_path, flag)
    except HfHubHTTPError as error:
        raise InputError(
            f"{flag}: {name_or_path} is not a folder, and the hub refuses it ({hub.status_of(error)})"
        ) from error
    except OSError as error:
        if hub.of_disk(error):
            if found := _downloaded(name_or_path):  # in a cache that another user fills, readable only
                return found
            raise hub.unwritable_cache(name_or_path, flag, error.strerror or type(error).__name__) from error
        raise InputError(
            f"{flag}: {name_or_path} is not a folder, and it cannot be downloaded ({type(error).__name__}); "
            "give a folder that holds the model"
        ) from error


def _downloaded(name_or_pin: str) -> Path | None:
    """Return the folder of an earlier download; None if some of its weights, which are downloaded last, are missing."""
    name, revision = hub.split_revision(name_or_pin)
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        weight_files(folder, "")
    except (LocalEntryNotFoundError, InputError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _download(name_or_pin: str, flag: str) -> Path:
    """Download configuration, tokenizer, and only the weights that transformers would load."""
    name, revision = hub.split_revision(name_or_pin)
    info = HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT_SECONDS)
    files = [file.rfilename for file in info.siblings or []]
    choice = next((choice for choice in CHOICES if choice in files), None)
    if "config.json" not in files or not choice:
        lacking = "it has no config.json" if "config.json" not in files else f"it has none of {', '.join(CHOICES)}"
        reason = other_format(files) or f"is not a Hugging Face model: {lacking}"
        raise InputError(f"{flag}: {name} on the hub {reason}")
    say(f"downloading {name}, commit {info.sha}")
    commit = info.sha if revision else None
    folder = Path(snapshot_download(name, revision=commit, allow_patterns=list(DESCRIPTIONS)))
    weights = _weight_map(folder / choice, flag).values() if choice.endswith(".json") else [choice]
    snapshot_download(name, revision=commit, allow_patterns=sorted(set(weights)))  # last: they mark a complete download
    return folder


def other_format(names: Collection[str]) -> str | None:
    """Return the end of a message about a folder with these files, if their format is a known one."""
    if "adapter_config.json" in names:
        return "holds an adapter; merge it into its base model and give that"
    for pattern, remedy in OTHER_FORMATS.items():
        if found := sorted(fnmatch.filter(names, pattern)):
            return f"holds {found[0]}, {remedy}"
    return None


def refuse_other_formats(folder: Path, flag: str) -> None:
    """Raise InputError if a folder does not hold a whole model, and name what it holds.

    If a folder holds an adapter, transformers loads the adapter's base model, whatever else the folder holds.
    """
    if not folder.is_dir():
        raise InputError(f"{flag}: {folder} is not a folder on this machine; give a model folder")
    names = [path.name for path in folder.iterdir()]
    if "adapter_config.json" in names:
        base = "the model that it was trained on"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        raise InputError(
            f"{flag}: {folder} holds an adapter for {base}; merge them and give the folder MERGED, with that model's "
            'tokenizer: python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('MERGED')\""
        )
    if "config.json" in names:
        hub.refuse_pointers([folder / "config.json"], flag)
    elif reason := other_format(names):
        raise InputError(f"{flag}: {folder} {reason}")


def generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase, flag: str) -> dict[str, dict]:
    """Return the content of a folder's generation_config.json, by file name; empty if it does not exist.

    The tokenizer's EOS, which fine-tuning teaches, is added to the tokens that end a text.

    Raises:
        InputError: the file cannot be read, or its eos_token_id is no token id or list of them.
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
    if any(type(end) is not int for end in ends):
        raise InputError(f"{flag}: {path}: eos_token_id must be a token id or a list of them; correct or remove it")
    if tokenizer.eos_token_id not in ends:
        content["eos_token_id"] = [*ends, tokenizer.eos_token_id]
    return {GENERATION_CONFIG: content}


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and element type of a tensor, known without reading it."""

    path: Path
    shape: torch.Size
    dtype: str  # as safetensors or torch name it


def weight_files(folder: Path, flag: str) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a folder's weights, and the file name of each tensor, if there is an index.

    Raises:
        InputError: the folder holds no such weights, or lacks files that its index names.
    """
    choice = next((folder / name for name in CHOICES if (folder / name).is_file()), None)
    if not choice:
        reason = other_format([path.name for path in folder.iterdir()])
        raise InputError(f"{flag}: {folder} {reason or 'holds no weights: none of ' + ', '.join(CHOICES)}")
    paths, weight_map = [choice], None
    if choice.suffix == ".json":
        weight_map = _weight_map(choice, flag)
        paths = [folder / file for file in sorted(set(weight_map.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{flag}: {folder} lacks {', '.join(missing)}, which its index names")
    hub.refuse_pointers(paths, flag)
    return paths, weight_map


def _weight_map(index: Path, flag: str) -> dict[str, str]:
    """Return the file name of each tensor in an index.

    Raises:
        InputError: the index is damaged, or names anything but files in its folder.
    """
    hub.refuse_pointers([index], flag)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [str(file) for file in weight_map.values() if not isinstance(file, str) or not is_plain_name(file)]
    except UNREADABLE as error:
        raise InputError(f"{flag}: the weights in {index.parent} cannot be read: {index.name} is damaged") from error
    if files or not weight_map:
        reason = f"names {files[0]!r}, which is not a file in its folder" if files else "names no weights"
        raise InputError(f"{flag}: the weights in {index.parent} cannot be read: {index.name} {reason}; restore it")
    return weight_map


def pretrained_weights(folder: Path, flag: str) -> dict[str, StoredTensor]:
    """Return every tensor of a Hugging Face model folder that transformers would load, without reading the data.

    Raises:
        InputError: the folder holds no such weights, they cannot be read, or its index does not match its files.
    """
    paths, weight_map = weight_files(folder, flag)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            tensors = _stored_tensors(path)
        except UNREADABLE as error:
            raise InputError(
                f"{flag}: the weights in {folder} cannot be read: {path.name}: {first_line(error)}"
            ) from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise InputError(
                f"{flag}: {found[twice[0]].path} and {path.name} both hold {twice[0]}; save the model again"
            )
        found |= tensors
    if weight_map is None:
        return found
    differing = [name for name, file in weight_map.items() if name not in found or found[name].path.name != file]
    differing += [name for name in found if name not in weight_map and not _is_buffer(name)]
    if differing:
        raise InputError(
            f"{flag}: the index in {folder} does not match its files: {differing[0]} is not where it says "
            f"({len(differing)} such); download the folder again, or save the model again"
        )
    return found


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file. Raises one of UNREADABLE if it holds anything else."""
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {"format": None}).get("format", "none") not in FORMATS:
                raise ValueError(f"its metadata give the format {file.metadata().get('format')!r}, not 'pt'")
            names = file.keys()
            slices = [(name, file.get_slice(name)) for name in names]
            return {name: StoredTensor(path, torch.Size(part.get_shape()), part.get_dtype()) for name, part in slices}
    tensors = mapped_tensors(path)
    other = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor) or value.is_meta]
    if other:
        raise ValueError(f"{other[0]!r} in it is not a tensor; save only the model's state_dict")
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise ValueError(f"{sparse[0]} in it is sparse; save it dense")
    return {
        name: StoredTensor(path, tensor.shape, str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def _is_buffer(name: str) -> bool:
    """Return True for a buffer that older versions of transformers saved with the weights; config.json gives it."""
    return name.endswith("rotary_emb.inv_freq")


class Pretrained(LazyTensors):
    """The weights of a model folder, every parameter of the model in its shape; `flag` gave the folder."""

    def __init__(self, files: dict[str, Path], prefix: str, folder: Path, flag: str):
        super().__init__(files, prefix)
        self.folder, self.flag = folder, flag


def model_weights(folder: Path, config: LlamaConfig, flag: str) -> Pretrained:
    """Return the weights of every parameter of `config`, by name, after checking that all exist in their shapes.

    Raises:
        InputError: weights are missing, unreadable, quantised, of another shape, or not described by `config`.
    """
    stored = pretrained_weights(folder, flag)
    stored = {name: tensor for name, tensor in stored.items() if not _is_buffer(name)}
    prefix = "" if any(name.startswith(BASE.rstrip(".")) for name in stored) else BASE  # LlamaModel saves without
    stored = {f"{prefix}{name}": tensor for name, tensor in stored.items()}
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATING:
            raise InputError(
                f"{flag}: {name} in {tensor.path} is stored as {tensor.dtype}: the weights are quantised, and only "
                "floating-point weights of 16 bits or more can be trained; give the original model, or "
                "dequantize it with transformers (model.dequantize()) and save it again"
            )
    if config.tie_word_embeddings:
        tied = stored.pop(OUTPUT_EMBEDDING, None)
        if INPUT_EMBEDDING not in stored and tied:
            raise InputError(
                f"{flag}: the weights in {folder} have {OUTPUT_EMBEDDING} instead of the tied {INPUT_EMBEDDING}; "
                "load the model with transformers and save it again"
            )
    shapes = {spec.name: spec.shape for spec in parameter_specs(config)}
    if missing := [name for name in shapes if name not in stored]:
        hint = "; set tie_word_embeddings in its config.json if it has none of its own"
        hint = hint if missing == [OUTPUT_EMBEDDING] else ""
        raise InputError(f"{flag}: the weights in {folder} lack {missing[0]} ({len(missing)} missing){hint}")
    if unknown := [name for name in stored if name not in shapes]:
        raise InputError(
            f"{flag}: {folder} holds {unknown[0]}, which its config.json does not describe ({len(unknown)} such)"
        )
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise InputError(
                f"{flag}: {name} in {folder} has shape {list(stored[name].shape)}, but its config.json gives "
                f"{list(shape)}"
            )
    return Pretrained({name: tensor.path for name, tensor in stored.items()}, prefix, folder, flag)


def check_pretrained(folder: Path, config: LlamaConfig, flag: str = "--init_from") -> Pretrained:
    """Return the weights of a model folder; refuse it, before anything is allocated, if they do not fit `config`."""
    refuse_other_formats(folder, flag)
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag}: {folder} is not a Hugging Face model folder: it has no config.json")
    check_model(folder, config, flag)
    return model_weights(folder, config, flag)


def weights_fingerprint(weights: LazyTensors) -> str:
    """Return the XXH3-64 of FINGERPRINT_ROWS rows of every tensor, by name, whatever files hold them.

    Training changes nearly every number that it trains, so a sample tells models apart, and reads less than a
    thousandth of 140 GB. It does not detect a damaged byte.
    """
    digests = {}
    for name in sorted(weights.files, key=lambda name: (str(weights.files[name]), name)):
        rows, digest = weights.shape(name)[0], xxhash.xxh3_64(name.encode())
        for row in range(0, rows, -(-rows // FINGERPRINT_ROWS)):
            digest.update(weights[name][row : row + 1].contiguous().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return xxhash.xxh3_64(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_pretrained(weights: Pretrained, engine: Engine) -> None:
    """Set the model's weights; each rank reads only its own slices into host memory. Collective.

    With adapters, which have no weights here, this sets the frozen weights.

    Raises:
        InputError: on every rank, if a weight is NaN or infinite on any.
    """
    frozen, broken = frozen_parameters(engine.model), None
    with torch.no_grad():
        for name, parameter in frozen.items():
            value = weights[name][:]
            parameter.copy_(value)
            broken = broken or (None if is_finite(value) else name)
    if frozen:
        broken = next(filter(None, gather(broken)), None)
    else:
        restore(engine, lambda name, key: weights[name], adam_steps=0)
        broken = first_not_finite(engine)
    if broken:
        raise InputError(
            f"{weights.flag}: {broken} in {weights.files[broken]} has a NaN or an infinity; give other weights"
        )
    say(f"initial weights: {weights.folder}")
