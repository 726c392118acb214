"""Alignment by PPO: its flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import FreezingArguments
from hfllm.data.loading import RowArguments
from hfllm.flags import POSITIVE, at_least, flag
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.trainers.learning_rate import BatchArguments

Row = Mapping[str, Any]
CALIBRATION_PROMPTS = 256


@dataclass(frozen=True)
class RlhfArguments(RowArguments, AugmentationArguments, BatchArguments, RemoteCodeArguments, FreezingArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: list[str] | None = flag(
        None, "Sequence-classification model with one label, used as the reward; several form an ensemble."
    )
    num_reward_models: int = flag(
        1, "Reward models to train on the same comparisons, when none is named.", takes=at_least(1)
    )
    reward_aggregation: str = flag(
        "worst", "How the scores of an ensemble are combined.", choices=["mean", "worst", "uncertainty"]
    )
    uncertainty_coef: float = flag(
        1.0, "Weight of the ensemble's variance with --reward_aggregation uncertainty.", takes=POSITIVE
    )
    reward_funcs: list[str] | None = flag(
        None,
        "Reward functions: path/to/file.py:function, exact_match (the final answer is that of the column "
        "answer), thinks (has thoughts and an answer), or gold (the embedded world's).",
    )
    tools: list[str] | None = flag(
        None,
        "Functions that the policy may call: path/to/file.py:function, calculator, python (docs/guides/tools.md).",
    )
    environment_factory: str | None = flag(
        None, "Class of environments whose methods the policy may call: path/to/file.py:Class."
    )
    value_model: str = flag(
        "head", "'head' on the policy's trunk, 'reward' (starts as the reward model), or a model's name."
    )
    ptx_dataset_name: str | None = flag(
        None, "Texts for --ptx_coef, as pretrain takes them; 'world' gives as many documents as --num_prompts."
    )
    apply_chat_template: bool = flag(False, "Wrap text prompts as a user's turn of the chat template, as sft does.")
    filter_prompts: bool = flag(
        False,
        "Leave out prompts that are empty, leave no room for a response or spell the token of a picture, "
        "instead of stopping.",
    )
    num_prompts: int = flag(8192, "Prompts of the embedded world to sample from.", takes=at_least(1))
    num_eval_prompts: int = flag(360, "Held-out prompts, at most this many.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.")
    sft_config: str | None = flag(None, "YAML flags of the fine-tuning stage.")
    reward_config: str | None = flag(None, "YAML flags of the reward-model stage.")

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
