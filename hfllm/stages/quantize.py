"""Quantization: its flags and checks, and the comparison of schemes, on texts or images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.images.rows import (
    OF_PICTURES,
    ImageReading,
    PictureArguments,
    by_turns,
    picture_mapper,
    words_of_places,
)
from hfllm.data.loading import DataArguments, RowSource
from hfllm.data.sources import DIGITS, PICTURES, WORLD
from hfllm.errors import InputError, refuse_if
from hfllm.flags import ALWAYS, NAMED, NO_NAME, SEED, WORLD_GROUP, Clashes, Fact, Refused, at_least, check_flags, flag
from hfllm.outputs.report import Bars
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from trl import ModelConfig

    from hfllm.compression.schemes import PartRow, Scheme
    from hfllm.data.world.world import World
    from hfllm.evaluation.before_after import QuantizationEvaluation, SchemeRow
    from hfllm.evaluation.pictures import Asked
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.runs.models import NamedModel


# ---- flags ----


# Flags of ModelConfig to quantize a model while loading it.
LOADING = (
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)
# The parts of a model to quantize one at a time, as in hfllm.compression.schemes, which is slow to import.
PARTS = ("linear", "layer", "kind")
PLOTTED_PARTS = 30
READS_TEXT = Fact(lambda flags: flags.sees is False, "the model reads text alone")


@dataclass(frozen=True)
class MeasureSettings:
    """How a model and its quantized forms are measured: the flags of these names."""

    num_eval_texts: int
    max_length: int
    num_eval_prompts: int
    response_length: int
    prompt_tokens: int
    new_tokens: int
    rounds: int


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
        never=Fact(lambda flags: "int8" not in scheme_names(flags.schemes, flags.save_scheme), "no scheme is int8"),
    )
    num_eval_texts: int = flag(
        256,
        "Texts for the perplexity, at most this many; of a vision-language model, answers for the loss.",
        takes=at_least(1),
    )
    max_length: int = flag(
        512,
        "Tokens per window for the perplexity.",
        takes=at_least(2),
        never=Fact(lambda flags: flags.sees, "rows with pictures are not cut"),
    )
    num_eval_prompts: int = flag(
        600,
        "Questions of the world for the gold reward; of a vision-language model, those about pictures.",
        takes=at_least(1),
    )
    response_length: int = flag(40, "Longest answer to them, in tokens.", takes=at_least(1))
    sensitivity: list[str] = flag(
        ("layer", "kind"),
        "Parts to quantize one at a time: each linear, layer or kind of layer; or none.",
        some_of=PARTS,
    )
    num_sensitivity_texts: int = flag(
        32, "Texts to measure the loss with each such part quantized.", takes=at_least(1)
    )
    prompt_tokens: int = flag(128, "Tokens of each of the four timed prompts.", takes=at_least(1))
    new_tokens: int = flag(32, "Tokens to generate when timed.", takes=at_least(1))
    rounds: int = flag(5, "Repetitions of the timing; the median is reported, 0 means no timing.", takes=at_least(0))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.", never=NAMED, group=WORLD_GROUP)
    sft_config: str | None = flag(None, "YAML flags of the fine-tuning stage.", never=NAMED, group=WORLD_GROUP)
    push_to_hub: bool = flag(False, "Publish the saved model at the end.")
    hub_model_id: str | None = flag(None, "Where: owner/name or name; by default the output folder's name.")
    hub_private_repo: bool | None = flag(None, "Whether a new repository is private.")
    hub_revision: str | None = flag(None, "Branch to publish on; created if missing.")
    hub_token: str | None = flag(None, "Access token; better HF_TOKEN or hf auth login.")

    refused: ClassVar[Refused] = {
        "use_peft": ALWAYS.because("nothing is trained; adapters go onto the saved model"),
        **dict.fromkeys(OF_PICTURES, READS_TEXT),
        **dict.fromkeys(LOADING, ALWAYS.because("--schemes says how to quantize")),
    }
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path {model_name_or_path}: it sees, and --dataset_name world is of texts: name rows with "
        f"pictures, or {PICTURES} or {DIGITS}, which are drawn here": lambda flags: (
            flags.sees and flags.dataset_name == WORLD
        ),
        f"--dataset_name {{dataset_name}}: {READS_TEXT.reason}": lambda flags: (
            READS_TEXT.holds(flags) and flags.dataset_name in (PICTURES, DIGITS)
        ),
    }

    @property
    def of_measures(self) -> MeasureSettings:
        """How the model and its quantized forms are measured."""
        return MeasureSettings(**{item.name: getattr(self, item.name) for item in fields(MeasureSettings)})

    def scheme(self, name: str) -> "Scheme":
        """Return the scheme called `name`, with the layers to skip and the threshold."""
        from hfllm.compression.schemes import get_scheme

        return get_scheme(name, self.skip_modules or (), self.llm_int8_threshold)


# ---- what is refused ----


def check(script_args: QuantizeArguments, model_args: "ModelConfig") -> None:
    """Refuse flags without effect or meaning, and schemes that cannot run here."""
    check_flags(script_args, model_args)
    for name in scheme_names(script_args.schemes, script_args.save_scheme):
        script_args.scheme(name).check()


def check_model(script_args: QuantizeArguments, model_args: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse flags incompatible with the model, whether named or not yet trained.

    Args:
        script_args: with the schemes to compare.
        config: of this model.
    """
    from hfllm.models.loading.saved import empty_model, is_for_pictures, max_length_of, refuse_quantized

    name, reads_pictures = model_args.model_name_or_path, is_for_pictures(config)
    check_flags(script_args, model_args, sees=reads_pictures)
    if name:
        refuse_quantized(config, name)
    prompt, new, context = script_args.prompt_tokens, script_args.new_tokens, max_length_of(config)
    if script_args.rounds and context is not None and prompt + new > context:
        raise InputError(
            f"--prompt_tokens {prompt} and --new_tokens {new} are {prompt + new} tokens, the model's context is "
            f"{context}: choose fewer, or --rounds 0 for no timing"
        )
    model = empty_model(config, "IMAGE_TEXT" if reads_pictures else "CAUSAL_LM")
    for scheme in script_args.schemes:
        script_args.scheme(scheme).left(model)


# ---- the schemes, and what they are compared on ----


def sees(name: str | None, revision: str) -> bool:
    """Return whether a vision-language model is named."""
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config

    return bool(name) and is_for_pictures(load_config(name, revision))


def scheme_names(schemes: Sequence[str] | None, save_scheme: str) -> list[str]:
    """Return the distinct names of the schemes, by default all that run here, including the saved one."""
    from hfllm.compression.schemes import SCHEMES, default_device

    names = list(dict.fromkeys(schemes or ()))
    if not names:
        names = [name for name, scheme in SCHEMES.items() if default_device() in scheme.devices]
    return names if save_scheme in names else [*names, save_scheme]


def picture_schemes(schemes: Sequence[str] | None, save_scheme: str) -> list[str]:
    """Return the names of the schemes as `scheme_names` does, without the schemes that read images wrongly.

    bitsandbytes' 4-bit kernel for CPUs treats its input as contiguous. SigLIP's output for the projector may not be:
    patches are the columns of a convolution's output, and sums keep this layout.
    """
    from hfllm.compression.schemes import NF4_CPU_MULTIPLES, SCHEMES, default_device

    names = scheme_names(schemes, save_scheme)
    if default_device() != "cpu":
        return names
    wrong = [name for name, scheme in SCHEMES.items() if scheme.cpu_multiples == NF4_CPU_MULTIPLES]
    for name in wrong:
        if name in (*(schemes or ()), save_scheme):
            raise InputError(
                f"scheme {name!r}: on a CPU bitsandbytes' 4-bit kernel reads pictures wrongly; for a model that sees: "
                f"{', '.join(each for each in SCHEMES if each not in wrong)}"
            )
    return [name for name in names if name not in wrong]


def eval_texts(source: DataArguments, count: int, seed: int) -> list[str]:
    """Return at most `count` texts: held-out documents of the world, by `seed`, or the user's."""
    from hfllm.data import formats
    from hfllm.data.loading import load_rows

    world = source.world
    if world is not None:
        return world.documents(count, seed=-1 - seed)
    texts = [text for text in load_rows(source.row_source, formats.to_text) if text.strip()]
    refuse_if(not texts, f"--dataset_name {source.dataset_name} has no text")
    return texts[:count]


def questions_of(source: RowSource, reading: ImageReading, count: int, processor: "ProcessorMixin") -> "list[Asked]":
    """Return questions about images with their answers: drawn ones, or the first of each of the user's rows.

    Args:
        source: the user's rows, or drawn ones by their name.
        reading: of the user's images.
        count: of the questions, at most.
    """
    from hfllm.data.formats import to_sft
    from hfllm.data.images.rows import flaw_of_pictures
    from hfllm.stages.shared import kept_rows
    from hfllm.stages.vision.build import SHUFFLED, eval_parts, question_of
    from hfllm.stages.vision.flags import DRAWN

    name = source.name
    if name in DRAWN:
        parts = eval_parts(name, max(count, 2))
        selected = [questions for part, questions in parts.items() if part != SHUFFLED]
        # Equally many of each kind, in turns: seen in training, and unseen.
        return [question for turn in zip(*selected, strict=True) for question in turn][:count]
    mapper = picture_mapper(name, replace(reading, tokens=words_of_places(processor)), to_sft, "hfllm quantize")
    rows = kept_rows(source, mapper, flaw_of_pictures, most=count)
    return [question_of(by_turns(row)[0]) for row in rows]


# ---- the comparison ----


def load_whole(model: "NamedModel") -> "tuple[PreTrainedModel, ProcessingClass]":
    """Return a model in full precision, and its tokenizer or processor."""
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.models import load_policy, load_seeing
    from hfllm.stages.shared import load_processing_class

    if not sees(model.name, model.revision):
        return load_policy(model)
    processor = load_processing_class(model.name, model.revision)
    check_template(processor, model.name)
    return load_seeing(model), processor


def make_evaluation(
    measures: MeasureSettings,
    world: "World | None",
    model: "PreTrainedModel",
    processing_class: "ProcessingClass",
    rows: "Sequence[str] | Sequence[Asked]",
) -> "QuantizationEvaluation":
    """Return the evaluation of the model and its quantized forms, on texts or on questions about images.

    Args:
        world: the embedded one, if the texts are its own.
    """
    from hfllm.evaluation.before_after import PictureQuantization, QuantizationEvaluation
    from hfllm.runs.models import fitting_length

    settings = {
        "response_length": measures.response_length,
        "timing": {"prompt_tokens": measures.prompt_tokens, "new_tokens": measures.new_tokens},
        "rounds": measures.rounds,
    }
    if hasattr(processing_class, "image_processor"):
        of_pictures = {"questions": rows, "num_losses": measures.num_eval_texts}
        return PictureQuantization(
            processing_class.tokenizer, (), 0, processor=processing_class, **of_pictures, **settings
        )
    length = fitting_length(measures.max_length, model)
    return QuantizationEvaluation(processing_class, rows, length, world, measures.num_eval_prompts, **settings)


def compare_schemes(
    schemes: "Sequence[Scheme]",
    save_scheme: str,
    load: "Callable[[Scheme], PreTrainedModel]",
    model: "PreTrainedModel",
    evaluation: "QuantizationEvaluation",
    output_dir: str,
) -> "tuple[list[SchemeRow], float]":
    """Evaluate the model and its quantized forms, and save the requested one in the output folder.

    Args:
        schemes: of these forms.
        save_scheme: the name of the saved one.
        load: loads the model in a scheme.
        model: in full precision.

    Returns:
        One row for the model and one per scheme, and the largest difference of logits between the saved model
        and the same model loaded again.
    """
    from hfllm.compression.schemes import linear_names

    names = linear_names(model)
    rows, difference = [evaluation.original(model, names)], 0.0
    for scheme in schemes:
        print(f"quantize: {scheme.name}", flush=True)
        quantized, is_saved = load(scheme), scheme.name == save_scheme
        if is_saved:
            # Save before it runs: bitsandbytes then changes the layout of 4-bit weights for some CPUs.
            quantized.save_pretrained(output_dir)
            evaluation.save_reader(output_dir)
        rows.append(evaluation.quantized(scheme.name, quantized, model, names))
        if is_saved:
            difference = evaluation.difference_after_reload(quantized, output_dir)
        del quantized
    return rows, difference


def sensitivity_by_part(
    parts: Sequence[str],
    scheme: "Scheme",
    model: "PreTrainedModel",
    evaluation: "QuantizationEvaluation",
    num_texts: int,
) -> "dict[str, list[PartRow]]":
    """Return the change of loss from quantizing each part of the model, for every way to divide it.

    Args:
        parts: these ways, or none alone.
        num_texts: texts for the loss.
    """
    from hfllm.compression.schemes import sensitivity

    if list(parts) == [NO_NAME]:
        return {}
    print("quantize: sensitivity", flush=True)

    def loss_of(model: "PreTrainedModel") -> float:
        return evaluation.loss(model, num_texts)

    return {by: sensitivity(model, scheme, loss_of, by) for by in parts}


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


def quantization_summary(metrics: Mapping[str, float], save_scheme: str) -> str:
    """Return what the saved scheme saves, in a sentence."""
    parts = [f"{metrics['bytes_after'] / metrics['bytes_before']:.2f} of the bytes"]
    if "decode_speedup" in metrics:
        parts.append(f"{metrics['decode_speedup']:.2f} times the speed of decoding")
    return f"{save_scheme}: {', '.join(parts)}, the same greedy token in {metrics['agreement']:.3f} of all positions"


def quantization_tables(
    rows: "list[SchemeRow]", swept: "Mapping[str, list[PartRow]]"
) -> "dict[str, list[SchemeRow] | list[PartRow]]":
    """Return the report's tables: the schemes, and the parts of the model."""
    return {"Schemes": rows, **{f"Change of loss by {by}": parts for by, parts in swept.items()}}


def sensitivity_bars(swept: "Mapping[str, list[PartRow]]") -> dict[str, Bars]:
    """Return the plots of the worst parts, for every way to divide the model."""
    from hfllm.compression.schemes import changes_by_part

    changes = {by: changes_by_part(parts[:PLOTTED_PARTS]) for by, parts in swept.items()}
    return {
        f"sensitivity_{by}": Bars(
            title=f"quantize: change of loss with only one {by} quantized",
            xlabel="change of loss (nats per token)",
            values=values,
            notes={part: f"{change:+.2g}" for part, change in values.items()},
        )
        for by, values in changes.items()
    }
