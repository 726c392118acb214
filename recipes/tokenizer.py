"""Train a tokenizer on text, and see what its size buys.

    python recipes/tokenizer.py --dataset_name my_texts.jsonl --vocab_size 32768
    python recipes/tokenizer.py --dataset_mixture wiki.txt:0.7 code.jsonl:0.3 --objective infilling
    accelerate launch recipes/pretrain.py --dataset_name my_texts.jsonl --tokenizer_name_or_path outputs/tokenizer

A byte-level BPE with the family's chat template, lossless on any text: what recipes/pretrain.py trains by itself when
none is named. The report compares it with its own smaller sizes on held-out text, to choose one by.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.runs.command_line import finished_run, main_process, parse_recipe, run


@dataclass
class TokenizerArguments(DataArguments):
    """What to train on, and how large."""

    num_documents: int = field(default=40000, metadata={"help": "Documents of the embedded world to train on."})
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several datasets in place of --dataset_name, each NAME:WEIGHT; weights are shares of the bytes."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Upper bound on the number of tokens."})
    max_position_embeddings: int = field(default=2048, metadata={"help": "Context of the models it is for."})
    objective: str = field(
        default="causal",
        metadata={
            "help": "What pretraining will predict: 'masked' and 'infilling' have special tokens of their own.",
            "choices": ["causal", "masked", "infilling"],
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the held-out split, and of the world's documents."})
    output_dir: str = field(default="outputs/tokenizer", metadata={"help": "Where the tokenizer goes."})


def parse(argv: Sequence[str]) -> tuple:
    return parse_recipe((TokenizerArguments,), argv, None, __doc__)


def main(script_args: TokenizerArguments) -> dict[str, float]:
    """Train, measure, save the tokenizer and the report. Returns the metrics."""
    from hfllm.data.loading import check_source
    from hfllm.data.mixtures import load_sources
    from hfllm.data.prepared import Prepared
    from hfllm.outputs.report import Plot, Report
    from hfllm.runs.stage import stage_arguments
    from hfllm.stages.pretraining import make_tokenizer

    check_source(script_args)
    began, folder = time.perf_counter(), Path(script_args.output_dir)
    arguments = stage_arguments(script_args)
    done = finished_run(str(folder), arguments)
    if done is not None:
        if main_process():
            print(f"tokenizer: already done in {folder} (remove that folder to redo it)")
        return done["metrics"]
    if not main_process():
        return {}
    print(f"\n=== tokenizer -> {folder}", flush=True)
    prepared = Prepared(folder / "prepared", arguments)
    _, texts, held_out = load_sources(script_args, script_args.seed, prepared)
    tokenizer = make_tokenizer(script_args, texts)
    rows = sizes(tokenizer, held_out)
    tokenizer.save_pretrained(folder)
    prepared.remove()
    report = Report(
        stage="tokenizer",
        arguments=arguments,
        metrics={"documents": len(texts), **rows[-1]},
        tables={"Held-out text by size": rows},
        curves={
            "compression": Plot(
                "tokenizer: bytes a token of held-out text",
                "vocabulary",
                "bytes a token",
                {"": ([row["vocab_size"] for row in rows], [row["bytes_per_token"] for row in rows])},
            )
        },
        artifacts={"tokenizer": "."},
        wall_seconds=time.perf_counter() - began,
        next_steps=[f"accelerate launch recipes/pretrain.py --tokenizer_name_or_path {folder}"],
    )
    report.write(folder)
    report.print()
    return report.metrics


def sizes(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, float]]:
    """What held-out texts cost under the tokenizer, and under its own beginnings, each half as large as the next."""
    from hfllm.data.tokenizer import truncated_tokenizer

    wanted = [len(tokenizer)]
    # Bytes and special tokens alone are some 270.
    while wanted[0] // 2 > 300:
        wanted.insert(0, wanted[0] // 2)
    num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    rows = []
    for size in wanted:
        encoded = truncated_tokenizer(tokenizer, size)(list(texts), add_special_tokens=False)["input_ids"]
        tokens = sum(map(len, encoded))
        rows.append(
            {
                "vocab_size": size,
                "bytes_per_token": num_bytes / max(tokens, 1),
                "tokens_per_word": tokens / max(words, 1),
                "share_of_vocabulary_used": len({token for ids in encoded for token in ids}) / size,
            }
        )
    return rows


if __name__ == "__main__":
    run(main, parse)
