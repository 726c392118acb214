"""Fine-tuning on instructions: its flags, what it refuses, and its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import FreezingArguments, PictureArguments
from hfllm.data.loading import InstructionArguments
from hfllm.data.sources import PYDOC, source_files
from hfllm.errors import InputError, refuse
from hfllm.flags import flag
from hfllm.runs.recipes import settings_file
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


# ---- retrieval ----


TOP_K, FRACTION = 3, 0.5


@dataclass(frozen=True)
class RetrievalArguments:
    """Passages before the questions of some rows, so that a model learns to answer from what it is given."""

    retrieval_dataset_name: str | None = flag(
        None,
        "Passages that are found for a row's last question and put before it: a folder of saved passages, "
        "or texts, named as --dataset_name, which are cut (docs/grounding.md).",
    )
    # None, and not their values, since without the first flag they mean nothing.
    retrieval_top_k: int | None = flag(None, f"The most passages of a row; {TOP_K} by default.")
    retrieval_min_score: float | None = flag(
        None, "Passages with a lower BM25 score are not put there; by default all are."
    )
    grounded_fraction: float | None = flag(
        None, f"Share of the rows that get passages; the others stay as they are. {FRACTION} by default."
    )


def check_retrieval(script_args: RetrievalArguments) -> None:
    """Refuse flags that have no effect, and passages that are not there.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.word_index import import_bm25s

    name = script_args.retrieval_dataset_name
    for each in ("retrieval_top_k", "retrieval_min_score", "grounded_fraction"):
        refuse(
            name is None and getattr(script_args, each) is not None, f"--{each}", "it needs --retrieval_dataset_name"
        )
    if name is None:
        return
    refuse(script_args.grounded_fraction == 0, "--grounded_fraction 0", "no row gets passages: leave out the flags")
    import_bm25s("--retrieval_dataset_name")
    try:
        _files(name)
    except InputError as error:
        raise InputError(f"--retrieval_dataset_name: {error}") from None


def _files(name: str) -> list[Path]:
    """Return the local files of texts or of saved passages; none of what is not local."""
    from hfllm.grounding.passages import ABOUT, FILE

    if name == PYDOC:
        return []
    saved = [Path(name, file) for file in (FILE, ABOUT)]
    if not saved[0].is_file():
        return source_files(name) or []
    if not saved[1].is_file():
        raise InputError(f"{saved[1]}: missing, beside saved passages: save them again")
    return saved


# ---- sft ----


NO_ROWS = "an adapter has no rows for new tokens: train all weights, or leave the flag out"


@dataclass(frozen=True)
class SftArguments(
    InstructionArguments,
    RetrievalArguments,
    AugmentationArguments,
    BatchArguments,
    FreezingArguments,
    PictureArguments,
):
    """Instruction data."""

    num_examples: int = flag(9600, "Demonstrations of the embedded world to train on.")
    added_tokens: list[str] | None = flag(
        None,
        "Tokens to add to the model, such as <think> </think>; without, they are written by those that "
        "there are (docs/reasoning.md).",
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the base model, if none is named."
    )


def default_settings(given: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model if no model is named, and else those of an adapter, if any.

    Args:
        given: what the user gives, by flag. A model that is no folder is looked up on the Hub.
    """
    name = given.get("model_name_or_path")
    if not name:
        return [settings_file("sft/world.yaml")]
    is_adapter = given.get("use_peft") or _is_adapter(name, str(given.get("model_revision") or "main"))
    return [settings_file("sft/adapter.yaml")] if is_adapter else []


def _is_adapter(name: str, revision: str) -> bool:
    if Path(name).is_dir():
        return Path(name, "adapter_config.json").is_file()
    from hfllm.models.loading.adapters import find_adapter

    return find_adapter(name, revision=revision) is not None


def check(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect or contradict each other.

    Raises:
        InputError: naming the flag.
    """
    is_named = bool(model_args.model_name_or_path)
    refuse(is_named and bool(script_args.pretrain_config), "--pretrain_config", "the model is named")
    is_everything = training_args.completion_only_loss is False
    reason = "--completion_only_loss false learns every token"
    refuse(is_everything and script_args.loss_on == "last", "--loss_on last", reason)
    refuse(is_everything and training_args.assistant_only_loss, "--assistant_only_loss", reason)
    reason = "rows are tokenized here; name the columns by --column_mapping"
    refuse(training_args.dataset_kwargs is not None, "--dataset_kwargs", reason)
    refuse(bool(script_args.added_tokens) and model_args.use_peft, "--added_tokens", NO_ROWS)
    check_retrieval(script_args)
    if training_args.packing and training_args.max_length is None:
        raise InputError("--packing needs --max_length, the length of a packed row")
