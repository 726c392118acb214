"""What is an objective good for? The same tokens and size, causal and masked, as classifier, tagger and generator.

    python benchmarks/objectives.py --seeds 1 2 3 --output_dir outputs/objectives

Both models of a seed have one tokenizer, one size, the same documents of the embedded world and as many steps. Each
gets a head for texts, for words and for spans (`hfllm classify`), with the same settings. As generators they continue
held-out questions: the causal model token by token, the masked one by filling as many masks as the answer has tokens,
from left to right, which tells it the length. Printed are means over seeds with the spread of the seeds, beside a
logistic regression on words; writes `objectives.json`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from hfllm.data.labelled import SPANS, TEXT, WORDS
from hfllm.data.world.world import World
from hfllm.evaluation.emergence import ZERO_SHOT, answer_scores, make_probes
from hfllm.models.loading.saved import saved_model, saved_tokenizer
from hfllm.outputs.report import markdown_table
from hfllm.runs.recipes import load_recipe

OBJECTIVES = ("masked", "causal")
# Name of the row, task, flags, and the figure that is shown.
HEADS = (
    ("classifier: accuracy", TEXT, [], "accuracy"),
    ("tagger, first token of a word: F1", WORDS, [], "entity_f1"),
    ("tagger, last token of a word: F1", WORDS, ["--label_token", "last"], "entity_f1"),
    ("spans: exact match", SPANS, [], "exact_match"),
    ("spans: F1", SPANS, [], "f1"),
)
GENERATES = ("generator: exact match", "generator: tokens right")


def pretrained(objective: str, folder: Path, tokenizer: Path | None, args: argparse.Namespace, seed: int) -> Path:
    """Pretrain by the recipe, unless that has been done; return the model's folder."""
    recipe, out = load_recipe("pretrain"), folder / objective
    words = ["--config", "pretrain/world", "--packing", "true", "--objective", objective, "--seed", str(seed)]
    words += ["--num_documents", str(args.num_documents), "--max_length", "256", "--sample_steps", "0"]
    words += ["--hidden_size", str(args.hidden_size), "--num_hidden_layers", str(args.num_hidden_layers)]
    words += ["--num_train_epochs", str(args.num_train_epochs), "--output_dir", str(out)]
    words += ["--per_device_train_batch_size", str(args.per_device_train_batch_size)]
    words += ["--tokenizer_name_or_path", str(tokenizer)] if tokenizer else []
    recipe.main(*recipe.parse(words))
    return out


def with_head(model: Path, task: str, flags: Sequence[str], args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train a head by the recipe, unless that has been done; return its figures."""
    recipe = load_recipe("classify")
    out = model.parent / f"{model.name}-{task}{''.join(flags[1:])}"
    words = ["--config", "classify/world", "--model_name_or_path", str(model), "--task", task, "--seed", str(seed)]
    words += ["--num_examples", str(args.num_examples), "--num_eval_examples", str(args.num_eval_examples)]
    return recipe.main(*recipe.parse([*words, "--output_dir", str(out), *flags]))


def filled_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[dict[str, float]]:
    """Return exact match and token match of answers that a masked model fills in, one mask after the other.

    All masks of the answer and the end of the document stand there from the beginning. As in `answer_scores`, a token
    counts as right if it is the likeliest after the true ones before it.
    """
    scores, start = [], [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        masks = [tokenizer.mask_token_id] * len(after)
        rows = [[*before, *after[:place], *masks[place:], tokenizer.eos_token_id] for place in range(len(after))]
        with torch.inference_mode():
            best = model(torch.tensor(rows)).logits.argmax(-1)
        hits = [int(best[place, len(before) + place]) == token for place, token in enumerate(after)]
        scores.append({"exact_match": float(all(hits)), "token_match": sum(hits) / len(hits)})
    return scores


def generated(folder: Path, objective: str, count: int) -> dict[str, float]:
    """Return how a model continues held-out questions of the world, zero-shot."""
    probes = [probe for probe in make_probes(World(0), count, 0) if probe.kind == ZERO_SHOT]
    prompts, answers = [probe.prompt for probe in probes], [f" {probe.answer}" for probe in probes]
    auto_class = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    model, tokenizer = saved_model(auto_class, str(folder)).eval(), saved_tokenizer(str(folder))
    score = filled_scores if objective == "masked" else answer_scores
    rows = score(model, tokenizer, prompts, answers)
    names = zip(GENERATES, ("exact_match", "token_match"), strict=True)
    return {name: statistics.mean(row[metric] for row in rows) for name, metric in names}


def of_seed(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of both models of a seed, and of the control."""
    folder, tokenizer, found = args.output_dir / f"seed{seed}", None, {"bag of words": {}}
    for objective in OBJECTIVES:
        model = pretrained(objective, folder, tokenizer, args, seed)
        # Both read the same tokens; the masked model's tokenizer has a mask.
        tokenizer, found[objective] = model, generated(model, objective, args.num_probes)
        for name, task, flags, metric in HEADS:
            metrics = with_head(model, task, flags, args, seed)
            found[objective][name] = metrics[metric]
            found["bag of words"][name] = metrics[f"bag_of_words_{metric}"]
    return found


def table_of(seeds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Return the rows of the table: means, with the standard deviation over seeds where there are several."""
    rows = []
    for name in [*(each[0] for each in HEADS), *GENERATES]:
        row = {"": name}
        for arm in ("causal", "masked", "bag of words"):
            values = [found[arm][name] for found in seeds if name in found[arm]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            row[arm] = f"{statistics.mean(values):.3f}{spread}" if values else ""
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/objectives"))
    parser.add_argument("--num_documents", type=int, default=20000)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="rows of 256 tokens")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_examples", type=int, default=1500)
    parser.add_argument("--num_eval_examples", type=int, default=600)
    parser.add_argument("--num_probes", type=int, default=30, help="questions of each family to continue")
    args = parser.parse_args(arguments)
    seeds = [of_seed(seed, args) for seed in args.seeds]
    (args.output_dir / "objectives.json").write_text(json.dumps(dict(zip(args.seeds, seeds, strict=True)), indent=2))
    print("\n" + "\n".join(markdown_table(table_of(seeds))))


if __name__ == "__main__":
    main()
