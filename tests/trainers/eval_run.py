"""What every trainer measures on held-out rows, for the tests with processes of their own.

Usage: eval_run.py OUTPUT_DIR ROWS_PER_PROCESS [DEEPSPEED_CONFIG], under torchrun or accelerate launch.
"""

import json
import sys
from collections.abc import Callable, Iterator

import torch
import transformers
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import hfllm
from hfllm.data.packing import batch_of, pack
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.world import World
from hfllm.trainers.mixins import TokenMeanEvaluation
from hfllm.trainers.pretraining.trainer import BatchPlan, PretrainTrainer, Schedule

LENGTH = 32
# Rows that two processes with two each share unevenly: one of the last batch is new, or three are.
SIZES = (5, 7)
TEXTS = World(0).documents(150, seed=1)
TOKENIZER = train_tokenizer(TEXTS, vocab_size=320, model_max_length=128)
IDS = [ids[: 3 + 40 * (place % 3)] for place, ids in enumerate(TOKENIZER(TEXTS[:7])["input_ids"])]
# The first half of a row is a prompt.
ROWS = [{"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in IDS]
PAIRS = [{"chosen_ids": ids, "rejected_ids": IDS[place - 1], "margin": place / 10} for place, ids in enumerate(IDS)]


def model(model_class: type = hfllm.HfllmForCausalLM, seed: int = 0, **fields: object) -> hfllm.HfllmForCausalLM:
    """A model that knows nothing; `fields` are its config's."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    special = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return model_class(hfllm.HfllmConfig(vocab_size=len(TOKENIZER), **sizes, **special, **fields)).eval()


def split(rows: list) -> dict[str, Dataset]:
    """The first rows, as so many held-out datasets by name."""
    return {str(size): Dataset.from_list(rows[:size]) for size in SIZES}


def packed(joined: bool) -> Callable[[TrainingArguments], Trainer]:
    """Pretraining; with `joined` rows, as flash attention reads them."""

    def collate(rows: list) -> dict[str, torch.Tensor]:
        batch = batch_of(rows, LENGTH, TOKENIZER.pad_token_id)
        return {name: values.reshape(1, -1) if joined else values for name, values in batch.items()}

    def build(args: TrainingArguments) -> Trainer:
        rows = pack(TEXTS[:40], TOKENIZER, LENGTH)
        # The last row is the least full.
        held_out = [*list(rows)[: SIZES[-1] - 1], rows[-1]][::-1]
        plan = BatchPlan([rows], LENGTH, 8, Schedule.parse("64", ""), Schedule.parse("32", ""), 0, seed=0)
        args.remove_unused_columns = False
        return PretrainTrainer(
            plan=plan, model=model(), args=args, eval_dataset=split(held_out), data_collator=collate
        )

    return build


def padded(args: TrainingArguments) -> Trainer:
    """Single documents, by a trainer that the mixin is put in front of."""
    rows = split([{"input_ids": ids} for ids in IDS])
    collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    return TokenMeanEvaluation(model=model(), args=args, eval_dataset=rows, data_collator=collate)


def tuned(**more: object) -> Callable[[TrainingArguments], Trainer]:
    """Fine-tuning; `more` are arguments of SFTConfig, or fields of the model's config."""
    fields = {name: more.pop(name) for name in ("num_local_experts", "num_experts_per_tok") if name in more}

    def build(args: TrainingArguments) -> Trainer:
        from trl import SFTConfig

        from hfllm.trainers.trl_trainers import SFTTrainer

        settings = SFTConfig(
            **{**common(args), "bf16": False, "activation_checkpointing": False, "max_length": None, **more}
        )
        rows = split(ROWS)
        return SFTTrainer(
            model(**fields), settings, train_dataset=rows["7"], eval_dataset=rows, processing_class=TOKENIZER
        )

    return build


def distilled(**more: object) -> Callable[[TrainingArguments], Trainer]:
    """Distillation from a teacher that runs, or from its top tokens on disk."""

    def build(args: TrainingArguments) -> Trainer:
        settings = hfllm.DistillationConfig(**common(args), loss_chunk_size=7, **more)
        rows = {name: list(part) for name, part in split(ROWS).items()}
        return hfllm.DistillationTrainer(
            model(), model(seed=1), settings, train_dataset=rows["7"], eval_dataset=rows, processing_class=TOKENIZER
        )

    return build


def rewarding(args: TrainingArguments) -> Trainer:
    """A reward model, with margins."""
    from trl import RewardConfig

    from hfllm.trainers.trl_trainers import RewardTrainer

    more = {"bf16": False, "activation_checkpointing": False, "center_rewards_coefficient": 0.1}
    settings, rows = RewardConfig(**common(args), **more), split(PAIRS)
    scorer = model(hfllm.HfllmForSequenceClassification, num_labels=1)
    return RewardTrainer(scorer, settings, train_dataset=rows["7"], eval_dataset=rows, processing_class=TOKENIZER)


def common(args: TrainingArguments) -> dict[str, object]:
    """The arguments that all trainers are given."""
    names = ("output_dir", "use_cpu", "report_to", "disable_tqdm", "per_device_eval_batch_size", "deepspeed")
    return {name: getattr(args, name) for name in names}


TRAINERS: dict[str, Callable[[TrainingArguments], Trainer]] = {
    "packed": packed(joined=False),
    "joined": packed(joined=True),
    "padded": padded,
    "tuned": tuned(),
    "padding-free": tuned(padding_free=True, num_local_experts=3, num_experts_per_tok=2),
    "distilled": distilled(),
    "cached": distilled(teacher_top_k=5),
    "rewarding": rewarding,
}


def metrics(folder: str, rows: int, deepspeed: str | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """Each trainer's name and what it measures, `rows` at a time; under DeepSpeed those that work with it."""
    for name, build in TRAINERS.items():
        if deepspeed and name not in ("packed", "tuned", "rewarding"):
            continue
        folder_of = f"{folder}/{name}"
        settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "deepspeed": deepspeed}
        args = TrainingArguments(folder_of, per_device_eval_batch_size=rows, **settings)
        timed = ("runtime", "per_second", "time")
        found = {key: value for key, value in build(args).evaluate().items() if not key.endswith(timed)}
        yield name, found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    engine = sys.argv[3] if len(sys.argv) > 3 else None
    if engine:
        import deepspeed

        # Its compilation takes a minute, for the same losses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    measured = dict(metrics(sys.argv[1], int(sys.argv[2]), engine))
    from accelerate import PartialState

    if PartialState().is_main_process:
        print("EVAL " + json.dumps(measured), flush=True)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
