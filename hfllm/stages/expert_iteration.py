"""Expert iteration: its flags, what it refuses, and the runs of fine-tuning that its rounds are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.runs import schedule
from hfllm.runs.chain import Chain, Parsed, chain_before, output_dir_of, run_stage
from hfllm.runs.command_line import main_process
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import load_recipe, settings_file
from hfllm.stages.constitution import flags_for_all, flags_of_adapter
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from trl import ModelConfig

BASE, LAST = START_FROM = ("base", "last")
AT_LEAST_ONE = (
    "num_rounds",
    "num_samples",
    "max_kept_per_prompt",
    "num_eval_prompts",
    "response_length",
    "batch_size",
)


@dataclass(frozen=True)
class ExpertIterationArguments(RowArguments, RemoteCodeArguments):
    """Prompts, the reward, and how much is sampled and kept."""

    output_dir: str = field(
        default="outputs/expert_iteration", metadata={"help": "Where the models, the data and the report go."}
    )
    seed: int = field(default=42, metadata={"help": "Of data and weights: the same seed, the same result."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: path/to/file.py:function, exact_match (the final answer is that of the column "
            "answer), or gold (the embedded world's); several are added."
        },
    )
    reward_timeout: float = field(
        default=REWARD_TIMEOUT, metadata={"help": "Seconds after which a reward function is given up; 0: none."}
    )
    min_reward: float = field(default=1.0, metadata={"help": "Responses with at least this reward are kept."})
    num_rounds: int = field(default=2, metadata={"help": "Rounds of sampling and fine-tuning."})
    num_samples: int = field(default=4, metadata={"help": "Responses sampled for each prompt in a round."})
    max_kept_per_prompt: int = field(default=2, metadata={"help": "Different responses kept of a prompt, at most."})
    start_from: str = field(
        default=BASE,
        metadata={
            "help": "What a round tunes: base, the model of the beginning (STaR), or last, that of the round before.",
            "choices": list(START_FROM),
        },
    )
    shuffle_rewards: bool = field(
        default=False,
        metadata={"help": "Control that must not gain: keep as many responses, drawn by chance, as were right."},
    )
    response_length: int = field(default=256, metadata={"help": "Longest response in tokens; longer ones are cut."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; above 0."})
    batch_size: int = field(default=64, metadata={"help": "Prompts that are answered at once."})
    num_prompts: int = field(default=1500, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=100, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the world model's fine-tuning."})
    round_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning in each round."})

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
    # As in fine-tuning, a text is a user's turn.
    apply_chat_template: ClassVar[bool] = True

    @property
    def is_world(self) -> bool:
        """Whether the prompts are the embedded world's."""
        return self.dataset_name == WORLD


def check(script_args: ExpertIterationArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect, contradict each other, or would fail later.

    Raises:
        InputError: naming the flag.
    """
    for flag in AT_LEAST_ONE:
        if (value := getattr(script_args, flag)) < 1:
            raise InputError(f"--{flag} {value}: expected at least 1")
    named = bool(model_args.model_name_or_path)
    if named == script_args.is_world:
        raise InputError("--model_name_or_path and --dataset_name: give both, or neither for the embedded world")
    if named and not script_args.reward_funcs:
        raise InputError("--reward_funcs is needed: exact_match, or path/to/file.py:function")
    for flag in ("pretrain_config", "sft_config"):
        refuse(named and bool(getattr(script_args, flag)), f"--{flag}", "the model is named")
    refuse(not named and model_args.use_peft, "--use_peft", "the world's model is trained whole")


@dataclass(frozen=True)
class Rounds:
    """The runs in their order: the stages before, and the fine-tuning of each round.

    Args:
        before: the stages that make the first model, if it is not named.
        runs: the flags of each round's fine-tuning, by its name.
        first: the model of the beginning.
    """

    before: Chain
    runs: Mapping[str, Parsed]
    first: str

    @property
    def parsed(self) -> dict[str, Parsed]:
        """The flags of all runs."""
        return {**self.before.parsed, **self.runs}

    def folder(self, name: str) -> str:
        """Return the folder of a round, which is its model's."""
        return output_dir_of(self.runs[name])

    @property
    def models(self) -> list[str]:
        """The model of the beginning, and that of each round."""
        return [self.first, *map(self.folder, self.runs)]

    def announce(self) -> None:
        """Say which runs come."""
        planned = [schedule.Planned(name, output_dir_of(flags)) for name, flags in self.parsed.items()]
        if schedule.plan("expert_iteration", planned, None) and main_process():
            print(f"expert_iteration: {schedule.described(schedule.current_job())}", flush=True)

    def tune(self, name: str) -> dict[str, float]:
        """Fine-tune on a round's rows, which must be there, or reuse what that gave; return its metrics."""
        names = list(self.runs)
        later = {self.folder(each): "sft" for each in names[names.index(name) + 1 :]}
        return run_stage("sft", self.runs[name], later)

    def end(self) -> None:
        """Note that all runs have ended."""
        schedule.come_back("expert_iteration")


def rows_file(script_args: ExpertIterationArguments, name: str) -> Path:
    """Return the file of a round's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def rounds_of(script_args: ExpertIterationArguments, model_args: "ModelConfig") -> Rounds:
    """Return the runs that the flags ask for.

    Raises:
        InputError: when a config of one of them is wrong.
    """
    named, output_dir, seed = model_args.model_name_or_path, script_args.output_dir, script_args.seed
    before = chain_before(
        *("expert_iteration", output_dir, seed, script_args.world_seed),
        given_models={"sft": named},
        configs={"pretrain": script_args.pretrain_config, "sft": script_args.sft_config},
    )
    first = named or before.model("sft")
    config = script_args.round_config or (None if named else str(settings_file("expert_iteration/sft.yaml")))
    runs: dict[str, Parsed] = {}
    start = first
    for number in range(1, script_args.num_rounds + 1):
        name = f"round_{number}"
        words = ["--model_name_or_path", start, "--dataset_name", str(rows_file(script_args, name))]
        words += flags_for_all(model_args)
        if start == first:
            words += flags_of_adapter(model_args)
            words += ["--model_revision", model_args.model_revision] if named else []
        words += ["--config", config] if config else []
        folder = str(Path(output_dir, name))
        runs[name] = load_recipe("sft").parse([*words, "--seed", str(seed), "--output_dir", folder])
        start = first if script_args.start_from == BASE else folder
    return Rounds(before, runs, first)
