"""Measure speculative decoding of a model: how often drafts are right, how much faster it gets, and why.

    accelerate launch recipes/speculative.py                             # the embedded world, from nothing
    accelerate launch recipes/speculative.py --model_name_or_path NAME --assistant_model_name_or_path SMALLER
    accelerate launch recipes/speculative.py --model_name_or_path NAME --draft int8

Drafts come from a smaller model with the same tokenizer, from the target rounded to int8, from what followed the same
words in the prompt, or from the target's first layers. Without `--model_name_or_path` the world's fine-tuned model is
made first, and a draft model an eighth its size is distilled from it, under the output folder. The output is the
target's own, greedy or sampled; the report compares the speed with transformers' `generate` and with the formula of
Leviathan et al. 2023 (arXiv:2211.17192).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.runs.command_line import finished_run, main_process, parse_recipe, run

DRAFT_CONFIG = Path(__file__).parent / "configs" / "speculative" / "draft.yaml"
DRAFTS = ("model", "int8", "prompt_lookup", "early_exit")


@dataclass
class SpeculativeArguments(DataArguments):
    """The draft, the prompts, and what is measured."""

    output_dir: str = field(default="outputs/speculative", metadata={"help": "Where the report goes."})
    seed: int = field(default=42, metadata={"help": "Seed of the samples, and of the world's models."})
    draft: str = field(default="model", metadata={"help": "Where drafted tokens come from.", "choices": list(DRAFTS)})
    assistant_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The draft model: smaller, with the target's tokenizer."}
    )
    early_exit_layers: int | None = field(
        default=None, metadata={"help": "Layers of the target that draft, with --draft early_exit; half by default."}
    )
    max_ngram: int | None = field(
        default=None,
        metadata={"help": "Longest sequence that --draft prompt_lookup looks for; by default 3 tokens."},
    )
    lookahead: str = field(
        default="adaptive", metadata={"help": "Drafted tokens that the metrics are of: a number, or 'adaptive'."}
    )
    lookaheads: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8], metadata={"help": "Drafted tokens to measure for the plot."}
    )
    num_prompts: int = field(default=300, metadata={"help": "Prompts whose greedy answers are compared."})
    num_timed_prompts: int = field(default=16, metadata={"help": "How many of them are timed."})
    batch_size: int = field(default=1, metadata={"help": "Prompts answered at a time when timed."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    rounds: int = field(default=5, metadata={"help": "Repetitions of each measurement; the median counts."})
    compile: bool = field(default=False, metadata={"help": "Run the models through torch.compile."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the target's pretraining."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the target's fine-tuning."})
    draft_config: str | None = field(
        default=None, metadata={"help": "YAML flags of distill.py, which makes the draft model of the target."}
    )


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig

    return parse_recipe((SpeculativeArguments, ModelConfig), argv, None, __doc__)


def main(script_args: SpeculativeArguments, model_args: Any) -> dict[str, float]:
    """Make what is missing, measure, write the report. Returns the metrics."""
    from hfllm.outputs.report import Report
    from hfllm.runs.stage import stage_arguments

    check(script_args, model_args)
    began, stages = time.perf_counter(), missing_stages(script_args, model_args)
    check_draft(script_args, model_args, stages)
    rows = prompt_rows(script_args)
    arguments = stage_arguments(script_args, model_args, before=stages)
    report = finished_run(script_args.output_dir, arguments)
    if report is not None:
        if main_process():
            print(f"speculative: already done in {script_args.output_dir} (remove that folder to redo it)")
        return report["metrics"]
    script_args, model_args = run_missing_stages(script_args, model_args, stages)
    if not main_process():
        return {}
    print(f"\n=== speculative -> {script_args.output_dir}", flush=True)
    # Layers that bitsandbytes holds in int8 say at each run that they compute in float16, which is LLM.int8's way.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    metrics, speeds = measure(script_args, model_args, rows)
    report = Report(
        stage="speculative",
        arguments=arguments,
        metrics=metrics,
        tables={"Speed by lookahead": speeds},
        curves={"speed": speed_plot(speeds)},
        wall_seconds=time.perf_counter() - began,
        next_steps=next_steps(script_args, model_args),
    )
    report.write(script_args.output_dir)
    report.print()
    return metrics


def check(script_args: SpeculativeArguments, model_args: Any) -> None:
    """Refuse what would have no effect or no meaning.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.sources import WORLD
    from hfllm.errors import InputError, refuse

    if script_args.draft not in DRAFTS:
        raise InputError(f"--draft {script_args.draft!r} is not one of {', '.join(DRAFTS)}")
    if not (script_args.lookahead == "adaptive" or script_args.lookahead.isdecimal()):
        raise InputError(f"--lookahead {script_args.lookahead!r}: expected a number of tokens, or 'adaptive'")
    for flag in ("num_prompts", "num_timed_prompts", "batch_size", "max_new_tokens", "rounds"):
        if getattr(script_args, flag) < 1:
            raise InputError(f"--{flag} {getattr(script_args, flag)}: expected at least 1")
    if not script_args.lookaheads or min(script_args.lookaheads) < 1:
        raise InputError(f"--lookaheads {script_args.lookaheads}: expected numbers of at least 1")
    if script_args.temperature <= 0:
        raise InputError(f"--temperature {script_args.temperature}: expected a number above 0")
    assistant, own = script_args.assistant_model_name_or_path, model_args.model_name_or_path
    for flag, draft in (
        ("assistant_model_name_or_path", "model"),
        ("early_exit_layers", "early_exit"),
        ("max_ngram", "prompt_lookup"),
        ("draft_config", "model"),
    ):
        given = getattr(script_args, flag) is not None
        refuse(given and script_args.draft != draft, f"--{flag}", f"it is for --draft {draft}")
    refuse(model_args.use_peft, "--use_peft", "nothing is trained")
    compiled_int8 = script_args.compile and script_args.draft == "int8"
    refuse(compiled_int8, "--compile", "the int8 draft runs over packed weights, which are not compiled")
    for name in ("pretrain_config", "sft_config", "draft_config"):
        refuse(bool(own and getattr(script_args, name)), f"--{name}", "the model is named")
    refuse(bool(assistant and script_args.draft_config), "--draft_config", "the draft model is named")
    is_world = script_args.dataset_name == WORLD
    refuse(is_world and script_args.max_samples is not None, "--max_samples", "the world is sized by --num_prompts")
    if own and script_args.draft == "model" and not assistant:
        raise InputError(
            f"--model_name_or_path {own} needs a draft: --assistant_model_name_or_path SMALLER with the same "
            f"tokenizer (recipes/distill.py --teacher_model_name_or_path {own} makes one), or --draft int8, "
            "prompt_lookup or early_exit"
        )


def check_draft(script_args: SpeculativeArguments, model_args: Any, stages: dict[str, tuple]) -> None:
    """Refuse a draft that the target cannot have, before the stages are trained.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.errors import InputError, refuse
    from hfllm.generation.speculative.drafts import PromptLookupDraft
    from hfllm.runs.models import load_config, load_tokenizer

    if script_args.max_ngram is not None:
        PromptLookupDraft(script_args.max_ngram)
    if script_args.assistant_model_name_or_path:
        load_config(script_args.assistant_model_name_or_path)
        load_tokenizer(script_args.assistant_model_name_or_path)
    attention = model_args.attn_implementation
    if script_args.draft == "int8":
        is_other = attention not in (None, "sdpa")
        refuse(is_other, "--draft int8", f"attn_implementation={attention!r} is not 'sdpa'")
        is_rounded = model_args.load_in_8bit or model_args.load_in_4bit
        refuse(is_rounded, "--draft int8", "it rounds plain weights: leave --load_in_8bit and --load_in_4bit out")
    if script_args.early_exit_layers is not None:
        target = (model_args.model_name_or_path, model_args.model_revision)
        layers = (
            stages["pretrain"][0].num_hidden_layers
            if stages
            else load_config(*target).get_text_config(decoder=True).num_hidden_layers
        )
        if not 0 < script_args.early_exit_layers < layers:
            raise InputError(
                f"--early_exit_layers {script_args.early_exit_layers}: the target has {layers}, so 1 to {layers - 1}"
            )


def missing_stages(script_args: SpeculativeArguments, model_args: Any) -> dict[str, tuple]:
    """The stages that make the world's target and draft, in order, each with its parsed flags."""
    import distill
    import sft

    if model_args.model_name_or_path:
        return {}
    folder = script_args.output_dir
    stages = sft.world_model_stages(script_args, script_args.seed, folder)
    if script_args.draft != "model" or script_args.assistant_model_name_or_path:
        return stages
    flags = ["--seed", str(script_args.seed), "--world_seed", str(script_args.world_seed)]
    flags += ["--output_dir", f"{folder}/draft", "--teacher_model_name_or_path", f"{folder}/sft"]
    flags += ["--config", script_args.draft_config or str(DRAFT_CONFIG)]
    return {**stages, "draft": distill.parse(flags)}


def run_missing_stages(script_args: Any, model_args: Any, stages: dict[str, tuple]) -> tuple[Any, Any]:
    """Run or reuse the stages. Returns the arguments with the models that they made."""
    from hfllm.runs.chain import run_stages

    recipes = {"draft": "distill"}
    run_stages([import_module(recipes.get(name, name)) for name in stages], [*stages.values()])
    if "sft" in stages:
        model_args = replace(model_args, model_name_or_path=stages["sft"][1].output_dir)
    if "draft" in stages:
        script_args = replace(script_args, assistant_model_name_or_path=stages["draft"][1].output_dir)
    return script_args, model_args


def measure(
    script_args: SpeculativeArguments, model_args: Any, rows: list[dict]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics, and speed by lookahead."""
    import torch

    from hfllm.compression.schemes import default_device
    from hfllm.data.tokenizer import tokenize_prompts
    from hfllm.generation.speculative import measure as measuring
    from hfllm.generation.speculative.lookahead import AdaptiveLookahead
    from hfllm.runs.models import load_policy

    model, tokenizer = load_policy(model_args)
    # What is quantized was put where it runs as it was loaded.
    if not getattr(model, "is_quantized", False):
        model.to(default_device())
    model.eval()
    left_out = use_plain_generation(model)
    if left_out:
        print(f"speculative: left out of the model's generation_config.json, on both sides: {left_out}", flush=True)
    draft = make_draft(script_args, model_args, model, tokenizer)
    ids = tokenize_prompts([row["prompt"] for row in rows], tokenizer)
    eos = model.generation_config.eos_token_id
    options = {
        "max_new_tokens": script_args.max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id if eos is None else eos,
        "pad_token_id": tokenizer.pad_token_id,
        "compile": script_args.compile,
    }
    timed = batches(ids[: script_args.num_timed_prompts], script_args.batch_size, tokenizer, model)
    costs = measuring.measure_costs(model, draft, timed[0], compile=script_args.compile)

    def wanted() -> Any:
        asked = script_args.lookahead
        return AdaptiveLookahead(costs.per_draft) if asked == "adaptive" else int(asked)

    share = measuring.identical_share(model, draft, batches(ids, 16, tokenizer, model), lookahead=wanted(), **options)
    names = {str(steps): steps for steps in script_args.lookaheads}
    asked = f"{script_args.lookahead} (asked for)"
    lookaheads = {**names, asked: wanted()}
    seconds, speeds = measuring.speed_by_lookahead(
        model, draft, timed, lookaheads, costs, script_args.rounds, **options
    )
    sampling = {
        **options,
        **{"do_sample": True, "temperature": script_args.temperature, "top_k": 0},
        **{"lookahead": wanted(), "generator": torch.Generator(model.device).manual_seed(script_args.seed)},
    }
    sampled = measuring.speculative(model, draft, timed, **sampling)[1]
    row = speeds[-1]
    metrics = {
        "acceptance_rate": row["acceptance_rate"],
        "tokens_per_target_call": row["tokens_per_target_call"],
        "speedup": row["speedup"],
        "speedup_predicted": row["predicted"],
        "speedup_predicted_with_verification": row["predicted_with_verification"],
        "speedup_best": max(each["speedup"] for each in speeds),
        "identical_share": share,
        "acceptance_rate_sampled": sampled.acceptance_rate,
        "tokens_per_target_call_sampled": sampled.tokens_per_target_call,
        "draft_cost": costs.draft,
        "verification_cost": costs.verification,
        "break_even_acceptance": costs.per_draft,
        "optimal_lookahead": measuring.best_lookahead(row["acceptance_rate"], costs),
        "tokens_per_second_plain": row["tokens"] / seconds,
        "tokens_per_second": row["tokens"] / row["seconds"],
    }
    return metrics, speeds


def use_plain_generation(model: Any) -> str:
    """Keep the special tokens alone of a checkpoint's generation options. Returns the others, which are gone.

    Its penalties look at the tokens before, which drafts make conditional; its top-p would hide what sampling costs.
    """
    from transformers import GenerationConfig

    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    theirs = model.generation_config.to_diff_dict()
    model.generation_config = GenerationConfig(**{name: theirs.get(name) for name in tokens})
    said = {name: value for name, value in theirs.items() if value and not name.startswith("_")}
    others = sorted(said.keys() - {*tokens, "use_cache", "transformers_version"})
    return ", ".join(f"{name}={said[name]}" for name in others)


def make_draft(script_args: SpeculativeArguments, model_args: Any, model: Any, tokenizer: Any) -> Any:
    """The draft that the flags describe.

    Raises:
        InputError: for a draft model with another tokenizer.
    """
    from hfllm.errors import refuse
    from hfllm.generation.packed.model import unsupported_reason
    from hfllm.generation.packed.projections import has_int8
    from hfllm.generation.speculative.drafts import EarlyExitDraft, Int8Draft, ModelDraft, PromptLookupDraft
    from hfllm.generation.speculative.options import check_same_vocabulary
    from hfllm.runs.models import load_policy

    if script_args.draft == "prompt_lookup":
        return PromptLookupDraft() if script_args.max_ngram is None else PromptLookupDraft(script_args.max_ngram)
    if script_args.draft == "early_exit":
        return EarlyExitDraft(script_args.early_exit_layers)
    if script_args.draft == "int8":
        reason = unsupported_reason(model) or (
            "" if has_int8(model.dtype, model.device) else "it is not in float32 on an x86 CPU"
        )
        refuse(bool(reason), "--draft int8", reason)
        return Int8Draft()
    name = script_args.assistant_model_name_or_path
    assistant, theirs = load_policy(replace(model_args, model_name_or_path=name, model_revision="main"))
    check_same_vocabulary(model, assistant, tokenizer, theirs)
    return ModelDraft(assistant.to(model.device).eval())


def prompt_rows(script_args: SpeculativeArguments) -> list[dict]:
    """The world's held-out questions, or the user's own prompts.

    Raises:
        InputError: when the dataset cannot be read, or has none.
    """
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, world_of
    from hfllm.errors import InputError

    world = world_of(script_args)
    if world:
        return [task.prompt_row() for task in world.evaluation_tasks(script_args.num_prompts)]
    rows = load_rows(script_args, formats.to_prompt)[: script_args.num_prompts]
    if not rows:
        raise InputError(f"--dataset_name {script_args.dataset_name} has no prompts")
    return rows


def batches(ids: list[list[int]], size: int, tokenizer: Any, model: Any) -> list[Any]:
    """Left-padded batches of `size` prompts on the model's device."""
    return [
        tokenizer.pad({"input_ids": ids[at : at + size]}, padding_side="left", return_tensors="pt").to(model.device)
        for at in range(0, len(ids), size)
    ]


def speed_plot(rows: list[dict[str, Any]]) -> Any:
    """Measured and predicted speed by the number of drafted tokens."""
    from hfllm.outputs.report import Plot

    numbered = [row for row in rows if row["lookahead"].isdecimal()]
    labels = {
        "measured": "speedup",
        "predicted (Leviathan et al.)": "predicted",
        "predicted, verification included": "predicted_with_verification",
    }
    steps = [int(row["lookahead"]) for row in numbered]
    return Plot(
        title="speculative: speed by lookahead",
        xlabel="drafted tokens",
        ylabel="times plain decoding",
        lines={label: (steps, [row[column] for row in numbered]) for label, column in labels.items()},
    )


def next_steps(script_args: SpeculativeArguments, model_args: Any) -> list[str]:
    """The lines that decode so in code of one's own."""
    name = script_args.assistant_model_name_or_path
    draft = {
        "model": f"ModelDraft(AutoModelForCausalLM.from_pretrained({name!r}))",
        "prompt_lookup": f"PromptLookupDraft({script_args.max_ngram or 3})",
        "early_exit": f"EarlyExitDraft({script_args.early_exit_layers})",
        "int8": "Int8Draft()",
    }[script_args.draft]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "import hfllm",
        f"from hfllm.generation.speculative.drafts import {draft.partition('(')[0]}",
        "from hfllm.generation.speculative.speculative import speculative_generate",
        f"tokenizer = AutoTokenizer.from_pretrained({model_args.model_name_or_path!r})",
        f"model = AutoModelForCausalLM.from_pretrained({model_args.model_name_or_path!r})",
        f"draft = {draft}",
        "output = speculative_generate(model, draft, **tokenizer('...', return_tensors='pt'), max_new_tokens=64)",
    ]


if __name__ == "__main__":
    run(main, parse)
