"""Alignment by PPO: its flags, the stages before it, its prompts, and the parts of its trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import FreezingArguments
from hfllm.data.loading import RowArguments
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.trainers.learning_rate import BatchArguments

Row = Mapping[str, Any]
CALIBRATION_PROMPTS = 256


@dataclass(frozen=True)
class RlhfArguments(RowArguments, AugmentationArguments, BatchArguments, RemoteCodeArguments, FreezingArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sequence-classification model with one label, used as the reward; several form an ensemble."
        },
    )
    num_reward_models: int = field(
        default=1, metadata={"help": "Reward models to train on the same comparisons, when none is named."}
    )
    reward_aggregation: str = field(
        default="worst",
        metadata={"help": "How the scores of an ensemble are combined.", "choices": ["mean", "worst", "uncertainty"]},
    )
    uncertainty_coef: float = field(
        default=1.0, metadata={"help": "Weight of the ensemble's variance with --reward_aggregation uncertainty."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: path/to/file.py:function, exact_match (the final answer is that of the column "
            "answer), thinks (has thoughts and an answer), or gold (the embedded world's)."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that the policy may call: path/to/file.py:function, calculator, python (docs/tools.md)."
        },
    )
    environment_factory: str | None = field(
        default=None,
        metadata={"help": "Class of environments whose methods the policy may call: path/to/file.py:Class."},
    )
    value_model: str = field(
        default="head",
        metadata={"help": "'head' on the policy's trunk, 'reward' (starts as the reward model), or a model's name."},
    )
    ptx_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Texts for --ptx_coef, as pretrain takes them; 'world' gives as many documents as --num_prompts."
        },
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={"help": "Wrap text prompts as a user's turn of the chat template, as sft does."},
    )
    filter_prompts: bool = field(
        default=False,
        metadata={
            "help": "Leave out prompts that are empty, leave no room for a response or spell the token of a picture, "
            "instead of stopping."
        },
    )
    num_prompts: int = field(default=8192, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the reward-model stage."})

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
