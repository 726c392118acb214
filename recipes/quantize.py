"""Store a model's linear layers in 8 or 4 bits, and report what that costs and saves.

    accelerate launch recipes/quantize.py                                # the embedded world, from nothing
    accelerate launch recipes/quantize.py --model_name_or_path NAME --dataset_name texts.txt
    accelerate launch recipes/quantize.py --model_name_or_path NAME --schemes int8 nf4 --save_scheme nf4

Schemes are int8 (LLM.int8) and nf4 of bitsandbytes, nf4_double, and dynamic for serving on a CPU. Each is compared
with the model in full precision: bytes, perplexity, gold reward (on the world), greedy tokens, speed. The model in
--save_scheme is saved under the output folder and loaded again; its layers are quantized one by one to see which hurt.
Without `--model_name_or_path` the world's fine-tuned model is made first.
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

# Flags of ModelConfig that say how a model is quantized as it is loaded.
LOADING = (
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


@dataclass
class QuantizeArguments(DataArguments):
    """The schemes, the texts that they are judged on, and how."""

    output_dir: str = field(default="outputs/quantize", metadata={"help": "Where the model and the report go."})
    seed: int = field(default=42, metadata={"help": "Seed of the texts of the world, and of its models."})
    schemes: list[str] | None = field(
        default=None, metadata={"help": "Schemes to compare; by default all that run on this machine."}
    )
    save_scheme: str = field(default="int8", metadata={"help": "Scheme that is saved, and that the metrics are of."})
    skip_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers to leave as they are: ends or beginnings of names, such as v_proj."},
    )
    llm_int8_threshold: float = field(
        default=6.0,
        metadata={
            "help": "Magnitude from which int8 multiplies a feature of the input in floating point; 0 is never. "
            "A lower one costs time and loses less."
        },
    )
    num_eval_texts: int = field(default=256, metadata={"help": "Texts for the perplexity, at most this many."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a window that perplexity is measured in."})
    num_eval_prompts: int = field(default=600, metadata={"help": "Questions of the world for the gold reward."})
    response_length: int = field(default=40, metadata={"help": "Longest answer to them, in tokens."})
    sensitivity: list[str] = field(
        default_factory=lambda: ["layer", "kind"],
        metadata={"help": "Parts that are quantized alone: each linear, layer or kind of layer; or none."},
    )
    num_sensitivity_texts: int = field(default=32, metadata={"help": "Texts for the loss of each such part."})
    prompt_tokens: int = field(default=128, metadata={"help": "Tokens of each of four prompts that are timed."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens that are written when timed."})
    rounds: int = field(default=5, metadata={"help": "Repetitions of the timing; the median counts, 0 is none."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the saved model at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where: owner/name or name; by default the output folder's name."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to publish on; made if missing."})
    hub_token: str | None = field(default=None, metadata={"help": "Access token; better HF_TOKEN or hf auth login."})


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig

    return parse_recipe((QuantizeArguments, ModelConfig), argv, None, __doc__)


def main(script_args: QuantizeArguments, model_args: Any) -> dict[str, float]:
    """Make what is missing, quantize, measure, save, report. Returns the metrics."""
    from rlhf import policy_config
    from sft import world_model_stages

    from hfllm.outputs.card import write_card
    from hfllm.outputs.files import CARD
    from hfllm.outputs.report import Report
    from hfllm.runs.chain import run_stages

    script_args = replace(script_args, schemes=checked_schemes(script_args, model_args))
    began = time.perf_counter()
    stages = {}
    if not model_args.model_name_or_path:
        stages = world_model_stages(script_args, script_args.seed, script_args.output_dir)
    arguments = all_arguments(script_args, model_args, stages)
    report = finished_run(script_args.output_dir, arguments)
    if report is not None:
        if main_process():
            print(f"quantize: already done in {script_args.output_dir} (remove that folder to redo it)")
            publish(script_args)
        return report["metrics"]
    check_model(script_args, policy_config(model_args, stages))
    texts = eval_texts(script_args)
    if main_process() and script_args.push_to_hub:
        # A wrong token or name is found now, and not at the end.
        repository(script_args).create()
    run_stages([import_module(name) for name in stages], [*stages.values()])
    if stages:
        model_args = replace(model_args, model_name_or_path=stages["sft"][1].output_dir)
    if not main_process():
        return {}
    print(f"\n=== quantize -> {script_args.output_dir}", flush=True)
    # Its int8 layers say at each run that they compute in float16, which is LLM.int8's way.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    metrics, tables, curves = compare(script_args, model_args, texts)
    report = Report(
        stage="quantize",
        arguments=arguments,
        metrics=metrics,
        tables=tables,
        curves=curves,
        wall_seconds=time.perf_counter() - began,
        next_steps=next_steps(script_args),
    )
    report.write(script_args.output_dir)
    (Path(script_args.output_dir) / CARD).unlink(missing_ok=True)
    write_card(Path(script_args.output_dir))
    report.print()
    publish(script_args)
    return metrics


def repository(script_args: QuantizeArguments) -> Any:
    """Where `--push_to_hub` publishes to."""
    from hfllm.outputs.hub import Repository

    name = script_args.hub_model_id or Path(script_args.output_dir).absolute().name
    return Repository(name, script_args.hub_private_repo, script_args.hub_token, script_args.hub_revision)


def publish(script_args: QuantizeArguments) -> None:
    """Push the output folder if that was asked for; recipes/push.py does it later.

    Raises:
        InputError: when it fails.
    """
    if script_args.push_to_hub:
        repository(script_args).push(script_args.output_dir)


def checked_schemes(script_args: QuantizeArguments, model_args: Any) -> list[str]:
    """The schemes to compare, after a look at all flags.

    Raises:
        InputError: naming the flag, when one has no effect or no meaning, or a scheme cannot run here.
    """
    from hfllm.compression.schemes import SCHEMES, default_device
    from hfllm.compression.sensitivity import PARTS
    from hfllm.data.sources import WORLD
    from hfllm.errors import InputError, refuse
    from hfllm.runs.stage import refuse_own_input

    refuse_own_input(script_args.output_dir, model_args)
    for flag in ("num_eval_texts", "num_eval_prompts", "response_length", "num_sensitivity_texts", "prompt_tokens"):
        if getattr(script_args, flag) < 1:
            raise InputError(f"--{flag} {getattr(script_args, flag)}: expected at least 1")
    for flag, least in (("max_length", 2), ("new_tokens", 1), ("rounds", 0)):
        if getattr(script_args, flag) < least:
            raise InputError(f"--{flag} {getattr(script_args, flag)}: expected at least {least}")
    for word in script_args.sensitivity:
        if word not in PARTS and script_args.sensitivity != ["none"]:
            raise InputError(f"--sensitivity {word!r}: expected some of {', '.join(PARTS)}, or none")
    refuse(model_args.use_peft, "--use_peft", "nothing is trained; adapters go onto the saved model")
    for flag in LOADING:
        is_given = getattr(model_args, flag) != getattr(type(model_args), flag)
        refuse(is_given, f"--{flag}", "--schemes says how to quantize")
    for flag in ("pretrain_config", "sft_config"):
        is_given = bool(getattr(script_args, flag))
        refuse(is_given and bool(model_args.model_name_or_path), f"--{flag}", "the model is named")
    is_world = script_args.dataset_name == WORLD
    refuse(is_world and script_args.max_samples is not None, "--max_samples", "use --num_eval_texts")
    names = list(dict.fromkeys(script_args.schemes or ()))
    if not names:
        names = [name for name, scheme in SCHEMES.items() if default_device() in scheme.devices]
    names += [script_args.save_scheme] * (script_args.save_scheme not in names)
    refuse("int8" not in names and script_args.llm_int8_threshold != 6.0, "--llm_int8_threshold", "no scheme is int8")
    for name in names:
        scheme_of(script_args, name).check()
    return names


def scheme_of(script_args: QuantizeArguments, name: str) -> Any:
    """The scheme called `name` as the flags have it."""
    from hfllm.compression.schemes import get_scheme

    return get_scheme(name, script_args.skip_modules or (), script_args.llm_int8_threshold)


def all_arguments(script_args: QuantizeArguments, model_args: Any, stages: dict[str, tuple]) -> dict[str, Any]:
    """The flags that decide the result, those of the stages before included.

    Raises:
        InputError: when the named model is quantized already.
    """
    from hfllm.models.stored import refuse_quantized
    from hfllm.runs.models import load_config
    from hfllm.runs.stage import stage_arguments

    if model_args.model_name_or_path:
        name = model_args.model_name_or_path
        refuse_quantized(load_config(name, model_args.model_revision), name)
    return stage_arguments(script_args, model_args, before=stages)


def compare(
    script_args: QuantizeArguments, model_args: Any, texts: list[str]
) -> tuple[dict[str, float], dict[str, list], dict]:
    """Metrics, tables and plots of the model and its quantized forms; the wanted one is saved."""
    from hfllm.compression import schemes
    from hfllm.data.loading import world_of
    from hfllm.evaluation.quantization import QuantizationEvaluation
    from hfllm.runs.models import fitting_length, load_kwargs, load_policy

    model, tokenizer = load_policy(model_args)
    model.to(schemes.default_device()).eval()
    names = schemes.linear_names(model)
    judge = QuantizationEvaluation(
        tokenizer,
        texts,
        fitting_length(script_args.max_length, model),
        world_of(script_args),
        script_args.num_eval_prompts,
        script_args.response_length,
        {"prompt_tokens": script_args.prompt_tokens, "new_tokens": script_args.new_tokens},
        script_args.rounds,
    )
    original = judge.original(model, names)
    rows, saved_row = [original], {}
    for name in script_args.schemes:
        print(f"quantize: {name}", flush=True)
        kwargs = load_kwargs(model_args)
        quantized = scheme_of(script_args, name).load(model_args.model_name_or_path, **kwargs)
        if name == script_args.save_scheme:
            # Before it runs: bitsandbytes lays 4-bit weights out anew for some CPUs then.
            quantized.save_pretrained(script_args.output_dir)
            tokenizer.save_pretrained(script_args.output_dir)
        rows.append(judge.quantized(name, quantized, model, names))
        if name == script_args.save_scheme:
            saved_row = rows[-1]
            difference = judge.difference_after_reload(quantized, script_args.output_dir)
        del quantized
    swept = sweep(script_args, model, judge)
    metrics = {**metrics_of(original, saved_row), "reload_difference": difference}
    tables = {"Schemes": rows, **{f"Change of loss by {by}": part for by, part in swept.items()}}
    return metrics, tables, {f"sensitivity_{by}": sensitivity_bars(by, part) for by, part in swept.items()}


def check_model(script_args: QuantizeArguments, config: Any) -> None:
    """Refuse what does not go with the model, be it named or still to be made: layers to leave, and prompts to time.

    Raises:
        InputError: when a scheme has nothing to quantize, a name of --skip_modules is no layer's, or more tokens are
            to be timed than the model is made for.
    """
    from hfllm.errors import InputError
    from hfllm.models.stored import empty_model
    from hfllm.runs.models import max_length_of

    context, timed = max_length_of(config), script_args.prompt_tokens + script_args.new_tokens
    if script_args.rounds and context is not None and timed > context:
        raise InputError(
            f"--prompt_tokens {script_args.prompt_tokens} and --new_tokens {script_args.new_tokens} are {timed} "
            f"tokens, the model's context is {context}: choose fewer, or --rounds 0 for no timing"
        )
    model = empty_model(config)
    for name in script_args.schemes:
        scheme_of(script_args, name).left(model)


def eval_texts(script_args: QuantizeArguments) -> list[str]:
    """Held-out documents of the world, or the user's texts.

    Raises:
        InputError: when there is none.
    """
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, world_of
    from hfllm.errors import InputError

    world = world_of(script_args)
    texts = (
        world.documents(script_args.num_eval_texts, seed=-1 - script_args.seed)
        if world
        else [text for text in load_rows(script_args, formats.to_text) if text.strip()]
    )
    if not texts:
        raise InputError(f"--dataset_name {script_args.dataset_name} has no text")
    return texts[: script_args.num_eval_texts]


def metrics_of(original: dict[str, Any], saved: dict[str, Any]) -> dict[str, float]:
    """The report's metrics: the original, and the scheme that is saved."""
    both = {"bytes": "bytes", "perplexity": "perplexity", "gold_reward": "gold_reward"}
    metrics = {
        f"{metric}_{when}": row[column]
        for metric, column in both.items()
        if column in original
        for when, row in (("before", original), ("after", saved))
    }
    metrics |= {"linear_bytes_share": saved["linear_share"], "agreement": saved["agreement"]}
    return metrics | {name: saved[name] for name in ("prefill_speedup", "decode_speedup") if name in saved}


def sweep(script_args: QuantizeArguments, model: Any, judge: Any) -> dict[str, list[dict[str, Any]]]:
    """Change of loss by each part of the model, for each way to part it."""
    from hfllm.compression.sensitivity import sensitivity

    if script_args.sensitivity == ["none"]:
        return {}
    print("quantize: sensitivity", flush=True)

    def loss_of(model: Any) -> float:
        return judge.loss(model, script_args.num_sensitivity_texts)

    scheme = scheme_of(script_args, script_args.save_scheme)
    return {by: sensitivity(model, scheme, loss_of, by) for by in script_args.sensitivity}


def sensitivity_bars(by: str, rows: list[dict[str, Any]]) -> Any:
    """The thirty worst parts."""
    from hfllm.compression.sensitivity import changes_by_part
    from hfllm.outputs.report import Bars

    changes = changes_by_part(rows[:30])
    return Bars(
        title=f"quantize: what each {by} costs alone",
        xlabel="change of loss (nats a token)",
        values=changes,
        notes={part: f"{change:+.2g}" for part, change in changes.items()},
    )


def next_steps(script_args: QuantizeArguments) -> list[str]:
    """The lines that load the result."""
    # transformers knows bitsandbytes by itself; our own scheme and family once hfllm is imported.
    return [
        "import hfllm",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({script_args.output_dir!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({script_args.output_dir!r})",
    ]


if __name__ == "__main__":
    run(main, parse)
