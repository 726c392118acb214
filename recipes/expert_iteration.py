"""Expert iteration: a model learns from those of its own responses that a reward calls right (STaR).

    hfllm expert_iteration                                               # the embedded world, from nothing
    hfllm expert_iteration --model_name_or_path NAME --dataset_name gsm8k.jsonl --column_mapping prompt=question \\
        --reward_funcs exact_match
    hfllm expert_iteration --shuffle_rewards true                        # the control, which must not gain
    accelerate launch recipes/expert_iteration.py --model_name_or_path NAME --dataset_name x.jsonl \\
        --reward_funcs my.py:score

In each round it samples responses to all prompts, keeps those with enough reward, and fine-tunes on them, thoughts and
all: the model of the beginning (Zelikman et al. 2022, arXiv:2203.14465), or with `--start_from last` that of the round
before. A run that was stopped goes on with the round that it was in. docs/guides/reasoning.md tells more.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.flags import check_flags, flags_for_all
from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.expert_iteration import ExpertIterationArguments

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.stages.shared import Speaking

RECIPE = Recipe(
    makes="a model tuned on its own right answers", needs={"model_name_or_path": "sft"}, runs_own_chain=True
)


def parse(argv: Sequence[str]) -> tuple[ExpertIterationArguments, "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    settings = world_settings("expert_iteration")
    return parse_recipe(argv, __doc__, ExpertIterationArguments, ("trl.ModelConfig",), settings=settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: ExpertIterationArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, sample, keep and fine-tune in each round, compare, report. Return the metrics."""
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import check_trainable, named_model
    from hfllm.runs.pipeline import by_main_process, data_file
    from hfllm.runs.stage import Stage
    from hfllm.stages import expert_iteration
    from hfllm.stages.courses import refuse_inputs_in
    from hfllm.stages.expert_iteration import RoundWriter, evaluation_of, reward_of, rounds_report, with_room
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.stages.rlhf.build import prompt_data
    from hfllm.stages.shared import load_speaking
    from hfllm.trainers.ppo.prompts import check_pictures

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, model_args)
    rounds = expert_iteration.rounds_of(script_args, model_args)
    stage = Stage("expert_iteration", script_args, model_args, before=rounds.parsed, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    reward = reward_of(script_args.reward_funcs, script_args.reward_timeout, script_args.is_world)
    parts = prompt_data(script_args, script_args.seed, reward.functions, timeout=reward.timeout)
    for rows in parts:
        check_pictures(rows, None, "hfllm expert_iteration")
    if rounds.named:
        parts = with_room(parts, rounds.named, model_args.model_revision, script_args.response_length)
    train_rows, eval_rows = parts
    inputs = {"model_name_or_path": rounds.named, "dataset_name": script_args.dataset_name}
    refuse_inputs_in(Path(script_args.output_dir).resolve(), inputs, "rounds")
    if rounds.named:
        check_trainable(model_args)
        check_adapter(model_args, rounds.before)
    rounds.check()

    stage.announce()
    rounds.announce()
    rounds.before.run()

    def load(model: str) -> "Speaking":
        """The model of the beginning, or that of a round."""
        revision = model_args.model_revision if model == rounds.first else "main"
        return load_speaking(replace(named_model(model_args), name=model, revision=revision))

    settings, seed, counts = script_args.of_rounds, script_args.seed, []
    loading = " ".join([*flags_for_all(model_args), f"--model_revision {model_args.model_revision}"])
    writer = RoundWriter(train_rows, reward, settings, loading)
    for number, (name, model) in enumerate(zip(rounds.runs, rounds.models, strict=False)):
        write = partial(writer.write, data_file(script_args.output_dir, name), model, load, seed + number)
        counts.append(by_main_process(write))
        rounds.run(name)
    rounds.end()
    if not main_process():
        return {}

    evaluations = [evaluation_of(load(model), eval_rows, reward, settings, seed) for model in rounds.models]
    result = rounds_report(eval_rows, evaluations, counts, settings.shuffle_rewards)
    return stage.finish(
        {**result.metrics, "train_prompts": len(train_rows), "eval_prompts": len(eval_rows)},
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        artifacts={name: name for name in rounds.parsed} | {"rows": "data"},
        next_steps=chat_lines(rounds.models[-1], eval_rows[0]["prompt"]),
        final_model=str(rounds.models[-1]),
        models={"model": rounds.first},
    )


if __name__ == "__main__":
    run(main, parse)
