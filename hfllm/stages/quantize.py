"""Quantization: its flags and checks, the stages before it, and the comparison, also on images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.images.rows import (
    OF_PICTURES,
    PictureArguments,
    by_turns,
    picture_mapper,
    words_of_places,
)
from hfllm.data.loading import DataArguments, RowArguments
from hfllm.data.sources import DIGITS, PICTURES, WORLD
from hfllm.errors import InputError, refuse
from hfllm.flags import ALWAYS, NAMED, SEED, Fact, Refused, at_least, check_flags, flag
from hfllm.outputs.report import Bars
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Chain, chain_before

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import ModelConfig

    from hfllm.compression.schemes import Scheme
    from hfllm.compression.sensitivity import PartRow
    from hfllm.evaluation.before_after import PictureQuantization, QuantizationEvaluation, SchemeRow
    from hfllm.evaluation.pictures import Asked


# ---- flags ----


# Flags of ModelConfig to quantize a model while loading it.
LOADING = (
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)
SHOWN_PARTS = 30


@dataclass(frozen=True)
class QuantizeArguments(DataArguments, RemoteCodeArguments, PictureArguments):
    """The schemes, the texts or pictures that they are evaluated on, and how."""

    output_dir: str = flag("outputs/quantize", "Where the model and the report go.")
    seed: int = flag(42, "Seed of the texts of the world, and of its models.", takes=SEED)
    schemes: list[str] | None = flag(None, "Schemes to compare; by default all that run on this machine.")
    save_scheme: str = flag("int8", "Scheme to save, which the metrics describe.")
    skip_modules: list[str] | None = flag(
        None, "Linear layers not to quantize: ends or beginnings of their names, such as v_proj."
    )
    llm_int8_threshold: float = flag(
        6.0,
        "Magnitude from which int8 multiplies a feature of the input in floating point; 0 means never. "
        "A lower value takes more time and loses less accuracy.",
    )
    num_eval_texts: int = flag(
        256,
        "Texts for the perplexity, at most this many; of a model that sees, answers for the loss.",
        takes=at_least(1),
    )
    max_length: int = flag(512, "Tokens per window for the perplexity.", takes=at_least(2))
    num_eval_prompts: int = flag(
        600,
        "Questions of the world for the gold reward; of a model that sees, those about pictures.",
        takes=at_least(1),
    )
    response_length: int = flag(40, "Longest answer to them, in tokens.", takes=at_least(1))
    sensitivity: list[str] = flag(
        ("layer", "kind"),
        "Parts to quantize one at a time: each linear, layer or kind of layer; or none.",
    )
    num_sensitivity_texts: int = flag(
        32, "Texts to measure the loss with each such part quantized.", takes=at_least(1)
    )
    prompt_tokens: int = flag(128, "Tokens of each of the four timed prompts.", takes=at_least(1))
    new_tokens: int = flag(32, "Tokens to generate when timed.", takes=at_least(1))
    rounds: int = flag(5, "Repetitions of the timing; the median is reported, 0 means no timing.", takes=at_least(0))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.", never=NAMED)
    sft_config: str | None = flag(None, "YAML flags of the fine-tuning stage.", never=NAMED)
    push_to_hub: bool = flag(False, "Publish the saved model at the end.")
    hub_model_id: str | None = flag(None, "Where: owner/name or name; by default the output folder's name.")
    hub_private_repo: bool | None = flag(None, "Whether a new repository is private.")
    hub_revision: str | None = flag(None, "Branch to publish on; created if missing.")
    hub_token: str | None = flag(None, "Access token; better HF_TOKEN or hf auth login.")

    refused: ClassVar[Refused] = {
        "use_peft": ALWAYS.because("nothing is trained; adapters go onto the saved model"),
        **dict.fromkeys(OF_PICTURES, Fact(lambda flags: flags.sees is False, "the model reads text alone")),
        **dict.fromkeys(LOADING, ALWAYS.because("--schemes says how to quantize")),
    }


# ---- what is refused ----


def check(script_args: QuantizeArguments, model_args: "ModelConfig") -> None:
    """Refuse flags without effect or meaning, and schemes that cannot run here."""
    from hfllm.compression.int8 import OUTLIER_THRESHOLD
    from hfllm.compression.sensitivity import PARTS

    check_flags(script_args, model_args)
    for word in script_args.sensitivity:
        if word not in PARTS and script_args.sensitivity != ["none"]:
            raise InputError(f"--sensitivity {word!r}: expected some of {', '.join(PARTS)}, or none")
    schemes = schemes_to_compare(script_args)
    is_idle = "int8" not in schemes and script_args.llm_int8_threshold != OUTLIER_THRESHOLD
    refuse(is_idle, "--llm_int8_threshold", "no scheme is int8")
    for name in schemes:
        scheme_of(script_args, name).check()


def check_model(script_args: QuantizeArguments, model_args: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse flags incompatible with the model, whether named or not yet trained.

    Args:
        config: of this model.
    """
    from hfllm.models.loading.saved import empty_model, is_for_pictures, max_length_of, refuse_quantized

    reads_pictures = is_for_pictures(config)
    check_flags(script_args, model_args, sees=reads_pictures)
    if not reads_pictures and script_args.dataset_name in (PICTURES, DIGITS):
        raise InputError(f"--dataset_name {script_args.dataset_name}: the model reads text alone")
    if model_args.model_name_or_path:
        refuse_quantized(config, model_args.model_name_or_path)
    context, timed = max_length_of(config), script_args.prompt_tokens + script_args.new_tokens
    if script_args.rounds and context is not None and timed > context:
        raise InputError(
            f"--prompt_tokens {script_args.prompt_tokens} and --new_tokens {script_args.new_tokens} are {timed} "
            f"tokens, the model's context is {context}: choose fewer, or --rounds 0 for no timing"
        )
    model = empty_model(config, "IMAGE_TEXT" if reads_pictures else "CAUSAL_LM")
    for name in schemes_to_compare(script_args):
        scheme_of(script_args, name).left(model)


# ---- the stages before, the schemes and the texts ----


def stages_before(script_args: QuantizeArguments, model_args: "ModelConfig") -> Chain:
    """Return the pretraining and the fine-tuning of the model, if none is named."""
    return chain_before(
        "quantize",
        script_args.output_dir,
        script_args.seed,
        script_args.world_seed,
        given_models={"sft": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config, "sft": script_args.sft_config},
    )


def schemes_to_compare(script_args: QuantizeArguments) -> list[str]:
    """Return the distinct names of the schemes, including the saved one."""
    from hfllm.compression.schemes import SCHEMES, default_device

    names = list(dict.fromkeys(script_args.schemes or ()))
    if not names:
        names = [name for name, scheme in SCHEMES.items() if default_device() in scheme.devices]
    return names if script_args.save_scheme in names else [*names, script_args.save_scheme]


def scheme_of(script_args: QuantizeArguments, name: str) -> "Scheme":
    """Return the scheme called `name` with the settings of the flags."""
    from hfllm.compression.schemes import get_scheme

    return get_scheme(name, script_args.skip_modules or (), script_args.llm_int8_threshold)


def eval_texts(script_args: QuantizeArguments) -> list[str]:
    """Return held-out documents of the world, or the user's texts."""
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, world_of

    world = world_of(script_args)
    if world is not None:
        texts = world.documents(script_args.num_eval_texts, seed=-1 - script_args.seed)
    else:
        texts = [text for text in load_rows(script_args, formats.to_text) if text.strip()]
    if not texts:
        raise InputError(f"--dataset_name {script_args.dataset_name} has no text")
    return texts[: script_args.num_eval_texts]


# ---- the comparison ----


def make_evaluation(
    script_args: QuantizeArguments,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
) -> "QuantizationEvaluation":
    """Return the evaluation of the model and its quantized forms."""
    from hfllm.data.loading import world_of
    from hfllm.evaluation.before_after import QuantizationEvaluation
    from hfllm.runs.models import fitting_length

    return QuantizationEvaluation(
        tokenizer,
        texts,
        fitting_length(script_args.max_length, model),
        world=world_of(script_args),
        num_eval_prompts=script_args.num_eval_prompts,
        response_length=script_args.response_length,
        timing={"prompt_tokens": script_args.prompt_tokens, "new_tokens": script_args.new_tokens},
        rounds=script_args.rounds,
    )


def compare_schemes(
    script_args: QuantizeArguments,
    model_args: "ModelConfig",
    model: "PreTrainedModel",
    evaluation: "QuantizationEvaluation",
) -> "tuple[list[SchemeRow], float]":
    """Evaluate the model and its quantized forms, and save the requested one in the output folder.

    Args:
        model_args: with the model's name, and how to load it.
        model: in full precision.

    Returns:
        One row for the model and one per scheme, and the largest difference of logits between the saved model
        and the same model loaded again.
    """
    from hfllm.compression.schemes import linear_names
    from hfllm.runs.models import load_kwargs

    names = linear_names(model)
    rows, difference = [evaluation.original(model, names)], 0.0
    for name in schemes_to_compare(script_args):
        print(f"quantize: {name}", flush=True)
        quantized = scheme_of(script_args, name).load(model_args.model_name_or_path, **load_kwargs(model_args))
        is_saved = name == script_args.save_scheme
        if is_saved:
            # Save before it runs: bitsandbytes then changes the layout of 4-bit weights for some CPUs.
            quantized.save_pretrained(script_args.output_dir)
            evaluation.save_reader(script_args.output_dir)
        rows.append(evaluation.quantized(name, quantized, model, names))
        if is_saved:
            difference = evaluation.difference_after_reload(quantized, script_args.output_dir)
        del quantized
    return rows, difference


def sensitivity_by_part(
    script_args: QuantizeArguments, model: "PreTrainedModel", evaluation: "QuantizationEvaluation"
) -> "dict[str, list[PartRow]]":
    """Return the change of loss from quantizing each part of the model, for every way to divide it."""
    from hfllm.compression.sensitivity import sensitivity

    if script_args.sensitivity == ["none"]:
        return {}
    print("quantize: sensitivity", flush=True)

    def loss_of(model: "PreTrainedModel") -> float:
        return evaluation.loss(model, script_args.num_sensitivity_texts)

    scheme = scheme_of(script_args, script_args.save_scheme)
    return {by: sensitivity(model, scheme, loss_of, by) for by in script_args.sensitivity}


# ---- the report ----


def quantization_metrics(rows: "Sequence[SchemeRow]", save_scheme: str) -> dict[str, float]:
    """Return the report's metrics, of the original and of the saved scheme."""
    original, saved = rows[0], next(row for row in rows if row["scheme"] == save_scheme)
    metrics = {
        f"{name}_{when}": row[name]
        for name in ("bytes", "perplexity", "gold_reward", "loss", "right")
        if name in original
        for when, row in (("before", original), ("after", saved))
    }
    metrics |= {"linear_bytes_share": saved["linear_share"], "agreement": saved["agreement"]}
    return metrics | {name: saved[name] for name in ("prefill_speedup", "decode_speedup") if name in saved}


def quantization_tables(
    rows: "list[SchemeRow]", swept: "Mapping[str, list[PartRow]]"
) -> "dict[str, list[SchemeRow] | list[PartRow]]":
    """Return the report's tables: the schemes, and the parts of the model."""
    return {"Schemes": rows, **{f"Change of loss by {by}": parts for by, parts in swept.items()}}


def sensitivity_bars(swept: "Mapping[str, list[PartRow]]") -> dict[str, Bars]:
    """Return the plots of the worst parts, for every way to divide the model."""
    from hfllm.compression.sensitivity import changes_by_part

    changes = {by: changes_by_part(parts[:SHOWN_PARTS]) for by, parts in swept.items()}
    return {
        f"sensitivity_{by}": Bars(
            title=f"quantize: change of loss with only one {by} quantized",
            xlabel="change of loss (nats per token)",
            values=values,
            notes={part: f"{change:+.2g}" for part, change in values.items()},
        )
        for by, values in changes.items()
    }


# ---- pictures ----
#
# Quantization of vision-language models: the questions about images for the comparison of their forms.


STAGE = "hfllm quantize"


def sees(model_args: "ModelConfig") -> bool:
    """Return whether the flags name a vision-language model."""
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config

    name = model_args.model_name_or_path
    return bool(name) and is_for_pictures(load_config(name, model_args.model_revision))


def picture_schemes(script_args: QuantizeArguments) -> list[str]:
    """Return the names of the schemes as `schemes_to_compare` does, without the schemes that read images wrongly.

    bitsandbytes' 4-bit kernel for CPUs treats its input as contiguous. SigLIP's output for the projector may not be:
    patches are the columns of a convolution's output, and sums keep this layout.
    """
    from hfllm.compression.schemes import NF4_CPU_MULTIPLES, SCHEMES, default_device

    names = schemes_to_compare(script_args)
    if default_device() != "cpu":
        return names
    wrong = [name for name, scheme in SCHEMES.items() if scheme.cpu_multiples == NF4_CPU_MULTIPLES]
    for name in wrong:
        if name in (*(script_args.schemes or ()), script_args.save_scheme):
            raise InputError(
                f"scheme {name!r}: on a CPU bitsandbytes' 4-bit kernel reads pictures wrongly; for a model that sees: "
                f"{', '.join(each for each in SCHEMES if each not in wrong)}"
            )
    return [name for name in names if name not in wrong]


def check_pictures(script_args: QuantizeArguments, name: str) -> None:
    """Refuse flags incompatible with a vision-language model.

    Args:
        name: the model's.
    """
    if script_args.dataset_name == WORLD:
        raise InputError(
            f"--model_name_or_path {name}: it sees, and --dataset_name world is of texts: name rows with pictures, "
            f"or {PICTURES} or {DIGITS}, which are drawn here"
        )
    is_given = script_args.max_length != type(script_args).max_length
    refuse(is_given, "--max_length", "rows with pictures are not cut")


def questions_of(script_args: QuantizeArguments, processor: "ProcessorMixin") -> "list[Asked]":
    """Return questions about images with their answers: drawn ones, or the first of each of the user's rows."""
    from hfllm.data.formats import to_sft
    from hfllm.data.images.rows import flaw_of_pictures
    from hfllm.stages.shared import kept_rows
    from hfllm.stages.vision.build import SHUFFLED, eval_parts, question_of
    from hfllm.stages.vision.flags import DRAWN

    name, count = script_args.dataset_name, script_args.num_eval_prompts
    if name in DRAWN:
        parts = eval_parts(name, max(count, 2))
        selected = [questions for part, questions in parts.items() if part != SHUFFLED]
        # Equally many of each kind, in turns: seen in training, and unseen.
        return [question for turn in zip(*selected, strict=True) for question in turn][:count]
    read = RowArguments(**{each.name: getattr(script_args, each.name) for each in fields(DataArguments)})
    mapper = picture_mapper(script_args, name, to_sft, STAGE, words_of_places(processor))
    rows = kept_rows(read, mapper, flaw_of_pictures, most=count)
    return [question_of(by_turns(row)[0]) for row in rows]


def load(model_args: "ModelConfig") -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return the model in full precision and its processor."""
    from hfllm.data.tokenizer import padding_token
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.models import load_seeing
    from hfllm.stages.shared import load_processor

    processor = load_processor(model_args.model_name_or_path, model_args.model_revision)
    check_template(processor, model_args.model_name_or_path)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = padding_token(processor.tokenizer)
    return load_seeing(model_args), processor


def picture_evaluation(
    script_args: QuantizeArguments, processor: "ProcessorMixin", questions: "Sequence[Asked]"
) -> "PictureQuantization":
    """Return the evaluation of the model and its quantized forms on images."""
    from hfllm.evaluation.before_after import PictureQuantization

    return PictureQuantization(
        processor.tokenizer,
        texts=(),
        max_length=0,
        response_length=script_args.response_length,
        timing={"prompt_tokens": script_args.prompt_tokens, "new_tokens": script_args.new_tokens},
        rounds=script_args.rounds,
        processor=processor,
        questions=questions,
        num_losses=script_args.num_eval_texts,
    )
