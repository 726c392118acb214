"""Vision-language models: the recipe's flags, its checks, and the settings of its variants."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.images.rows import FREEZING, OF_PICTURES, FreezingArguments, PictureArguments
from hfllm.data.loading import ON_WORLD, RowArguments
from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.world.pictures import picture_side
from hfllm.errors import InputError, refuse
from hfllm.flags import ALWAYS, NAMED, UNNAMED, Clashes, Fact, Range, Refused, at_least, check_flags, flag
from hfllm.runs.recipes import settings_file
from hfllm.stages.shared import NOT_CUT, check_batches, refused_with_images

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

LIBRARY = ("trl.SFTConfig", "trl.ModelConfig")
# Images drawn here; a small model is made for them if none is named.
DRAWN = (PICTURES, DIGITS)
MODEL_NAMED = NAMED.because("it is for the model that is made here, and one is named")
OWN_ROWS = Fact(
    lambda flags: flags.dataset_name not in DRAWN, "the rows are your own: --max_samples takes the first of them"
)
DRAWN_ROWS = OWN_ROWS.absent("it is for rows of your own, and these are drawn")
NO_PPO = Fact(lambda flags: flags.num_rl_prompts == 0, "it is for PPO, which --num_rl_prompts adds")
# The largest share of questions about absent things: beyond some share nothing else would be learned.
MOST_ABSENT = 0.999
# The largest patches of drawn pictures that hold one center of a shape at most, in pixels.
LARGEST_NAMED = 8


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a small vision-language model: the flags of these names."""

    hidden_size: int
    vision_hidden_size: int | None
    num_hidden_layers: int
    num_vision_layers: int
    num_attention_heads: int
    patch_size: int


@dataclass(frozen=True)
class VisionArguments(RowArguments, FreezingArguments, PictureArguments):
    """Which pictures and questions, the model that is made for them, and which of its parts learn."""

    dataset_name: str = flag(
        PICTURES,
        "'pictures' (the drawn world), 'digits' (scikit-learn's), or rows of your own with a column image "
        "or images: a local file or folder, or a dataset id on the Hub.",
    )
    num_patch_pictures: int = flag(
        0,
        "Pictures in whose patches the tower names what is there, before any caption, and beside answers too; 0 names "
        "nothing.",
        takes=at_least(0),
        never=(MODEL_NAMED, Fact(lambda flags: flags.dataset_name == DIGITS, "digits have no patches of their own")),
    )
    num_captions: int = flag(
        6400, "Pictures with captions, which are learned first.", takes=at_least(0), never=MODEL_NAMED
    )
    takes_any_column: ClassVar[bool] = True

    num_examples: int = flag(51200, "Pictures with questions to train on.", takes=at_least(1), never=OWN_ROWS)
    questions_per_picture: int = flag(
        4, "Questions about each at most: as many as --max_length tokens hold.", never=OWN_ROWS
    )
    share_absent: float | None = flag(
        None,
        "Share of questions about absent things among those that are drawn for pictures with colors, half of "
        "all, in training; by default 5 of 23. About half as many more remain, since what a picture does not allow is "
        "drawn again. Few of them leave PPO something to teach.",
        takes=Range(f"at least 0, and at most {MOST_ABSENT}", lambda value: 0 <= value <= MOST_ABSENT),
        never=(
            OWN_ROWS,
            Fact(lambda flags: flags.dataset_name == DIGITS, "every digit that is asked for is there"),
        ),
    )
    num_eval_examples: int = flag(1000, "Questions of each part of the evaluation.", takes=at_least(2), never=OWN_ROWS)
    max_eval_samples: int = flag(256, "Held-out rows of your own at most.", takes=at_least(1), never=DRAWN_ROWS)
    num_rl_prompts: int = flag(
        0,
        "Drawn pictures for PPO on the gold reward, each once; 0 leaves PPO out.",
        takes=at_least(0),
        never=(
            OWN_ROWS.because("the gold is that of drawn pictures"),
            Fact(lambda flags: flags.use_peft, "PPO starts from a whole model here, not an adapter"),
        ),
    )
    rl_learning_rate: float = flag(1e-4, "The highest learning rate of PPO.", never=NO_PPO)
    kl_coef: float = flag(0.02, "Weight of the KL penalty of PPO.", never=NO_PPO)
    max_new_tokens: int = flag(16, "Tokens of an answer at most, in the evaluation.", takes=at_least(1))
    hidden_size: int = flag(64, "Width of the decoder that is made.", never=MODEL_NAMED, takes=at_least(1))
    vision_hidden_size: int | None = flag(
        None, "Width of the tower; by default that of the decoder.", never=MODEL_NAMED
    )
    num_hidden_layers: int = flag(3, "Layers of the decoder.", never=MODEL_NAMED, takes=at_least(1))
    num_vision_layers: int = flag(2, "Layers of the tower.", never=MODEL_NAMED)
    num_attention_heads: int = flag(4, "Heads of both.", never=MODEL_NAMED, takes=at_least(1))
    patch_size: int = flag(8, "Side of a patch, in pixels.", never=MODEL_NAMED)
    use_muon: bool = flag(
        False,
        "Learn the matrices of the layers by Muon, the rest by AdamW, at one learning rate.",
        never=MODEL_NAMED,
    )

    refused: ClassVar[Refused] = {
        **dict.fromkeys(FREEZING, UNNAMED.because("the model is made here, and knows nothing")),
        **dict.fromkeys(OF_PICTURES, DRAWN_ROWS),
        **refused_with_images(ALWAYS),
        # Questions about drawn images are put into the rows of a model built here, as many as fit.
        "max_length": NAMED.because(NOT_CUT),
        "use_peft": UNNAMED.because("the model is made here: all of its weights learn"),
    }
    clashes: ClassVar[Clashes] = {
        "--dataset_name world: that one is of texts; pictures is the world to be seen": ON_WORLD.holds,
        "--dataset_name {dataset_name}: rows of your own take a vision-language model of your own "
        f"(--model_name_or_path), or pictures that are drawn here: {', '.join(DRAWN)}": lambda flags: (
            UNNAMED.holds(flags) and OWN_ROWS.holds(flags)
        ),
        "--questions_per_picture {questions_per_picture}: expected 1 to 2": lambda flags: (
            flags.dataset_name == DIGITS and not 1 <= flags.questions_per_picture <= 2
        ),
        "--questions_per_picture {questions_per_picture}: expected 1 to 16": lambda flags: (
            not 1 <= flags.questions_per_picture <= 16
        ),
        "--hidden_size {hidden_size}: expected a multiple of twice --num_attention_heads {num_attention_heads}": (
            lambda flags: flags.hidden_size % (2 * flags.num_attention_heads)
        ),
        "--vision_hidden_size {vision_hidden_size}: expected a multiple of twice --num_attention_heads "
        "{num_attention_heads}": lambda flags: (
            flags.vision_hidden_size is not None
            and (flags.vision_hidden_size < 1 or flags.vision_hidden_size % (2 * flags.num_attention_heads))
        ),
    }

    @property
    def model_sizes(self) -> ModelSizes:
        """The sizes of the model that is made here."""
        return ModelSizes(**{item.name: getattr(self, item.name) for item in fields(ModelSizes)})


def default_settings(provided: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the model built for the named images, or the settings of the user's own model."""
    if provided.get("model_name_or_path"):
        return [settings_file("vision/model.yaml")]
    digits = [settings_file("vision/digits.yaml")] if provided.get("dataset_name") == DIGITS else []
    return [settings_file("vision/pictures.yaml"), *digits]


def check(script_args: VisionArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse contradictory flags and flags that would fail later."""
    from hfllm.trainers.engines import shards_parameters
    from hfllm.trainers.pretraining.muon import check_muon

    check_flags(script_args, training_args, model_args)
    check_batches(training_args.train_sampling_strategy, training_args.completion_only_loss)
    check_muon(script_args.use_muon, training_args)
    is_split = script_args.num_patch_pictures and shards_parameters(training_args)
    refuse(is_split, "--num_patch_pictures", "DeepSpeed and FSDP split the embeddings that patches are named by")
    side, patch = picture_side(script_args.dataset_name), script_args.patch_size
    if side is not None and (patch < 1 or side % patch):
        raise InputError(f"--patch_size {patch}: expected a divisor of the pictures' side, {side}")
    if script_args.num_patch_pictures and patch > LARGEST_NAMED:
        raise InputError(
            f"--patch_size {patch}: with --num_patch_pictures expected at most {LARGEST_NAMED}, since larger ones may "
            "hold the centers of two shapes"
        )
