"""What learning to use tools has changed: on the embedded world exactly, on your questions by your rewards."""

from hfllm.evaluation.tools_report import report
from hfllm.outputs.report import Found
from hfllm.stages.tools_runs import RL
from hfllm.stages.tools_steps import Steps


def evaluate(steps: Steps) -> Found:
    """Return the report: of the world's models by what they answer, of yours by what PPO measured itself."""
    return report(steps.answers()) if steps.script_args.is_world else Found(steps.metrics[RL], "", {}, {})
