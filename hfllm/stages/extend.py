"""Extension to longer texts: its flags and checks, its data, trainer and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import DataArguments, hash_of, split_places, texts_of
from hfllm.data.packing import long_rows, start_of
from hfllm.data.sources import WORLD
from hfllm.data.world.tasks import filler_documents, long_documents
from hfllm.data.world.world import World
from hfllm.errors import refuse_if
from hfllm.evaluation.long_texts import NeedleGrid, find_needles
from hfllm.flags import ABOVE_ONE, ALWAYS, NAMED, Clashes, Fact, Refused, at_least, changed, flag
from hfllm.outputs.figures import change_of, mean_of
from hfllm.outputs.report import Found, Plot
from hfllm.outputs.verdict import Promise
from hfllm.runs.command_line import say
from hfllm.runs.pipeline import by_main_process, write_rows
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

# It must read more, not only stand more: the same model, cut to its old length, is the control.
CLAIMS = [
    Promise(
        "bits per byte beyond the trained length",
        "bits_per_byte_long_after",
        "bits_per_byte_long_cut",
        "reading no more than before",
        is_less=True,
    ),
]


# ---- flags ----


# The libraries' dataclasses of flags accepted by the recipe in addition to its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
# Training texts of the world's base model, under the output folder; so many words fill 128 tokens.
BASE_TEXTS, BASE_WORDS = "base_texts.jsonl", 88


def _is_sharded(training_args: "TrainingArguments") -> bool:
    from hfllm.trainers.engines import shards_parameters

    return shards_parameters(training_args)


@dataclass(frozen=True)
class ExtendArguments(DataArguments):
    """How far the model is extended, how, and what it is judged on."""

    rope_type: str = flag(
        "yarn",
        "How rotary positions are extended: linear, ntk (a higher rope_theta), dynamic, yarn or llama3.",
        # The methods of hfllm.models.extension; a list of flags is too early to import it.
        choices=["linear", "ntk", "dynamic", "yarn", "llama3"],
    )
    factor: float = flag(
        4.0,
        "How many times longer the context becomes, above 1.",
        takes=ABOVE_ONE,
    )
    original_max_position_embeddings: int | None = flag(
        None, "Tokens of the longest text that the model was trained on; by default its context.", takes=at_least(2)
    )
    num_documents: int = flag(12000, "Texts of the world for the base model made here.", takes=at_least(0))
    num_train_texts: int = flag(512, "Rows of the new length to train on, at most.")
    num_eval_texts: int = flag(16, "Held-out rows of the new length, at most.", takes=at_least(2))
    num_needles: int = flag(8, "Needles for each length and depth.", takes=at_least(1))
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the base model, if none is named.", never=NAMED
    )

    # `--max_steps 0` extends without training.
    may_train_nothing: ClassVar[bool] = True
    refused: ClassVar[Refused] = {
        "use_peft": ALWAYS.because("all weights are trained; --max_steps 0 trains none"),
        "load_in_8bit": ALWAYS.because("the extended model is saved in full precision"),
        "load_in_4bit": ALWAYS.because("the extended model is saved in full precision"),
        "resume_from_checkpoint": Fact(lambda flags: flags.max_steps == 0, "--max_steps 0 trains nothing"),
    }
    clashes: ClassVar[Clashes] = {
        "DeepSpeed or FSDP cannot be used here: the model is judged whole in each process": _is_sharded,
    }


def default_settings(user_flags: Mapping[str, object]) -> list[Path]:
    """Return the settings of the embedded world's model, or of your own."""
    return [settings_file("extend/model.yaml" if user_flags.get("model_name_or_path") else "extend/world.yaml")]


def lengths_of(
    config: "PreTrainedConfig", rope_type: str, factor: float, original: int | None = None
) -> tuple[int, int]:
    """Return the training length of the model, and its extended length, in tokens.

    Args:
        config: of the model, whether named or not yet trained.
        rope_type: method of the extension.
        factor: of the lengths, above 1.
        original: the training length; by default the model's context.
    """
    from hfllm.models.extension import extended_config
    from hfllm.models.loading.saved import max_length_of

    extended_config(config, rope_type, factor, original)
    original = max_length_of(config) if original is None else original
    length = int(original * factor)
    refuse_if(length <= original, f"--factor {factor} makes {length} tokens of {original}: expected more")
    return original, length


# ---- data ----
#
# The texts of the recipe to extend a model: training texts of the base, and rows of the new length.


Texts = list[str]

# With fewer texts than this, such as one book, the end of each is held out instead of some of the texts.
FEW_TEXTS = 20
HELD_OUT_END = 0.1


@dataclass(frozen=True)
class Counts:
    """The most rows to train on and to hold out, and the needles for each length and depth."""

    train: int
    held_out: int
    needles: int


@dataclass(frozen=True)
class LongRows:
    """Rows of tokens, all of the new length.

    Args:
        train: to learn from.
        held_out: to judge by.
        fillers: texts around needles, by their origin.
        are_joined: whether short texts were joined for the held-out rows.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    fillers: dict[str, list[list[int]]]
    are_joined: bool


def write_base_texts(world: World, count: int, seed: int, output_dir: str) -> None:
    """Write `count` texts of the world's base model unless the file already has them; other processes wait."""

    def write() -> None:
        rows = ({"text": text} for text in long_documents(world, count, BASE_WORDS, seed))
        write_rows("extend", Path(output_dir) / BASE_TEXTS, rows)

    by_main_process(write)


def split_texts(source: DataArguments, seed: int) -> tuple[Texts, Texts] | None:
    """Return the user's texts to learn from and to judge by; `None` for the world, which writes as many as needed."""
    if source.dataset_name == WORLD:
        return None
    texts = list(texts_of(source.dataset_name, source.hub_part, source.max_samples, source.renaming))
    refuse_if(not texts, f"--dataset_name {source.dataset_name} has no text")
    if len(texts) < FEW_TEXTS:
        cut_texts = [(text, round(len(text) * (1 - HELD_OUT_END))) for text in texts]
        return [text[:cut] for text, cut in cut_texts], [text[cut:] for text, cut in cut_texts]
    train, held_out = split_places(map(hash_of, texts), seed)
    return [texts[index] for index in train], [texts[index] for index in held_out]


def long_rows_of(
    world: World,
    texts: tuple[Texts, Texts] | None,
    counts: Counts,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    seed: int,
) -> LongRows:
    """Return the rows of the new length.

    Args:
        texts: of `split_texts`; those of the world by default.
    """
    train, held_out = texts or (
        list(long_documents(world, count, length, text_seed))
        for count, text_seed in ((counts.train, seed), (counts.held_out, -1 - seed))
    )
    filler = filler_documents(world, max(1000, counts.needles * length // 8), -2 - seed)
    judged, are_joined = long_rows(held_out, tokenizer, length, counts.held_out, seed, "held-out texts")
    learned, _ = long_rows(train, tokenizer, length, counts.train, seed)
    fillers = {"world": long_rows(filler, tokenizer, length, counts.needles, seed)[0]}
    if texts is not None:
        fillers["text"] = judged
    return LongRows(learned, judged, fillers, are_joined)


# ---- evaluation ----
#
# The results of an extended model on long texts, next to the same model before the extension.


# The name of the figures of the model before the extension, reading at most its training length.
CUT = "before, cut"
FILLERS = {"world": "needle", "text": "needle_text"}


@dataclass
class ExtendEvaluation:
    """Judges a model again and again on the same rows and the same needles.

    Args:
        tokenizer: the model's.
        rows: of the new length.
        original: training length of the model, in tokens.
        length: extended length, in tokens.
        rope_type: method of the extension, for titles.
        num_needles: for each length and depth.
        seed: of the needles.
    """

    tokenizer: "PreTrainedTokenizerBase"
    rows: LongRows
    original: int
    length: int
    rope_type: str
    num_needles: int
    seed: int
    nats: "dict[str, torch.Tensor]" = field(default_factory=dict)
    grids: dict[str, dict[str, NeedleGrid]] = field(default_factory=dict)

    def judge(self, model: "PreTrainedModel", when: str, needles: bool = True) -> None:
        """Measure the loss by position, and the needles found.

        Args:
            when: `before`, `extended` (but not yet trained) or `after`.
        """
        from hfllm.generation.scoring import nats_by_position

        say(f"extend: {when}: loss by position{', needles' if needles else ''}")
        self.nats[when] = nats_by_position(model, self.rows.held_out)
        if when == "before":
            start_length = len(start_of(self.tokenizer))
            self.nats[CUT] = nats_by_position(model, self.rows.held_out, window=self.original, kept=start_length)
        if needles:
            lengths, cases = self.lengths, self.num_needles
            self.grids[when] = {
                whose: find_needles(model, self.tokenizer, filler, lengths, cases, seed=self.seed)
                for whose, filler in self.rows.fillers.items()
            }

    @property
    def lengths(self) -> list[int]:
        """The lengths of the needle tests: half the original one, doubled from there on."""
        lengths, length = [], max(self.original // 2, 64)
        while length < self.length:
            lengths.append(length)
            length *= 2
        return [*lengths, self.length]

    def bits(self, when: str, first: int, last: int) -> list[float]:
        """Return the bits per byte of each held-out row between two positions."""
        from hfllm.generation.scoring import bits_by_range

        return bits_by_range(self.nats[when], self.rows.held_out, self.tokenizer, first, last)

    def results(self) -> Found:
        """Return the figures, tables and plots of everything judged."""
        metrics: dict[str, float] = {}
        ranges = {"short": (1, self.original), "long": (self.original, self.length)}
        for name, (first, last) in ranges.items():
            by_time = {when: self.bits(when, first, last) for when in self.nats}
            metrics |= change_of(f"bits_per_byte_{name}", by_time["before"], by_time["after"])
            if "extended" in by_time:
                metrics |= mean_of(f"bits_per_byte_{name}_untrained", by_time["extended"])
            if name == "long":
                metrics |= mean_of("bits_per_byte_long_cut", by_time[CUT])
        tables, plots = {"Bits per byte by position": self._by_position()}, {"bits_by_position": self._plot()}
        for whose, name in FILLERS.items():
            if whose not in self.rows.fillers:
                continue
            metrics |= change_of(name, *(self.grids[when][whose].share() for when in ("before", "after")))
            metrics[f"{name}_chance"] = self.grids["after"][whose].chance
            for when in ("before", "after"):
                grid = self.grids[when][whose]
                title = f"Needles found in {'your text' if whose == 'text' else 'texts of the world'}, {when}"
                tables[title], plots[f"{name}_{when}"] = grid.rows(), grid.heatmap(title)
        return Found(metrics, self._summary(metrics), tables, plots)

    def _by_position(self) -> list[Mapping[str, str | float]]:
        from hfllm.generation.scoring import edges_of

        edges = edges_of(self.original, self.length)
        return [
            {"tokens": f"{first} to {last}", **{when: _mean(self.bits(when, first, last)) for when in self.nats}}
            for first, last in pairwise(edges)
        ]

    def _plot(self) -> Plot:
        step = max(1, self.length // 32)
        edges = [1, *range(step, self.length, step), self.length]
        spans = [(first, last) for first, last in pairwise(edges) if last > first]
        indices = [(first + last) / 2 for first, last in spans]
        return Plot(
            title=f"{self.rope_type}: {self.original} to {self.length} tokens",
            xlabel="position (tokens)",
            ylabel="bits per byte",
            lines={when: (indices, [_mean(self.bits(when, *span)) for span in spans]) for when in self.nats},
        )

    def _summary(self, metrics: Mapping[str, float]) -> str:
        beyond, within = (
            [metrics[f"bits_per_byte_{name}_{when}"] for when in ("after", "before")] for name in ("long", "short")
        )
        needles = [metrics[f"needle_{name}"] for name in ("after", "before", "chance")]
        joined = " Short texts were joined for the long rows." if self.rows.are_joined else ""
        return (
            f"{self.rope_type}, {self.original} to {self.length} tokens. Bits per byte beyond "
            f"{self.original}: {beyond[0]:.3f}, before {beyond[1]:.3f}, and {metrics['bits_per_byte_long_cut']:.3f} "
            f"reading {self.original} tokens at most; up to there: {within[0]:.3f}, before {within[1]:.3f}. Needles "
            f"found: {needles[0]:.2f}, before {needles[1]:.2f}, by chance {needles[2]:.2f}.{joined}"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- trainer ----
#
# The short training of an extended model on rows of the new length.


def make_trainer(
    args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
) -> "Trainer":
    """Return a trainer for the prediction of every token of the rows."""
    import torch
    from datasets import Dataset
    from transformers import Trainer

    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.pretraining.trainer import loss_settings

    settings = loss_settings(model, None)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids.clone(), **settings}

    trainer = Trainer(
        model=model,
        args=changed(args, eval_strategy="no"),
        train_dataset=Dataset.from_dict({"input_ids": [list(row) for row in rows]}),
        data_collator=collate,
        processing_class=tokenizer,
    )
    use_plain_lines(trainer)
    return trainer
