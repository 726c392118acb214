"""Word problems with solutions, such as gsm8k's, on a real model, by PPO or by expert iteration, over several seeds.

    python benchmarks/own_reasoning.py --model_name_or_path NAME --problems gsm8k_train.jsonl

Problems whose question and solution are short are dealt out by the seed. `hfllm reason` fine-tunes the model on the
solutions, and on the answers alone as a control; PPO on exact match starts from the first, and a control of it learns
from the same rewards dealt out by chance. With `--expert_config` the model is fine-tuned on the same solutions, and
`hfllm expert_iteration` learns its right responses to other problems, of which it is told no solution; the control
learns as many responses drawn by chance. Prints a table of the held-out answers of each seed, greedy ones of PPO and
sampled ones of expert iteration; finished runs stay. Other flags go to `hfllm reason`, such as `--use_peft`.
"""

import argparse
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from own_parts import claim, columns_of, parsed, parser_of, run_recipe, table_of, with_config, write_lines

from hfllm.data.sources import load_source
from hfllm.errors import refuse_if

# The lines of the table, by metric.
LINES = {
    "base_right": "as it was",
    "direct_right": "tuned on answers alone (control)",
    "thoughts_right": "tuned on solutions",
    "rl_right": "and PPO on exact match",
    "shuffled_right": "and PPO on shuffled rewards (control)",
    "sampled_right": "tuned on solutions",
    "iterated_right": "and expert iteration",
    "drawn_right": "and expert iteration on responses drawn by chance (control)",
    "iterated_right_change": "change by expert iteration",
    "drawn_right_change": "change of the control",
}
# gsm8k's notes for a calculator, <<48/2=24>>: nobody computes them here, and they double the length.
NOTE = re.compile(r"<<[^>]*>>")
Row = dict[str, str]


def problems_of(path: str, longest: int) -> list[Row]:
    """Return the problems of at most `longest` characters, question and solution together, without the notes."""
    both = (columns_of(row, path, "question", "answer") for row in load_source(path).rows)
    rows = [(question, NOTE.sub("", answer)) for question, answer in both]
    # Fine-tuning reads the completion; the others compare with the answer.
    return [
        {"prompt": question, "answer": solution, "completion": solution}
        for question, solution in rows
        if len(question) + len(solution) <= longest
    ]


def write_rows(folder: Path, rows: Sequence[Row], seed: int, counts: Mapping[str, int]) -> None:
    """Write a file for each part, of as many problems as `counts` says, drawn by the seed; none is in two parts."""
    drawn = random.Random(f"own-reasoning-{seed}").sample(rows, sum(counts.values()))
    for name, count in counts.items():
        part, drawn = drawn[:count], drawn[count:]
        write_lines(folder / f"{name}.jsonl", part)


def counts_of(args: argparse.Namespace) -> dict[str, int]:
    """Return the problems of each part; the held-out ones are written last and say that all is there."""
    answered = {"answered": args.answered} if args.expert_config else {}
    return {"problems": args.rows, **answered, "held_out": args.questions}


def run(args: argparse.Namespace, flags: Sequence[str], rows: Sequence[Row], seed: int) -> dict[str, float]:
    """Return the metrics of one seed; `flags` are those of `hfllm reason`."""
    folder = Path(args.output_dir, f"seed_{seed}")
    if not (folder / "held_out.jsonl").is_file():
        write_rows(folder, rows, seed, counts_of(args))
    return iterate(args, folder, seed) if args.expert_config else reason(args, flags, folder, seed)


def reason(args: argparse.Namespace, flags: Sequence[str], folder: Path, seed: int) -> dict[str, float]:
    """Return the metrics of `hfllm reason`."""
    words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", folder / "problems.jsonl"]
    words += ["--eval_dataset_name", folder / "held_out.jsonl", "--num_eval_prompts", args.questions]
    words += ["--seed", seed, "--output_dir", folder / "reason"]
    words += with_config(args.sft_config, "--sft_config") + with_config(args.rlhf_config, "--rlhf_config")
    return run_recipe("reason", *words, *flags)


def iterate(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Return the metrics of expert iteration and its control, both from the model tuned on solutions."""
    tuned, metrics = folder / "tuned", {}
    if not (tuned / "config.json").is_file():
        words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", folder / "problems.jsonl"]
        run_recipe("sft", *words, "--seed", seed, "--output_dir", tuned, *with_config(args.sft_config))
    words = ["--model_name_or_path", tuned, "--reward_funcs", "exact_match", "--seed", seed]
    words += ["--dataset_name", folder / "answered.jsonl", "--eval_dataset_name", folder / "held_out.jsonl"]
    words += ["--num_eval_prompts", args.questions, "--config", args.expert_config]
    for name, flags in (("iterated", []), ("drawn", ["--shuffle_rewards"])):
        share_responses(folder / "iterated", folder / name)
        found = run_recipe("expert_iteration", *words, *flags, "--output_dir", folder / name)
        for start, model in (("right_before", "sampled_right"), ("right_after", f"{name}_right")):
            metrics |= {model + key.removeprefix(start): found[key] for key in found if key.startswith(start)}
        metrics |= {f"{name}_{key}": found[key] for key in found if key.startswith("right_change")}
    return metrics


def share_responses(source: Path, target: Path) -> None:
    """Let a run choose among the responses of another's first round, which the same model would give again."""
    responses = Path("data", "round_1_responses.json")
    if (source / responses).is_file() and not (target / responses).exists():
        (target / responses).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / responses, target / responses)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument("--problems", required=True, help="Rows of question and answer, which ends in '#### 42'.")
    parser.add_argument("--output_dir", default="outputs/own_reasoning")
    parser.add_argument("--longest", type=int, default=300, help="Characters of question and solution at most.")
    parser.add_argument("--rows", type=int, default=512, help="Problems to learn.")
    parser.add_argument("--answered", type=int, help="Problems to sample from in expert iteration; 400.")
    parser.add_argument("--questions", type=int, default=256, help="Held-out problems.")
    parser.add_argument("--sft_config", help="YAML flags of fine-tuning.")
    parser.add_argument("--rlhf_config", help="YAML flags of PPO.")
    parser.add_argument("--expert_config", help="YAML flags of expert iteration, in place of PPO.")
    args, flags = parsed(parser, argv, takes_others=True)
    if args.expert_config and (flags or args.rlhf_config):
        parser.error("--expert_config leaves out hfllm reason: flags of it, and --rlhf_config, have no effect")
    if args.answered and not args.expert_config:
        parser.error("--answered has no effect without --expert_config")
    args.answered = args.answered or 400
    rows, asked = problems_of(args.problems, args.longest), sum(counts_of(args).values())
    reason = f"{args.problems}: {len(rows)} problems of at most --longest {args.longest} characters"
    refuse_if(asked > len(rows), f"{reason}; --rows, --answered and --questions ask for {asked}")
    claim(args)
    results = {seed: run(args, flags, rows, seed) for seed in args.seeds}
    print(table_of(["held-out problems, right"], (([title], name) for name, title in LINES.items()), results))


if __name__ == "__main__":
    main()
