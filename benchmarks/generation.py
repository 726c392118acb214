"""Tokens per second of every way to decode, against transformers' `generate` on LlamaForCausalLM of the same weights.

    OMP_NUM_THREADS=1 hfllm speculative                  # makes outputs/speculative/sft and draft
    OMP_NUM_THREADS=1 python benchmarks/generation.py --output benchmarks/results/generation.md

`--random_weights 10M` measures an untrained model of that size on random prompts, whose answers never end.
All methods run in one process in alternation, and the ratio to plain `generate` is the median of the ratios within a
round; times are CPU-seconds. The output of each is compared with the plain one's. The time of `torch.compile` is
reported beside the table, not inside it. A second table has the bytes per token of each of transformers' caches.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfllm.errors import InputError

WORLD_MODEL, WORLD_DRAFT = "outputs/speculative/sft", "outputs/speculative/draft"
PLAIN = "Llama, generate"
# hidden_size, intermediate_size, layers, heads, key-value heads, vocab_size
SHAPES = {
    "1M": (128, 384, 4, 4, 4, 2048),
    "10M": (288, 768, 8, 6, 2, 8192),
    "60M": (640, 1728, 12, 10, 5, 8192),
}
RANDOM_PROMPT = 32


def random_llama(size: str) -> Any:
    """Return a Llama of a size in `SHAPES` with its initial weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    )
    return LlamaForCausalLM(config).eval()


class Prompts:
    """Batches of the world's held-out questions, or of texts in a file, one per line."""

    def __init__(self, tokenizer: Any, count: int, batch_size: int, path: str | None):
        if tokenizer is None:
            import torch

            ids = torch.randint(4, 2000, (count, RANDOM_PROMPT), generator=torch.Generator().manual_seed(batch_size))
            self.batches = [
                {"input_ids": part, "attention_mask": part.ne(-1).long()} for part in ids.split(batch_size)
            ]
            return
        from hfllm.data.tokenizer import tokenize_prompts
        from hfllm.data.world.world import World

        if path:
            prompts: list = Path(path).read_text().splitlines()[:count]
        else:
            prompts = [task.prompt_row()["prompt"] for task in World(0).evaluation_tasks(count)]
        ids = tokenize_prompts(prompts, tokenizer)
        pad = {"padding_side": "left", "return_tensors": "pt"}
        parts = [ids[at : at + batch_size] for at in range(0, len(ids), batch_size)]
        self.batches = [tokenizer.pad({"input_ids": part}, **pad) for part in parts]


def load(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Return the model as ours and as Llama, the draft model or `None`, and the tokenizer."""
    from transformers import AutoModelForCausalLM

    import hfllm
    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    if args.random_weights:
        llama = random_llama(args.random_weights)
        with tempfile.TemporaryDirectory() as folder:
            llama.save_pretrained(folder)
            return hfllm.from_native(folder).eval(), llama, None, None
    if not Path(args.model_name_or_path).is_dir():
        sys.exit(f"{args.model_name_or_path}: no such folder; hfllm speculative makes it")
    tokenizer = saved_tokenizer(args.model_name_or_path)
    ours = saved_model(AutoModelForCausalLM, args.model_name_or_path).eval()
    if ours.config.model_type != "hfllm":
        ours = hfllm.from_native(args.model_name_or_path).eval()
    with tempfile.TemporaryDirectory() as folder:
        hfllm.to_native(ours, folder)
        llama = saved_model(AutoModelForCausalLM, folder).eval()
    named = args.assistant_model_name_or_path or (WORLD_DRAFT if args.model_name_or_path == WORLD_MODEL else None)
    if named and not Path(named).is_dir():
        sys.exit(f"{named}: no such folder; hfllm speculative makes the world's")
    draft = saved_model(AutoModelForCausalLM, named).eval() if named else None
    if type(llama).__name__ != "LlamaForCausalLM":
        sys.exit(f"{args.model_name_or_path} is a {type(llama).__name__} to transformers: this compares Llamas")
    return ours, llama, draft, tokenizer


class Ways:
    """Every way to decode the batches: name -> a function that returns the new tokens of each row."""

    def __init__(self, ours: Any, llama: Any, draft: Any, batches: list, options: dict[str, Any], compile: bool):
        self.batches, self.options, self.found = batches, options, {}
        single = len(batches[0]["input_ids"]) == 1
        self.runs: dict[str, Callable[[], list[list[int]]]] = {
            PLAIN: self._generate(llama),
            "Llama, generate, static cache": self._generate(llama, cache_implementation="static"),
            "Llama, generate, fp8 cache": self._generate(
                llama, cache_implementation="quantized", cache_config={"backend": "fp8"}
            ),
            "hfllm, generate": self._generate(ours),
        }
        if single:
            self.runs["Llama, assisted, prompt lookup"] = self._generate(llama, prompt_lookup_num_tokens=4)
        if single and draft is not None:
            self.runs["Llama, assisted, draft model"] = self._generate(llama, assistant_model=draft)
        self._add_ours(ours, draft, compile)

    def keep(self, wanted: list[str]) -> None:
        """Keep the methods with one of these words in their names, and plain `generate`."""
        for word in wanted:
            if not any(word in name for name in self.runs):
                sys.exit(f"--ways {word}: no such way; there are {', '.join(self.runs)}")
        self.runs = {
            name: run for name, run in self.runs.items() if name == PLAIN or any(word in name for word in wanted)
        }

    def _add_ours(self, ours: Any, draft: Any, compile: bool) -> None:
        from hfllm.generation import fast_generate
        from hfllm.generation.speculative import EarlyExitDraft, Int8Draft, ModelDraft, PromptLookupDraft
        from hfllm.generation.speculative.drafts import AdaptiveDraftLength
        from hfllm.generation.speculative.measure import measure_costs
        from hfllm.generation.speculative.speculative import recommended_draft

        # docs/guides/generation.md: a trained draft where there is one, else what fast_generate chooses.
        chosen = "draft model" if draft is not None else "int8 draft" if recommended_draft(ours) else "no draft"
        fast = {"custom_generate": fast_generate, "draft": "auto" if draft is None else draft}
        self.runs[f"ours, recommended ({chosen})"] = self._generate(ours, **fast)
        drafts = {"prompt lookup": PromptLookupDraft(), "early exit": EarlyExitDraft(), "int8": Int8Draft()}
        if draft is not None:
            drafts["draft model"] = ModelDraft(draft)
        for compiled in (False, True) if compile else (False,):
            suffix = ", compiled" if compiled else ""
            self.runs[f"ours, plain{suffix}"] = self._speculate(ours, "plain", None, 0, compiled)
            for name, source in drafts.items():
                if compiled and name == "int8":
                    continue
                costs = measure_costs(ours, source, self.batches[0], compile=compiled, clock=time.process_time)
                print(f"{name}{suffix}: draft {costs.draft:.2f}, verification {costs.verification:.2f}", flush=True)
                # Compiled runs of the target are always as wide as the longest draft.
                num_draft_tokens = 4 if compiled else AdaptiveDraftLength(costs.per_draft)
                label = f"ours, {name}{suffix}"
                self.runs[label] = self._speculate(ours, label, source, num_draft_tokens, compiled)

    def _generate(self, model: Any, **settings: Any) -> Callable[[], list[list[int]]]:
        def run() -> list[list[int]]:
            outputs = (model.generate(**batch, **self.options, **settings) for batch in self.batches)
            return self._new(outputs)

        return run

    def _speculate(self, model: Any, name: str, draft: Any, num_draft_tokens: Any, compiled: bool) -> Callable:
        from hfllm.generation.speculative.measure import speculative

        def run() -> list[list[int]]:
            settings = {**self.options, "num_draft_tokens": num_draft_tokens, "compile": compiled}
            outputs, self.found[name] = speculative(model, draft, self.batches, **settings)
            return self._new(outputs)

        return run

    def _new(self, outputs: Any) -> list[list[int]]:
        """Return the new tokens of each row without the padding after them."""
        rows, pad = [], self.options["pad_token_id"]
        for batch, output in zip(self.batches, outputs, strict=True):
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                while row and row[-1] == pad:
                    row.pop()
                rows.append(row)
        return rows


def compare(ways: Ways, rounds: int) -> list[str]:
    """Return the rows of the table; the first run of each is a warm-up, whose time is reported separately."""
    first, outputs, seconds = {}, {}, {name: [] for name in ways.runs}
    for name, run in ways.runs.items():
        began = time.process_time()
        outputs[name] = run()
        first[name] = time.process_time() - began
    for number in range(rounds):
        for name in list(ways.runs) if number % 2 else list(ways.runs)[::-1]:
            began = time.process_time()
            ways.runs[name]()
            seconds[name].append(time.process_time() - began)
    rows = []
    for name in ways.runs:
        amount = sum(map(len, outputs[name]))
        pairs = zip(seconds[PLAIN], seconds[name], strict=True)
        # Tokens per second, so that a cache that changes the output is not faster by generating less.
        ratio = statistics.median(theirs / mine for theirs, mine in pairs) * amount / sum(map(len, outputs[PLAIN]))
        same = sum(a == b for a, b in zip(outputs[name], outputs[PLAIN], strict=True)) / len(outputs[PLAIN])
        seen = ways.found.get(name)
        drafting = f"{seen.acceptance_rate:.2f} | {seen.tokens_per_target_call:.2f}" if seen else "| "
        speed = amount / statistics.median(seconds[name])
        rows.append(f"| {name} | {speed:.0f} | {ratio:.2f} | {same:.2f} | {drafting} | {first[name]:.1f} |")
        print(rows[-1], flush=True)
    return rows


def caches(model: Any, batch: Any, max_new_tokens: int, rounds: int) -> list[str]:
    """Return the rows of transformers' caches with `generate`: bytes per token, beside the planner's figure."""
    from hfllm.generation.caches import measure_caches
    from hfllm.scaling.shapes import Shape

    planned = Shape.from_config(model.config.to_dict()).kv_bytes_per_token(model.dtype.itemsize)
    rows = []
    for row in measure_caches(model, batch, max_new_tokens, rounds=rounds):
        cells = "| | " if row["note"] else f"{row['bytes_per_token']:.0f} | {planned} | {row['same_tokens']:.2f} "
        rows.append(f"| {row['cache']} | {cells}| {row['note']} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=WORLD_MODEL)
    parser.add_argument("--assistant_model_name_or_path", help="A draft model; the world's with the world's model.")
    parser.add_argument("--random_weights", choices=list(SHAPES), help="Measure an untrained model of this size.")
    parser.add_argument("--prompts", help="A file of prompts, one per line; by default the world's questions.")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", help="Words of the ways to measure, as 'recommended' 'plain'; else all.")
    parser.add_argument("--compile", action="store_true", help="Also measure compiled models.")
    parser.add_argument("--output", help="A Markdown file to write.")
    args = parser.parse_args()
    import torch
    import transformers

    ours, llama, draft, tokenizer = load(args)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else 0,
    }
    lines = [
        "# Ways to decode, against transformers' `generate`",
        "",
        f"`{' '.join(['python', *sys.argv])}` on {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {ours.num_parameters():,} parameters"
        + (f", draft of {draft.num_parameters():,}." if draft is not None else "."),
        "",
    ]
    for size in args.batch_sizes:
        prompts = Prompts(tokenizer, args.num_prompts, size, args.prompts)
        ways = Ways(ours, llama, draft, prompts.batches, options, args.compile)
        if args.ways:
            ways.keep(args.ways)
        lines += [f"## Batch {size}", ""]
        lines += [
            "| way | tokens/CPU-s | ratio | same | accepted | tokens per run | first time, CPU-s |",
            "|" + " - |" * 7,
        ]
        lines += [*compare(ways, args.rounds), ""]
        if not args.ways:
            lines += ["| cache | bytes per token | planned | same tokens | why not |", "|" + " - |" * 5]
            lines += [*caches(ours, prompts.batches[0], args.max_new_tokens, args.rounds), ""]
    if args.output:
        from hfllm.outputs.report import write_atomically

        write_atomically(Path(args.output), "\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
