"""Select the files of an output folder for publication, and check their completeness."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfllm.errors import InputError, refuse_if
from hfllm.outputs.report import REPORT_FILE, read_report

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
# The record of a model with a merged adapter: the adapter and its base.
MERGED_FROM = "merged_from.json"
# The names of the labels of an adapter's head, not recorded by PEFT.
LABELS = "labels.json"
# Weight files loaded by from_pretrained, in order of preference; an index names its shards.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
SETTINGS = (CONFIG, ADAPTER_CONFIG, "generation_config.json", LABELS)
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
# Of a vision-language or audio model; an older transformers wrote the second.
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
PAPERS = ("report.md", REPORT_FILE, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")


def model_files(folder: str | Path) -> list[str]:
    """Return the files of a saved model to publish, relative to its folder, sorted, without the card.

    Left out are checkpoints, optimizer and trainer state, training_args.bin, other stages' folders and value heads.

    Raises:
        InputError: when the folder holds no complete model in safetensors format, with its config and code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train a model first or name the folder of a finished one")
    if not (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        unfinished = " (only checkpoints of an unfinished run)" if any(folder.glob("checkpoint-*")) else ""
        raise InputError(f"{folder} holds no {CONFIG} or {ADAPTER_CONFIG}{unfinished}: it is not a saved model")
    names = {*weight_files(folder), *code_files(folder), *plot_files(folder)}
    for pattern in (*SETTINGS, *TOKENIZER, *PROCESSOR, *PAPERS):
        names |= {str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file()}
    return sorted(names)


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds a PEFT adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in WEIGHTS)


def weight_files(folder: Path) -> list[str]:
    """Return the safetensors files for `from_pretrained`, and their index; check that each is complete.

    Raises:
        InputError: when there are none, only pickled ones, or one is missing or truncated.
    """
    choices = ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS
    first = next((name for name in choices if (folder / name).is_file()), None)
    if first is None:
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} holds pickled weights ({pickled[0]}), which run code when they are loaded: load the model "
                "and save it again with save_pretrained, which writes safetensors"
            )
        raise InputError(f"{folder} holds no {' or '.join(choices)}: it is not a saved model")
    if not first.endswith(".index.json"):
        read_safetensors_header(folder / first)
        return [first]
    weight_map = read_json(folder / first).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{folder / first} is damaged: it lists no files (weight_map)")
    headers = {}
    for shard in sorted(set(weight_map.values())):
        if ":" in shard or {"", ".."} & set(shard.replace("\\", "/").split("/")):
            raise InputError(f"{folder / first} names {shard!r}, which is not in its folder")
        refuse_if(not (folder / shard).is_file(), f"{folder / first} names {shard}, which is missing")
        headers[shard] = read_safetensors_header(folder / shard)
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise InputError(f"{folder / shard} lacks the tensor {tensor} that {first} places there")
    return [first, *headers]


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read tensor names with dtype, shape and offsets from the format's eight bytes of length and JSON header.

    Raises:
        InputError: when the file is shorter or longer than its header says, or has none.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise InputError(f"{path} is truncated or not safetensors: its header does not fit in {size} bytes")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} is not safetensors: its header cannot be read") from None
    refuse_if(end != size, f"{path} is {size} bytes long where its header says {end}: save or copy it again")
    return header


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in the published weights."""
    total = 0
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            for tensor in read_safetensors_header(folder / name).values():
                count = 1
                for extent in tensor["shape"]:
                    count *= extent
                total += count
    return total


def code_files(folder: Path) -> list[str]:
    """Return the Python files named in `auto_map`, and the files next to them imported by them.

    Raises:
        InputError: when one of them is missing.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    names: set[str] = set()
    for settings in (CONFIG, "tokenizer_config.json"):
        if not (folder / settings).is_file():
            continue
        for reference in flat((read_json(folder / settings).get("auto_map") or {}).values()):
            # `owner/repo--module.Class` is code in another repository.
            if not isinstance(reference, str) or "--" in reference:
                continue
            path = folder / f"{reference.split('.')[0]}.py"
            refuse_if(not path.is_file(), f"{folder / settings}: auto_map names {path.name}, which is missing")
            try:
                names |= {path.name, *(Path(file).name for file in get_relative_import_files(path))}
            except FileNotFoundError as error:
                raise InputError(f"{path} imports {Path(error.filename).name}, which is missing beside it") from None
    return sorted(names)


def flat(values: Iterable[object]) -> list[object]:
    """Flatten lists among the values: a tokenizer's auto_map entry is a pair."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def plot_files(folder: Path) -> list[str]:
    """Return the plots listed in the run's report, in its order."""
    artifacts = (read_report(folder) or {}).get("artifacts", {})
    names = [str(name) for name in artifacts.values() if str(name).endswith(".png")]
    return [name for name in names if Path(name).name == name and (folder / name).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file's object, empty if there is no such file.

    Raises:
        InputError: when it is not JSON or not an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    refuse_if(not isinstance(value, dict), f"{path}: expected an object, got {type(value).__name__}")
    return value


def sees_pictures(folder: Path) -> bool:
    """Return whether an image processor is saved with a model."""
    return "image_processor" in read_json(folder / PROCESSOR[0])
