"""Convert a checkpoint: a native one of transformers into hfllm, or an hfllm model into the native class it equals.

    accelerate launch recipes/convert.py --model_name_or_path meta-llama/Llama-3.2-1B --output_dir llama
    accelerate launch recipes/convert.py --model_name_or_path outputs/rlhf --output_dir native
    accelerate launch recipes/convert.py                                  # the world's base model, to Llama

Weights keep their bits. Native models are read by vLLM, llama.cpp and everything else that knows the class. What the
other side cannot say is refused by name, and a failed conversion leaves no folder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.errors import InputError
from hfllm.runs.command_line import finished_run, main_process, parse_recipe, run, run_arguments


@dataclass
class ConvertArguments:
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


def parse(argv: Sequence[str]) -> tuple:
    return parse_recipe((ConvertArguments,), argv, None, __doc__)


def main(script_args: ConvertArguments) -> dict[str, float]:
    """Convert, compare, write the report. Returns the metrics."""
    from hfllm.outputs.report import Report

    began, arguments = time.perf_counter(), run_arguments(script_args)
    report = finished_run(script_args.output_dir, arguments)
    if report is not None:
        if main_process():
            print(f"convert: already done in {script_args.output_dir} (remove that folder to redo it)")
        return report["metrics"]
    source, target = script_args.model_name_or_path, Path(script_args.output_dir)
    if source is None:
        source, target = world_model(script_args), target / "native"
    if not main_process():
        return {}
    print(f"\n=== convert {source} -> {target}", flush=True)
    metrics = convert(source, target, script_args)
    report = Report(
        stage="convert",
        arguments=arguments,
        metrics=metrics,
        artifacts={"model": str(target.relative_to(script_args.output_dir))},
        wall_seconds=time.perf_counter() - began,
        next_steps=[f'AutoModelForCausalLM.from_pretrained("{target}")'],
    )
    report.write(script_args.output_dir)
    report.print()
    return metrics


def world_model(script_args: ConvertArguments) -> str:
    """The embedded world's base model, in a folder under the output folder."""
    import pretrain

    from hfllm.runs.chain import run_stage

    folder = f"{script_args.output_dir}/pretrain"
    flags = ["--output_dir", folder, "--seed", str(script_args.seed), "--world_seed", str(script_args.world_seed)]
    if script_args.pretrain_config:
        flags += ["--config", script_args.pretrain_config]
    run_stage(pretrain, pretrain.parse(flags))
    return folder


def convert(source: str, target: Path, script_args: ConvertArguments) -> dict[str, float]:
    """Write the converted model and its tokenizer to `target`."""
    from hfllm.models.configuration_hfllm import HfllmConfig
    from hfllm.models.conversion_hfllm import (
        check_empty,
        from_native,
        load_checked,
        read_config,
        to_native,
        whole_folder,
    )

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


def find_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """The source's tokenizer, or `None` with a line that says so: weights are worth converting without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        print(f"convert: no tokenizer in {source} ({' '.join(str(error).split())[:120]})", flush=True)
        return None


def logit_difference(one: Any, other: Any, seed: int) -> float:
    """Largest difference of two models' outputs on 64 random tokens."""
    import torch

    length = min(64, one.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    # From 3 on: the special tokens of most vocabularies come first, and padding would be left out by a scorer.
    ids = torch.randint(min(3, one.config.vocab_size - 1), one.config.vocab_size, (1, length), generator=generator)
    with torch.no_grad():
        first, second = (model.eval()(ids).logits.float() for model in (one, other))
    difference = (first - second).abs().max().item()
    tolerance = 1e-4 if one.dtype == torch.float32 else 5e-2
    if not difference <= tolerance * first.abs().max().item():
        raise InputError(f"the converted model's outputs differ by {difference:.3g}: do not use it, and report this")
    return difference


if __name__ == "__main__":
    run(main, parse)
