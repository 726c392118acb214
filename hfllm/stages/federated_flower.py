"""The recipe between machines: what the apps of Flower run at the server and at each organisation.

    python -m hfllm.federation.flower_app app --num_organisations 3 --loop hfllm.stages.federated_flower:loop \\
        --learner hfllm.stages.federated_clients:worker_learner

The run's `flags` name the server's file of flags, with `organisation_names` and `controls: none`; the settings of each
node name its own: `{"flags": "federated.yaml", "base": "my-model", "rows": "rows.jsonl"}`. docs/federation.md has all
commands.
"""

from collections.abc import Callable, Mapping

from hfllm.errors import InputError
from hfllm.federation.transports import Transport
from hfllm.runs.recipes import load_recipe


def loop(connect: Callable[[str], Transport], config: Mapping[str, object]) -> None:
    """Run the recipe at the server, over Flower's transport.

    Args:
        connect: makes the transport from the base model's sha256.
        config: of the run; `flags` is a file of the recipe's flags.

    Raises:
        InputError: when the run names no such file, or the app another compression than its flags.
    """
    if not config.get("flags"):
        raise InputError('the run names no file of flags: expected flags="federated.yaml" in its settings')
    recipe = load_recipe("federated")
    parsed = recipe.parse(["--config", str(config["flags"])])
    if (given := str(config.get("compression", "none"))) not in ("none", parsed[0].compression):
        raise InputError(
            f"--compression {given} of the app, {parsed[0].compression} of {config['flags']}: expected the same"
        )
    recipe.main(*parsed, connect=connect)
