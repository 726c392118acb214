"""Federated fine-tuning: organisations learn one model together, and their rows stay where they are.

    hfllm federated                                                      # the embedded world, from nothing
    hfllm federated --model_name_or_path NAME --organisation_files a.jsonl b.jsonl c.jsonl
    hfllm federated --learner reward --model_name_or_path NAME --organisation_files a.jsonl b.jsonl c.jsonl
    accelerate launch recipes/federated.py --model_name_or_path NAME --organisation_files a.jsonl b.jsonl c.jsonl

In each round the organisations train some steps from the common weights, each on its own rows; the server takes the
mean of their changes by tokens, or of comparisons by pairs. Controls beside it: the same rows pooled, in as many rows
and in as few steps, and each organisation alone. A run that was stopped resumes with the round that it was in.
docs/guides/federation.md tells more.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.federated.flags import FederatedArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from hfllm.stages.federated.build import Connect


def parse(argv: Sequence[str]) -> tuple[FederatedArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; without a model of your own the defaults are the embedded world's settings."""
    library = ("trl.SFTConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, FederatedArguments, library, "outputs/federated", default_settings)


@releases_folders
@trusts_code_if_asked
def main(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    connect: "Connect | None" = None,
) -> dict[str, float]:
    """Pretrain if no model is named, run the rounds and the controls, save, report. Return the metrics.

    Args:
        connect: reaches organisations on other machines; hfllm/stages/federated/build.py has one.
    """
    from dataclasses import replace

    from hfllm.federation.rounds import run_rounds
    from hfllm.runs.models import check_trainable
    from hfllm.runs.stage import Stage
    from hfllm.stages.federated import build as federated
    from hfllm.stages.federated import flags as federated_flags
    from hfllm.stages.federated.build import load_local
    from hfllm.stages.federated.flags import organisations_of
    from hfllm.stages.federated.report import Controls, Evaluator, report_of

    # Refuse what cannot work before anything is trained.
    federated_flags.check(script_args, training_args, model_args)
    before = federated_flags.stages_before(script_args, training_args, model_args)
    also = federated_flags.contents(script_args)
    stage = Stage("federated", script_args, training_args, model_args, before=before.parsed, also=also)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(federated_flags.adapted(script_args, model_args))
    private = federated.check(script_args)
    organisations = organisations_of(script_args, training_args.seed)
    federated_flags.row_epsilons(script_args, training_args, organisations)

    stage.announce()
    before.run()
    base_args = replace(model_args, model_name_or_path=before.model("pretrain") or model_args.model_name_or_path)
    local = load_local(script_args, stage.training_args, base_args, organisations)
    folder, seed = Path(training_args.output_dir), training_args.seed
    begun, identity = local.learner.weights(), federated_flags.identity_of(stage.arguments, local.base_sha256)
    evaluator = Evaluator(script_args, local)
    with federated.transport(script_args, training_args, base_args, local, connect) as transport:
        state = run_rounds(
            transport,
            [each.name for each in organisations],
            begun,
            federated.optimizer(script_args),
            federated_flags.round_settings(script_args, seed),
            folder,
            identity,
            evaluate=evaluator.of_round,
            new_sum=partial(federated.new_sum, script_args, local.base_sha256, begun, len(organisations)),
            announce=partial(federated.announce, script_args.rounds),
        )
    controls = Controls(script_args, seed, local, evaluator, begun, folder, identity).run()
    result = report_of(script_args, local, state.records, evaluator.measure(state.weights), controls, private)
    local.learner.set_weights(state.weights)
    local.learner.trainer.save_model()
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        next_steps=federated_flags.next_steps(script_args, training_args),
        models={"model": base_args.model_name_or_path},
    )


if __name__ == "__main__":
    run(main, parse)
