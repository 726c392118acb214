"""Measure speculative decoding of a model: how often drafts are right, and the speedup.

    hfllm speculative                                                    # the embedded world, from nothing
    hfllm speculative --model_name_or_path NAME --assistant_model_name_or_path SMALLER
    accelerate launch recipes/speculative.py --model_name_or_path NAME --draft int8

Drafts come from a smaller model with the same tokenizer, from the target rounded to int8, from the text after the same
words in the prompt, or from the target's first layers. Without `--model_name_or_path` the world's fine-tuned model is
made first, and a draft model an eighth its size is distilled from it, under the output folder. The output is the
target's own, greedy or sampled; the report compares the speed with transformers' `generate` and with the formula of
Leviathan et al. 2023 (arXiv:2211.17192).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.speculative import SpeculativeArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(
    makes="a report on decoding", needs={"model_name_or_path": "sft", "assistant_model_name_or_path": "draft"}
)


def parse(argv: Sequence[str]) -> tuple[SpeculativeArguments, "ModelConfig"]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, SpeculativeArguments, ("trl.ModelConfig",))


@releases_folders
@trusts_code_if_asked
def main(script_args: SpeculativeArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, measure, write the report. Return the metrics."""
    from hfllm.compression.schemes import quiet_bitsandbytes
    from hfllm.outputs.card import speculative_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import load_policy, named_model
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages import speculative

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, model_args)
    before = chain_before(
        "speculative",
        script_args.output_dir,
        script_args.seed,
        script_args.world_seed,
        given_models={"sft": model_args.model_name_or_path, "draft": script_args.assistant_model_name_or_path},
        configs={name: getattr(script_args, f"{name}_config") for name in ("pretrain", "sft", "draft")},
        skip=[] if script_args.draft == "model" else ["draft"],
    )
    stage = Stage("speculative", script_args, model_args, before=before.parsed)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    speculative.check_draft(script_args, model_args, before)
    rows = speculative.prompt_rows(script_args, script_args.num_prompts)
    stage.announce()

    # The stages before: a target, and a draft model distilled from it.
    before.run()
    target = replace(named_model(model_args), name=before.model("sft") or model_args.model_name_or_path)
    small = before.model("draft") or script_args.assistant_model_name_or_path
    assistant = replace(target, name=small, revision="main")
    source = speculative.DraftSource(
        script_args.draft, assistant, script_args.max_ngram, script_args.early_exit_layers
    )
    if not main_process():
        return {}

    # Measure how often drafts are accepted, their cost, and the speedup.
    quiet_bitsandbytes()
    model, tokenizer = load_policy(target)
    speculative.prepare_target(model)
    draft = source.load(model, tokenizer)
    metrics, speeds = speculative.measure(script_args.of_speed, model, tokenizer, draft, rows)

    return stage.finish(
        metrics,
        tables={"Speed by number of draft tokens": speeds},
        curves={"speed": speculative.speed_plot(speeds)},
        artifacts={},
        next_steps=speculative_lines(target.name, source.expression),
        claims=speculative.CLAIMS,
    )


if __name__ == "__main__":
    run(main, parse)
