"""Speculative decoding: its flags and checks, its target and draft, and its measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import DataArguments
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.flags import ALWAYS, NAMED, POSITIVE, SEED, WORLD_GROUP, Clashes, Fact, Refused, at_least, flag
from hfllm.outputs.figures import with_error
from hfllm.outputs.report import Plot
from hfllm.outputs.verdict import Promise
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.generation.speculative.drafts import Draft, DraftLength
    from hfllm.generation.speculative.measure import Costs, SpeedRow
    from hfllm.generation.speculative.speculative import Statistics
    from hfllm.runs.models import NamedModel
    from hfllm.runs.pipeline import Chain

CLAIMS = [Promise("speed of decoding with drafts", "speedup", 1.0, "without")]


Row = Mapping[str, Any]
NO_DRAFT = (
    "--model_name_or_path {model_name_or_path} needs a draft: --assistant_model_name_or_path SMALLER with the same "
    "tokenizer (hfllm distill --teacher_model_name_or_path {model_name_or_path} makes one), or --draft int8, "
    "prompt_lookup or early_exit"
)
PLAIN_ALONE = "it quantizes plain weights: leave out --load_in_8bit and --load_in_4bit"
# Batch size for the comparison of answers.
COMPARED_BATCH = 16


def _not_drafted_by(draft: str) -> Fact:
    return Fact(lambda flags: flags.draft != draft, f"it is for --draft {draft}")


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured of answers, and how often: the flags of these names."""

    num_draft_tokens: str
    num_draft_tokens_compared: Sequence[int]
    num_timed_prompts: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    rounds: int
    compile: bool
    seed: int


@dataclass(frozen=True)
class SpeculativeArguments(DataArguments, RemoteCodeArguments):
    """The draft, the prompts, and what is measured."""

    output_dir: str = flag("outputs/speculative", "Where the report goes.")
    seed: int = flag(42, "Seed of the samples, and of the world's models.", takes=SEED)
    draft: str = flag(
        "model", "Where draft tokens come from.", choices=["model", "int8", "prompt_lookup", "early_exit"]
    )
    assistant_model_name_or_path: str | None = flag(
        None, "The draft model: smaller, with the target's tokenizer.", never=_not_drafted_by("model")
    )
    early_exit_layers: int | None = flag(
        None,
        "Layers of the target that draft, with --draft early_exit; half by default.",
        never=_not_drafted_by("early_exit"),
    )
    max_ngram: int | None = flag(
        None,
        "Longest sequence that --draft prompt_lookup searches for; by default 3 tokens.",
        never=_not_drafted_by("prompt_lookup"),
    )
    num_draft_tokens: str = flag("adaptive", "Number of draft tokens for the metrics, or 'adaptive'.")
    num_draft_tokens_compared: list[int] = flag((1, 2, 3, 4, 6, 8), "Numbers of draft tokens for the plot.")
    num_prompts: int = flag(300, "Prompts whose greedy answers are compared.", takes=at_least(1))
    num_timed_prompts: int = flag(16, "How many of them are timed.", takes=at_least(1))
    batch_size: int = flag(1, "Prompts answered at a time when timed.", takes=at_least(1))
    max_new_tokens: int = flag(64, "Longest answer, in tokens.", takes=at_least(1))
    temperature: float = flag(1.0, "Temperature of the samples.", takes=POSITIVE)
    rounds: int = flag(6, "Repetitions of each measurement; the median is reported.", takes=at_least(1))
    compile: bool = flag(
        False,
        "Run the models through torch.compile.",
        never=Fact(lambda flags: flags.draft == "int8", "the int8 draft uses packed weights, which are not compiled"),
    )
    pretrain_config: str | None = flag(None, "YAML flags of the target's pretraining.", never=NAMED, group=WORLD_GROUP)
    sft_config: str | None = flag(None, "YAML flags of the target's fine-tuning.", never=NAMED, group=WORLD_GROUP)
    draft_config: str | None = flag(
        None,
        "YAML flags of the distillation that makes the draft model.",
        never=(
            NAMED,
            Fact(lambda flags: flags.assistant_model_name_or_path, "the draft model is named"),
            _not_drafted_by("model"),
        ),
    )

    refused: ClassVar[Refused] = {"use_peft": ALWAYS.because("nothing is trained")}
    clashes: ClassVar[Clashes] = {
        "--num_draft_tokens {num_draft_tokens!r}: expected a number of tokens, or 'adaptive'": lambda flags: (
            not (flags.num_draft_tokens == "adaptive" or flags.num_draft_tokens.isdecimal())
        ),
        "--num_draft_tokens_compared {num_draft_tokens_compared}: expected numbers of at least 1": lambda flags: (
            min(flags.num_draft_tokens_compared, default=0) < 1
        ),
        NO_DRAFT: lambda flags: (
            NAMED.holds(flags) and flags.draft == "model" and not flags.assistant_model_name_or_path
        ),
        "--draft int8 cannot be used here: attn_implementation={attn_implementation!r} is not 'sdpa'": lambda flags: (
            flags.draft == "int8" and flags.attn_implementation not in (None, "sdpa")
        ),
        f"--draft int8 cannot be used here: {PLAIN_ALONE}": lambda flags: (
            flags.draft == "int8" and (flags.load_in_8bit or flags.load_in_4bit)
        ),
    }

    @property
    def of_speed(self) -> SpeedSettings:
        """What is measured, and how."""
        return SpeedSettings(**{item.name: getattr(self, item.name) for item in fields(SpeedSettings)})


# ---- what is refused ----


def check_draft(script_args: SpeculativeArguments, model_args: "ModelConfig", before: "Chain") -> None:
    """Refuse a draft incompatible with the target, whether the target is named or not yet trained."""
    from hfllm.generation.speculative import PromptLookupDraft
    from hfllm.models.loading.weights import check_weight_files
    from hfllm.runs.models import load_config, load_tokenizer
    from hfllm.stages.pretrain.flags import config_to_train

    if script_args.max_ngram is not None:
        PromptLookupDraft(script_args.max_ngram)
    if script_args.assistant_model_name_or_path:
        load_config(script_args.assistant_model_name_or_path)
        check_weight_files(script_args.assistant_model_name_or_path)
        load_tokenizer(script_args.assistant_model_name_or_path)
    exit_layers = script_args.early_exit_layers
    if exit_layers is not None:
        config = config_to_train(model_args.model_name_or_path, model_args.model_revision, before)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if not 0 < exit_layers < layers:
            raise InputError(f"--early_exit_layers {exit_layers}: the target has {layers}, so 1 to {layers - 1}")


# ---- the prompts, the target and the draft ----


def prompt_rows(source: DataArguments, num_prompts: int) -> list[Row]:
    """Return the world's held-out questions, or the first of the user's own prompts."""
    from hfllm.data import formats
    from hfllm.data.images.rows import without_images
    from hfllm.data.loading import load_rows

    world = source.world
    if world is not None:
        return [task.prompt_row() for task in world.evaluation_tasks(num_prompts)]
    rows = load_rows(source.row_source, without_images(formats.to_prompt, "hfllm speculative"))[:num_prompts]
    refuse_if(not rows, f"--dataset_name {source.dataset_name} has no prompts")
    return rows


def prepare_target(model: "PreTrainedModel") -> None:
    """Make a loaded target ready to decode, and print its ignored options."""
    from hfllm.compression.schemes import default_device

    # A quantized model was placed on its device while loading.
    if not getattr(model, "is_quantized", False):
        model.to(default_device())
    model.eval()
    left_out = use_plain_generation(model)
    if left_out:
        print(f"speculative: left out of the model's generation_config.json, on both sides: {left_out}", flush=True)


def use_plain_generation(model: "PreTrainedModel") -> str:
    """Keep only the special tokens of a checkpoint's generation options, and return the names of the removed ones.

    Penalties depend on earlier tokens, possibly draft tokens; top-p would hide the cost of sampling.
    """
    from transformers import GenerationConfig

    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    theirs = model.generation_config.to_diff_dict()
    model.generation_config = GenerationConfig(**{name: theirs.get(name) for name in tokens})
    options = {name: value for name, value in theirs.items() if value and not name.startswith("_")}
    others = sorted(options.keys() - {*tokens, "use_cache", "transformers_version"})
    return ", ".join(f"{name}={options[name]}" for name in others)


@dataclass(frozen=True)
class DraftSource:
    """Where draft tokens come from.

    Args:
        kind: `model`, `int8`, `prompt_lookup` or `early_exit`.
        assistant: the draft model, named or made, and how it is loaded; used only for `model`.
        max_ngram: longest sequence of `prompt_lookup`; by default 3 tokens.
        early_exit_layers: layers of the target for `early_exit`; by default half.
    """

    kind: str
    assistant: "NamedModel"
    max_ngram: int | None = None
    early_exit_layers: int | None = None

    def load(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "Draft":
        """Return the draft for a target."""
        from hfllm.generation.packed.model import has_int8, unsupported_reason
        from hfllm.generation.speculative import EarlyExitDraft, Int8Draft, ModelDraft, PromptLookupDraft
        from hfllm.generation.speculative.acceptance import check_same_vocabulary
        from hfllm.runs.models import load_policy

        if self.kind == "prompt_lookup":
            return PromptLookupDraft() if self.max_ngram is None else PromptLookupDraft(self.max_ngram)
        if self.kind == "early_exit":
            return EarlyExitDraft(self.early_exit_layers)
        if self.kind == "int8":
            without_kernels = "" if has_int8(model.dtype, model.device) else "it is not in float32 on an x86 CPU"
            reason = unsupported_reason(model) or without_kernels
            refuse(bool(reason), "--draft int8", reason)
            return Int8Draft()
        small, its_tokenizer = load_policy(self.assistant)
        check_same_vocabulary(model, small, tokenizer, its_tokenizer)
        return ModelDraft(small.to(model.device).eval())

    @property
    def expression(self) -> str:
        """The Python expression for the same draft in your own code."""
        return {
            "model": f"ModelDraft(AutoModelForCausalLM.from_pretrained({self.assistant.name!r}))",
            "prompt_lookup": f"PromptLookupDraft({self.max_ngram or 3})",
            "early_exit": f"EarlyExitDraft({self.early_exit_layers})",
            "int8": "Int8Draft()",
        }[self.kind]


# ---- what is measured ----


def measure(
    settings: SpeedSettings,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    draft: "Draft",
    rows: Sequence[Row],
) -> "tuple[dict[str, float], list[SpeedRow]]":
    """Return the metrics, and the speed with each number of draft tokens, the requested one last."""
    import torch

    from hfllm.data.tokenizer import tokenize_prompts
    from hfllm.generation.speculative import measure
    from hfllm.generation.speculative.drafts import AdaptiveDraftLength

    ids = tokenize_prompts([row["prompt"] for row in rows], tokenizer)
    eos = model.generation_config.eos_token_id
    options = {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id if eos is None else eos,
        "pad_token_id": tokenizer.pad_token_id,
        "compile": settings.compile,
    }
    timed = batches(ids[: settings.num_timed_prompts], settings.batch_size, tokenizer, model)
    costs = measure.measure_costs(model, draft, timed[0], compile=settings.compile)

    def requested() -> "int | DraftLength":
        # A new one each time, since it adapts to its past inputs.
        number = settings.num_draft_tokens
        return AdaptiveDraftLength(costs.per_draft) if number == "adaptive" else int(number)

    compared = batches(ids, COMPARED_BATCH, tokenizer, model)
    share = measure.identical_share(model, draft, compared, num_draft_tokens=requested(), **options)
    lengths = {str(number): number for number in settings.num_draft_tokens_compared}
    lengths[f"{settings.num_draft_tokens} (asked for)"] = requested()
    seconds, speeds = measure.speed_by_num_draft_tokens(
        model, draft, timed, lengths, costs, settings.rounds, **options
    )
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "num_draft_tokens": requested()}
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    sampled = measure.speculative(model, draft, timed, **options, **sampling, generator=generator)[1]
    return speculation_metrics(share, costs, seconds, speeds, sampled, settings.rounds), speeds


def speculation_metrics(
    share: float, costs: "Costs", seconds: float, speeds: "Sequence[SpeedRow]", sampled: "Statistics", rounds: int
) -> dict[str, float]:
    """Return the report's metrics.

    Args:
        share: of the prompts with exactly the tokens of transformers' `generate`.
        seconds: time of `generate` for the timed prompts.
        speeds: with each number of draft tokens, the requested one last.
        sampled: metrics of the samples.
        rounds: repetitions of each measurement.
    """
    from hfllm.generation.speculative.measure import best_num_draft_tokens

    row = speeds[-1]
    return {
        "acceptance_rate": row["acceptance_rate"],
        "tokens_per_target_call": row["tokens_per_target_call"],
        "speedup": row["speedup"],
        **with_error("speedup", row["speedup_se"], rounds),
        "speedup_predicted": row["predicted"],
        "speedup_predicted_with_verification": row["predicted_with_verification"],
        "speedup_best": max(each["speedup"] for each in speeds),
        "identical_share": share,
        "acceptance_rate_sampled": sampled.acceptance_rate,
        "tokens_per_target_call_sampled": sampled.tokens_per_target_call,
        "draft_cost": costs.draft,
        "verification_cost": costs.verification,
        "break_even_acceptance": costs.per_draft,
        "optimal_num_draft_tokens": best_num_draft_tokens(row["acceptance_rate"], costs),
        "tokens_per_second_plain": row["tokens"] / seconds,
        "tokens_per_second": row["tokens"] / row["seconds"],
    }


def batches(
    ids: Sequence[Sequence[int]], size: int, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel"
) -> "list[BatchEncoding]":
    """Return left-padded batches of `size` prompts on the model's device."""
    return [
        tokenizer.pad({"input_ids": ids[at : at + size]}, padding_side="left", return_tensors="pt").to(model.device)
        for at in range(0, len(ids), size)
    ]


def speed_plot(rows: "Sequence[SpeedRow]") -> Plot:
    """Return measured and predicted speed by the number of draft tokens."""
    numbered = [row for row in rows if row["num_draft_tokens"].isdecimal()]
    labels = {
        "measured": "speedup",
        "predicted (Leviathan et al.)": "predicted",
        "predicted, verification included": "predicted_with_verification",
    }
    numbers = [int(row["num_draft_tokens"]) for row in numbered]
    return Plot(
        title="speculative: speed by the number of draft tokens",
        xlabel="draft tokens",
        ylabel="times plain decoding",
        lines={label: (numbers, [row[column] for row in numbered]) for label, column in labels.items()},
    )
