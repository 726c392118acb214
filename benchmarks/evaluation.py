"""Multiple choice by ours and by lm-evaluation-harness: figures and CPU-seconds; and how often error bars hold.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --model SMOLLM2_FOLDER --truthfulqa TruthfulQA.csv
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --coverage outputs/rlhf/sft outputs/rlhf

The first needs lm-eval 0.4.13 with sacrebleu and rouge-score, a model and the CSV of TruthfulQA. Both ask the first
questions, as text, without a chat template, from the same loaded model in fp32. lm-eval's tasks are its own of
TruthfulQA, over a local file.

The second answers many questions of the world, whose gold is exact, by two models. Their means over all of them are
the truth; draws of fewer questions have intervals, which are to hold it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hfllm.evaluation.suites.base import Subject
from hfllm.evaluation.suites.truthfulness import Question, TruthfulQA, asked_as
from hfllm.models.loading.saved import saved_model, saved_tokenizer

PROCESS = """from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as process
"""


def write_tasks(folder: Path, subject: Subject, questions: Sequence[Question]) -> None:
    """Write the questions and the two tasks that lm-eval has for them, with the prompt of its own."""
    rows = {
        "mc1": [{"targets": {"choices": [each.best, *each.wrong]}} for each in questions],
        "mc2": [
            {"targets": {"choices": [*each.true, *each.false], "labels": [1] * len(each.true) + [0] * len(each.false)}}
            for each in questions
        ],
    }
    (folder / "process.py").write_text(PROCESS, encoding="utf-8")
    for name, more in (("mc1", ""), ("mc2", "process_results: !function process.process\n")):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for row, question in zip(rows[name], questions, strict=True):
                told = {"prompt": asked_as(subject, question.question), f"{name}_targets": row["targets"]}
                stream.write(json.dumps(told) + "\n")
        (folder / f"{name}.yaml").write_text(
            f"task: ours_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/{name}.jsonl\n"
            f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{prompt}}}}'\ndoc_to_target: 0\n"
            f"doc_to_choice: '{{{{{name}_targets.choices}}}}'\nmetric_list:\n  - metric: acc\n{more}",
            encoding="utf-8",
        )


def by_lm_eval(subject: Subject, folder: Path) -> dict[str, list[float]]:
    """Return lm-eval's figure of each question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=subject.batch_size)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model, tasks=["ours_mc1", "ours_mc2"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return {
        name: [each["acc"] for each in sorted(found["samples"][f"ours_{name}"], key=lambda each: each["doc_id"])]
        for name in ("mc1", "mc2")
    }


def by_us(subject: Subject, suite: TruthfulQA) -> dict[str, list[float]]:
    """Return our figures of each question."""
    records = list(suite.judge(subject, suite.items()))
    return {name: [each["scores"][name] for each in records] for name in ("mc1", "mc2", "mc3")}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the CPU-seconds that it took."""
    began = time.process_time()
    return run(), time.process_time() - began


POOL, DRAWN, REPETITIONS = 1500, (50, 100, 200), 1000


def coverage(names: Sequence[str]) -> None:
    """Print in how many of the repetitions the 95% intervals hold the truth, by the number of questions drawn."""
    from itertools import islice

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from hfllm.data.world.world import World
    from hfllm.evaluation.suites.world_suites import judge_tasks
    from hfllm.outputs.statistics import difference_interval, mean_interval

    torch.set_num_threads(1)
    tasks = list(islice(World(0).tasks(seed=11, held_out=True), POOL))
    gold = []
    for name in names:
        model, tokenizer = saved_model(AutoModelForCausalLM, name), saved_tokenizer(name)
        answers = judge_tasks(model, tokenizer, tasks, 40, do_sample=True, seed=5)
        gold.append(np.array([each["gold"] for each in answers]))
    right = [(each >= 0.5).astype(float) for each in gold]
    print(
        f"gold {[round(float(each.mean()), 4) for each in gold]}, right {[round(float(e.mean()), 4) for e in right]}"
    )
    rng = np.random.default_rng(0)
    for count in DRAWN:
        held = dict.fromkeys(("gold", "gold difference", "right", "right difference"), 0)
        for _ in range(REPETITIONS):
            rows = rng.integers(0, POOL, count)
            for name, (one, other) in (("gold", gold), ("right", right)):
                found, apart = mean_interval(one[rows]), difference_interval(one[rows], other[rows])
                held[name] += found.low <= one.mean() <= found.high
                held[f"{name} difference"] += apart.low <= (other - one).mean() <= apart.high
        print(f"{count} questions: { ({name: float(hits) / REPETITIONS for name, hits in held.items()}) }", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--truthfulqa")
    parser.add_argument("--coverage", nargs=2, metavar=("SFT", "ALIGNED"))
    parser.add_argument("--num_items", type=int, default=50)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 1, 3])
    parser.add_argument("--without_lm_eval", action="store_true")
    args = parser.parse_args()
    if args.coverage:
        coverage(args.coverage)
        return

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tokenizer = saved_tokenizer(args.model)
    model = saved_model(AutoModelForCausalLM, args.model, dtype=torch.float32)
    suite = TruthfulQA(args.truthfulqa, args.num_items)
    ours = {}
    for size in args.batch_sizes:
        ours[size], seconds = timed(lambda size=size: by_us(Subject("ours", model, tokenizer, False, size), suite))
        means = {name: sum(values) / len(values) for name, values in ours[size].items()}
        print(f"ours, batch size {size}: {seconds:.1f} CPU-seconds, {means}", flush=True)
    first = ours[args.batch_sizes[0]]
    for size, others in ours.items():
        apart = {name: max(abs(a - b) for a, b in zip(first[name], others[name], strict=True)) for name in first}
        print(f"largest difference of a question, batch sizes {args.batch_sizes[0]} and {size}: {apart}")
    if args.without_lm_eval:
        return
    subject = Subject("ours", model, tokenizer, False, args.batch_sizes[0])
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), subject, [item.body for item in suite.items()])
        theirs, seconds = timed(lambda: by_lm_eval(subject, Path(folder)))
    print(f"lm-eval: {seconds:.1f} CPU-seconds, { {name: sum(v) / len(v) for name, v in theirs.items()} }")
    finite = [place for place, value in enumerate(theirs["mc2"]) if value == value]
    print(f"mc1 of each question equal: {first['mc1'] == theirs['mc1']}; mc2 finite in {len(finite)}")
    apart = [abs(first["mc2"][place] - theirs["mc2"][place]) for place in finite]
    print(f"mc2: largest difference of a question {max(apart):.2e}, of the mean {abs(sum(apart)) / len(apart):.2e}")


if __name__ == "__main__":
    main()
