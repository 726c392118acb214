"""Train a tokenizer on text, and report its compression by size.

    hfllm tokenizer --dataset_name my_texts.jsonl --vocab_size 32768
    hfllm tokenizer --dataset_mixture wiki.txt:0.7 code.jsonl:0.3 --objective infilling
    hfllm pretrain --dataset_name my_texts.jsonl --tokenizer_name_or_path outputs/tokenizer
    python recipes/tokenizer.py --dataset_name my_texts.jsonl

A byte-level BPE with the family's chat template, lossless on any text: the same that `hfllm pretrain` trains when
none is named. The report compares it with its own smaller sizes on held-out text, to choose a size.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.pretrain.tokenizer import TokenizerArguments

RECIPE = Recipe(in_one_process=True, writes="tokenizer", unfinished="prepared")


def parse(argv: Sequence[str]) -> tuple[TokenizerArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, TokenizerArguments)


@releases_folders
def main(script_args: TokenizerArguments) -> dict[str, float]:
    """Train, measure, save the tokenizer and the report. Return the metrics."""
    from pathlib import Path

    from hfllm.data.loading import load_sources
    from hfllm.data.packing import Prepared
    from hfllm.outputs.report import Plot, by_contents
    from hfllm.runs.stage import Stage
    from hfllm.stages.pretrain.tokenizer import compression_by_size, make_tokenizer

    stage = Stage("tokenizer", script_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    if not main_process():
        return {}
    stage.announce()

    prepared = Prepared(Path(script_args.output_dir) / "prepared", by_contents(stage.arguments))
    weights = script_args.mixture_weights
    _, texts, held_out = load_sources(script_args.text_sources, weights, script_args.seed, prepared)
    size, context = script_args.vocab_size, script_args.max_position_embeddings
    tokenizer = make_tokenizer(texts, size, context, script_args.objective, script_args.world_texts)
    rows = compression_by_size(tokenizer, held_out)
    tokenizer.save_pretrained(script_args.output_dir)
    prepared.remove()

    by_size = {"": ([row["vocab_size"] for row in rows], [row["bytes_per_token"] for row in rows])}
    title = "tokenizer: bytes per token of held-out text"
    return stage.finish(
        {"documents": len(texts), **rows[-1]},
        tables={"Held-out text by size": rows},
        curves={"compression": Plot(title, "vocabulary", "bytes per token", by_size)},
        artifacts={"tokenizer": "."},
        next_steps=[f"hfllm pretrain --tokenizer_name_or_path {script_args.output_dir}"],
    )


if __name__ == "__main__":
    run(main, parse)
