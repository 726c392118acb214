"""Conversion between hfllm and the native classes: its flags, the stage before it, and the conversion itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConvertArguments(RemoteCodeArguments):
    """What to convert, and into what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A local folder or a Hub id; without it the world's base model is made first."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub id."})
    gguf_file: str | None = field(default=None, metadata={"help": "A GGUF file of the source, to dequantize."})
    output_dir: str = field(default="outputs/convert", metadata={"help": "Where the converted model goes."})
    native_type: str | None = field(
        default=None, metadata={"help": "Native family to write, such as llama; by default the first that fits."}
    )
    max_shard_size: str = field(default="50GB", metadata={"help": "Largest weight file to write."})
    verify: bool = field(default=True, metadata={"help": "Compare both models' logits on random tokens."})
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the model, if none is named."}
    )
    world_seed: int = field(default=0, metadata={"help": "Seed of the embedded world's facts."})
    seed: int = field(default=42, metadata={"help": "Seed of the pretraining and of the random tokens."})


def check(script_args: ConvertArguments, target: Path) -> None:
    """Refuse a flag that has no effect, and a folder that is not empty.

    Raises:
        InputError: naming the flag or the folder.
    """
    from hfllm.models.conversion.convert import check_empty

    is_idle = bool(script_args.model_name_or_path and script_args.pretrain_config)
    refuse(is_idle, "--pretrain_config", "the model is named")
    check_empty(target)


def stages_before(script_args: ConvertArguments) -> Chain:
    """Return the pretraining that makes the world's base model, if no model is named.

    Raises:
        InputError: when its config is wrong.
    """
    return chain_before(
        "convert",
        script_args.output_dir,
        script_args.seed,
        script_args.world_seed,
        given_models={"pretrain": script_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )


def convert(source: str, target: Path, script_args: ConvertArguments) -> dict[str, float]:
    """Write the converted model and its tokenizer to `target`, whole or not at all. Returns the metrics.

    Raises:
        InputError: for what cannot be read or converted, a `--native_type` without effect, or outputs that differ.
    """
    from hfllm.models.conversion.convert import check_empty, from_native, load_checked, read_config, to_native
    from hfllm.models.family.configuration_hfllm import HfllmConfig
    from hfllm.models.loading.folders import whole_folder

    check_empty(target)
    options = {"revision": script_args.model_revision}
    if script_args.gguf_file:
        options["gguf_file"] = script_args.gguf_file
    tokenizer = find_tokenizer(source, options)
    with whole_folder(target) as folder:
        if isinstance(read_config(source, **options), HfllmConfig):
            model = load_checked(source, **options)
            to_native(model, folder, script_args.native_type, tokenizer, max_shard_size=script_args.max_shard_size)
        else:
            if script_args.native_type is not None:
                raise InputError(f"--native_type {script_args.native_type}: {source} is native and becomes hfllm")
            model = from_native(source, **options)
            model.save_pretrained(folder, max_shard_size=script_args.max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        metrics = {"parameters": model.num_parameters(), "tensors": len(model.state_dict())}
        if script_args.verify:
            metrics["max_logit_difference"] = logit_difference(
                load_checked(source, **options), load_checked(str(folder)), script_args.seed
            )
    return metrics


def find_tokenizer(source: str, options: Mapping[str, str]) -> "PreTrainedTokenizerBase | None":
    """Return the source's tokenizer, or print a line and return `None`: weights can be converted without one."""
    from hfllm.models.loading.saved import reason_of, saved_tokenizer

    try:
        return saved_tokenizer(source, **options)
    except (OSError, ValueError) as error:
        print(f"convert: no tokenizer in {source} ({reason_of(error, 120)})", flush=True)
        return None


def logit_difference(one: "PreTrainedModel", other: "PreTrainedModel", seed: int) -> float:
    """Return the largest difference of two models' outputs on random tokens.

    Raises:
        InputError: when it is larger than rounding explains.
    """
    import torch

    from hfllm.models.loading.weights import is_rounding, logits_of, random_tokens

    ids = random_tokens(one.config.vocab_size, one.config.max_position_embeddings, seed)
    first, second = (logits_of(model, ids) for model in (one, other))
    difference = (first - second).abs().max().item()
    if not is_rounding(difference, first, in_half=one.dtype != torch.float32):
        raise InputError(f"the converted model's outputs differ by {difference:.3g}: do not use it, and report this")
    return difference
