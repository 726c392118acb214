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
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.federated.flags import FULL, FederatedArguments, check, contents, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from hfllm.stages.federated.build import Connect

RECIPE = Recipe(makes="a model that organisations learn together", needs={"model_name_or_path": "pretrain"})


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
    from hfllm.federation.rounds import server_optimizer
    from hfllm.flags import changed
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.models import check_trainable
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages.federated import build as federated
    from hfllm.stages.federated.report import CLAIMS, Controls, Evaluator, report_of

    check(script_args, training_args, model_args)
    folder, seed, name = training_args.output_dir, training_args.seed, model_args.model_name_or_path
    models, configs = {"pretrain": name}, {"pretrain": script_args.pretrain_config}
    before = chain_before("federated", folder, seed, script_args.world_seed, given_models=models, configs=configs)
    also = contents(script_args.organisation_files or ())
    stage = Stage("federated", script_args, training_args, model_args, before=before.parsed, also=also)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(changed(model_args, use_peft=script_args.average != FULL))
    step = (script_args.server_optimizer, script_args.server_learning_rate, script_args.server_momentum)
    server = federated.Server(server_optimizer(*step), script_args.round_settings(seed), script_args.averaging)
    terms, delta, max_epsilon = script_args.terms(seed), script_args.delta, script_args.max_epsilon
    epsilon = server.spent_epsilon(script_args.count, delta, max_epsilon)
    organisations = federated.organisations_of(script_args, seed)
    batch_size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    federated.row_epsilons(terms, organisations, batch_size, delta, max_epsilon)

    stage.announce()
    before.run()
    base_args = replace(model_args, model_name_or_path=before.model("pretrain") or name)
    local = federated.load_local(script_args, stage.training_args, base_args, organisations)
    weights, identity = local.learner.weights(), federated.identity_of(stage.arguments, local.base_sha256)
    evaluator = Evaluator(local, script_args.tasks, script_args.eval_rounds)
    server.announce_noise(local)
    workers = partial(federated.worker_settings, script_args, training_args, base_args)
    with federated.transport(local, connect, workers, script_args.processes, script_args.round_timeout) as transport:
        state = server.run_rounds(local, transport, weights, identity, evaluator.of_round)
    controls = Controls(local, evaluator, weights, identity).run(script_args.arms)
    result = report_of(local, state.records, evaluator.measure(state.weights), controls, epsilon, delta)
    local.learner.set_weights(state.weights)
    local.learner.trainer.save_model()
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        next_steps=[] if terms.has_pairs else chat_lines(folder, [{"role": "user", "content": "Hello!"}]),
        models={"model": base_args.model_name_or_path},
        claims=CLAIMS,
    )


if __name__ == "__main__":
    run(main, parse)
