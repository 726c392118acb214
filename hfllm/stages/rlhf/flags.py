"""Alignment by PPO: its flags, the checks of them, and the stages before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import FreezingArguments
from hfllm.data.loading import OFF_WORLD, RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.flags import ALWAYS, POSITIVE, UNNAMED, WORLD_GROUP, Clashes, Refused, at_least, check_flags, flag
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.trainers.learning_rate import BatchArguments, sets_optimizer

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.trainers.ppo.config import PPOConfig

Row = Mapping[str, Any]
CALIBRATION_PROMPTS = 256
# Flags of PPO for tools.
OF_TOOLS = ("max_tool_calling_iterations", "tool_timeout", "episode_timeout", "max_tool_result_length")
# The help of `--tools`; `build.load_tool` reads its values.
TOOLS = (
    "Functions that the model may call: path/to/file.py:function, calculator, python, or lookup:table.json "
    "(docs/guides/tools.md)."
)
MCP_SERVERS = (
    'JSON file of MCP servers, {"mcpServers": {...}}, whose tools the model may call (docs/reference/tools.md).'
)
CALLS_NEED_A_MODEL = UNNAMED.because("it needs --model_name_or_path, a model that calls tools")


@dataclass(frozen=True)
class RlhfArguments(RowArguments, AugmentationArguments, BatchArguments, RemoteCodeArguments, FreezingArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: list[str] | None = flag(
        None,
        "Model with one label, of answers or of their steps, used as the reward; several form an ensemble.",
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
    tools: list[str] | None = flag(None, TOOLS, never=CALLS_NEED_A_MODEL)
    environment_factory: list[str] | None = flag(
        None,
        "Class of environments whose methods the policy may call: path/to/file.py:Class, or python_session. Of "
        "several, each row's column environment names one.",
        never=CALLS_NEED_A_MODEL,
    )
    mcp_servers: str | None = flag(None, MCP_SERVERS, never=CALLS_NEED_A_MODEL)
    chat_template_path: str | None = flag(
        None,
        "Chat template for a model whose own knows no tools: own, which keeps its turns, chatml, hfllm, or a file.",
        never=UNNAMED.because("it needs --model_name_or_path, a model with another template"),
    )
    mcp_sessions: str = flag(
        "shared",
        "With --mcp_servers: one session for all episodes (shared), or one for each (episode).",
        choices=["shared", "episode"],
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
        never=UNNAMED.because("it needs --model_name_or_path, to count tokens"),
    )
    num_prompts: int = flag(
        8192, "Prompts of the embedded world to sample from.", takes=at_least(1), never=OFF_WORLD, group=WORLD_GROUP
    )
    num_eval_prompts: int = flag(360, "Held-out prompts, at most this many.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.", group=WORLD_GROUP)
    sft_config: str | None = flag(None, "YAML flags of the fine-tuning stage.", group=WORLD_GROUP)
    reward_config: str | None = flag(None, "YAML flags of the reward-model stage.", group=WORLD_GROUP)

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
    refused: ClassVar[Refused] = {
        "model_init_kwargs": ALWAYS.because("use --dtype, --attn_implementation or the like")
    }
    # Their errors would come after the training of the stages before.
    clashes: ClassVar[Clashes] = {
        "--learning_rate is needed: DeepSpeed's file has an optimizer section, which reads it": lambda flags: (
            flags.learning_rate is None and sets_optimizer(flags)
        ),
        "--mcp_sessions {mcp_sessions} has no effect without --mcp_servers": lambda flags: (
            flags.mcp_sessions != "shared" and not flags.mcp_servers
        ),
        "--mcp_sessions episode makes environments: leave --environment_factory out": lambda flags: (
            flags.mcp_sessions == "episode" and flags.environment_factory
        ),
        "--value_model reward needs a reward model; with --reward_funcs use 'head' or a model's name": lambda flags: (
            flags.value_model == "reward" and flags.reward_funcs and not flags.reward_model_name_or_path
        ),
        "--shared_base takes reward models that are adapters of the policy's base: name them, and the policy": (
            lambda flags: flags.shared_base and (flags.model_name_or_path is None or flags.has_no_reward)
        ),
        "--num_reward_models {num_reward_models}: at least 1, and more only where none is named": lambda flags: (
            flags.num_reward_models > 1 and (flags.reward_model_name_or_path or flags.reward_funcs)
        ),
        "--ptx_coef {ptx_coef} and --ptx_dataset_name {ptx_dataset_name}: give both, or neither": lambda flags: (
            (flags.ptx_dataset_name is None) == bool(flags.ptx_coef)
        ),
    }

    @property
    def has_tools(self) -> bool:
        """Whether the policy has tools of any kind."""
        return bool(self.tools or self.mcp_servers or self.environment_factory)

    @property
    def has_no_reward(self) -> bool:
        """Whether no reward is named: reward models are trained then."""
        return not (self.reward_model_name_or_path or self.reward_funcs or self.environment_factory)


def check(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> None:
    """Refuse flags without effect, and contradictory ones.

    YAML flags of skipped stages are accepted, so that one file serves with and without a named model.
    """
    check_flags(script_args, training_args, model_args)
    if training_args.use_vllm:
        from hfllm.trainers.ppo.vllm_sampling import check_vllm

        check_vllm(training_args)
    for option in () if script_args.has_tools else OF_TOOLS:
        value = getattr(training_args, option)
        is_changed = value != getattr(type(training_args), option)
        refuse(
            is_changed,
            f"--{option} {value}",
            "it has no effect without --tools, --mcp_servers or --environment_factory",
        )


def check_rewards(script_args: RlhfArguments, training_args: "PPOConfig") -> None:
    """Refuse prompts without a reward, and weights of other rewards, before the training of the stages before.

    Whether environments have a reward of their own is seen when they are loaded.
    """
    if script_args.dataset_name != WORLD and script_args.has_no_reward:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs a reward: --reward_model_name_or_path (train one with "
            "hfllm reward) or --reward_funcs path/to/file.py:function"
        )
    has_models = script_args.reward_model_name_or_path or script_args.has_no_reward
    weights, count = training_args.reward_weights, len(script_args.reward_funcs or ()) + bool(has_models)
    if weights is not None and len(weights) != count:
        raise InputError(f"--reward_weights has {len(weights)} values for {count} reward(s)")


def stages_before(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages with models not named: pretraining, fine-tuning and reward models."""
    own_model, seed = model_args.model_name_or_path, training_args.seed
    # Before PPO, the policy sees the inputs it must withstand, and the reward model distinguishes them.
    augment = {
        name: ["--augment", str(script_args.augment)] if script_args.augment and not config else []
        for name, config in (("sft", script_args.sft_config), ("reward", script_args.reward_config))
    }
    revision = ["--model_revision", model_args.model_revision] if own_model else []
    has_reward = script_args.reward_model_name_or_path or script_args.reward_funcs or script_args.environment_factory
    further = range(1, script_args.num_reward_models)
    return chain_before(
        "rlhf",
        training_args.output_dir,
        seed,
        script_args.world_seed,
        given_models={"sft": own_model},
        configs={
            "pretrain": script_args.pretrain_config,
            "sft": script_args.sft_config,
            "reward": script_args.reward_config,
        },
        more_flags={"sft": augment["sft"], "reward": [*revision, *augment["reward"]]},
        # Members of an ensemble see the same comparisons.
        copies={"reward": [["--seed", str(seed + each), "--comparison_seed", str(seed)] for each in further]},
        skip=["reward"] if has_reward else [],
    )
