"""Fine-tuning on instructions: its flags, the flags of retrieved passages, and the checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import SEES, SHOWS, FreezingArguments, PictureArguments
from hfllm.data.loading import OFF_WORLD, InstructionArguments
from hfllm.data.sources import PYDOC, source_files
from hfllm.errors import InputError, refuse_if
from hfllm.flags import ALWAYS, NAMED, SHARE, WORLD_GROUP, Clashes, Fact, Refused, at_least, check_flags, flag
from hfllm.runs.recipes import settings_file, settings_for_the_world
from hfllm.stages.shared import NOT_CUT, refused_with_images
from hfllm.trainers.learning_rate import BatchArguments, MuonArguments

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


# ---- retrieval ----


TOP_K, FRACTION = 3, 0.5
NO_PASSAGES = Fact(lambda flags: flags.retrieval_dataset_name is None, "it needs --retrieval_dataset_name")


@dataclass(frozen=True)
class RetrievalArguments:
    """Passages before the questions of some rows, so that a model learns to answer from what it is given."""

    retrieval_dataset_name: str | None = flag(
        None,
        "Passages that are found for a row's last question and put before it: a folder of saved passages, "
        "or texts, named as --dataset_name, which are cut (docs/guides/grounding.md).",
        never=SHOWS,
    )
    # None, and not their values, since they have no meaning without the first flag.
    retrieval_top_k: int | None = flag(
        None, f"The most passages of a row; {TOP_K} by default.", never=NO_PASSAGES, takes=at_least(1)
    )
    retrieval_min_score: float | None = flag(
        None, "Passages with a lower BM25 score are not put there; by default all are.", never=NO_PASSAGES
    )
    grounded_fraction: float | None = flag(
        None,
        f"Share of the rows that get passages; the others stay as they are. {FRACTION} by default.",
        never=NO_PASSAGES,
        takes=SHARE,
    )

    clashes: ClassVar[Clashes] = {
        "--grounded_fraction 0 cannot be used here: no row gets passages: leave out the flags": lambda flags: (
            flags.retrieval_dataset_name is not None and flags.grounded_fraction == 0
        ),
    }


def check_passages(name: str | None) -> None:
    """Refuse absent passages, and their absent library.

    Args:
        name: of the passages' source.
    """
    from hfllm.data.word_index import import_bm25s

    if name is None:
        return
    import_bm25s("--retrieval_dataset_name")
    try:
        passage_files(name)
    except InputError as error:
        raise InputError(f"--retrieval_dataset_name: {error}") from None


def passage_files(name: str) -> list[Path]:
    """Return the local files of texts or of saved passages; none for other sources."""
    from hfllm.grounding.passages import ABOUT, FILE

    if name == PYDOC:
        return []
    saved = [Path(name, file) for file in (FILE, ABOUT)]
    if not saved[0].is_file():
        return source_files(name) or []
    refuse_if(not saved[1].is_file(), f"{saved[1]}: missing, beside saved passages: save them again")
    return saved


# ---- fine-tuning ----


LEARNS_ALL = Fact(lambda flags: flags.completion_only_loss is False, "--completion_only_loss false learns every token")
WITH_IMAGES = refused_with_images(SHOWS)
NO_ROWS = "an adapter has no rows for new tokens: train all weights, or leave the flag out"


@dataclass(frozen=True)
class SftArguments(
    InstructionArguments,
    RetrievalArguments,
    AugmentationArguments,
    BatchArguments,
    MuonArguments,
    FreezingArguments,
    PictureArguments,
):
    """Instruction data."""

    num_examples: int = flag(
        9600,
        "Demonstrations of the embedded world to train on.",
        takes=at_least(1),
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    added_tokens: list[str] | None = flag(
        None,
        "Tokens to add to the model, such as <think> </think>; without, they are written by those that "
        "there are (docs/guides/reasoning.md).",
        never=Fact(lambda flags: flags.use_peft, NO_ROWS),
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the base model, if none is named.", never=NAMED
    )

    refused: ClassVar[Refused] = {
        **WITH_IMAGES,
        "loss_on": LEARNS_ALL,
        "augment": SHOWS,
        "added_tokens": SEES.because("the model sees, and its tokens are its processor's"),
        "chat_template_path": SEES,
        "max_length": SHOWS.because(NOT_CUT),
        "assistant_only_loss": (LEARNS_ALL, WITH_IMAGES["assistant_only_loss"]),
        "dataset_kwargs": ALWAYS.because("rows are tokenized here; name the columns by --column_mapping"),
    }
    clashes: ClassVar[Clashes] = {
        "--packing needs --max_length, the length of a packed row": lambda flags: (
            flags.packing and flags.max_length is None
        ),
    }


def default_settings(provided: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model if no model is named, and else an adapter's, if any.

    Args:
        provided: the user's values, by flag. A model name other than a folder is looked up on the Hub.
    """
    name = provided.get("model_name_or_path")
    if not name:
        return settings_for_the_world("sft", provided)
    is_adapter = provided.get("use_peft") or _is_adapter(name, str(provided.get("model_revision") or "main"))
    return [settings_file("sft/adapter.yaml")] if is_adapter else []


def _is_adapter(name: str, revision: str) -> bool:
    if Path(name).is_dir():
        return Path(name, "adapter_config.json").is_file()
    from hfllm.models.loading.adapters import find_adapter

    return find_adapter(name, revision=revision) is not None


def check(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse flags without effect, and contradictory flags."""
    from hfllm.trainers.pretraining.muon import check_muon

    check_flags(script_args, training_args, model_args)
    check_muon(script_args.use_muon, training_args, model_args.use_peft)
    check_passages(script_args.retrieval_dataset_name)
