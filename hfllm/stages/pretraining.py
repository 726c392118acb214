"""What `recipes/pretrain.py` is made of: the run's length, objectives, model, tokenizer and trainers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfllm.data.prepared import Prepared
from hfllm.errors import InputError
from hfllm.runs.arguments import changed

if TYPE_CHECKING:
    from datasets import Dataset

CHINCHILLA = "chinchilla"
OBJECTIVES = ("causal", "masked", "infilling")
MOST_TOKENIZER_TEXTS = 20_000
TOKENS_A_PARAMETER = 20


def masking(tokenizer: Any, seed: int) -> Callable[[dict, Sequence[int]], dict]:
    """What masks packed rows, given the number of each: the same tokens of a row whoever has it, and when."""
    import torch

    from hfllm.data.objectives import masked_tokens, seeded_generator

    if tokenizer.mask_token_id is None:
        raise InputError(f"--objective masked: the tokenizer {tokenizer.name_or_path!r} has no mask_token")

    settings = tokenizer.all_special_ids, tokenizer.mask_token_id, len(tokenizer)

    def mask(batch: dict, numbers: Sequence[int]) -> dict:
        rows = zip(batch["input_ids"].split(1), numbers, strict=True)
        masked = [masked_tokens(row, *settings, seeded_generator(seed, number)) for row, number in rows]
        ids, labels = map(torch.cat, zip(*masked, strict=True))
        return {**batch, "input_ids": ids, "labels": labels}

    return mask


def infilled(texts: Iterable[str], tokenizer: Any, max_length: int, seed: int) -> Iterator[str]:
    """Documents that fit into a row in Code Llama's infilling format, nine of ten; the others as they are."""
    from hfllm.data.objectives import check_infilling_tokens, fill_in_the_middle
    from hfllm.data.prepared import windows

    check_infilling_tokens(tokenizer)
    number = 0
    for window in windows(texts, 1000, 1 << 24):
        for text, ids in zip(window, tokenizer(window, add_special_tokens=False)["input_ids"], strict=True):
            # The document token, the four of the format, and what cutting words in two may add.
            fits = len(ids) + 12 <= max_length
            yield fill_in_the_middle(text, number, seed) if fits else text
            number += 1


def rows_of_run(script_args: Any, training_args: Any, model: Any, rows: int, batch_rows: int) -> int:
    """How many rows the whole run takes.

    Raises:
        InputError: when there is not one batch of them.
    """
    if script_args.total_tokens == CHINCHILLA:
        wanted = TOKENS_A_PARAMETER * model.num_parameters() // script_args.max_length
    elif script_args.total_tokens is not None:
        wanted = int(script_args.total_tokens) // script_args.max_length
    elif training_args.max_steps > 0:
        wanted = training_args.max_steps * batch_rows
    else:
        wanted = int(training_args.num_train_epochs * rows)
    if wanted < training_args.world_size:
        raise InputError(
            f"the run has {wanted} row(s) of {script_args.max_length} tokens, fewer than {training_args.world_size} "
            "process(es): more text, --total_tokens or --num_train_epochs, or a smaller --max_length"
        )
    return wanted


def loss_settings(model: Any, loss_chunk_size: int | None) -> dict[str, int]:
    """What asks an hfllm model, batch by batch, to compute its loss in chunks.

    By the batch and not by the config, which would go on to every later use of the saved model. Not in ZeRO-3, whose
    processes gather the head together: they may differ in their number of chunks.

    Raises:
        InputError: for a negative size, or one given for a model of another family.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    from hfllm.errors import refuse

    family = model.config.model_type
    refuse(loss_chunk_size and family != "hfllm", "--loss_chunk_size", f"a model of type {family} has no such loss")
    refuse((loss_chunk_size or 0) < 0, "--loss_chunk_size", f"{loss_chunk_size} is below 0")
    is_split = is_deepspeed_zero3_enabled()
    refuse(loss_chunk_size and is_split, "--loss_chunk_size", "ZeRO-3 needs the loss of a batch in one piece")
    size = 1024 if loss_chunk_size is None and family == "hfllm" and not is_split else loss_chunk_size
    return {"loss_chunk_size": size} if size else {}


def load_or_make_base(
    script_args: Any, model_args: Any, texts: Sequence[str], architecture: Sequence[str]
) -> tuple[Any, Any]:
    """The model to pretrain: the named one, or a new one with the named tokenizer or one trained on `texts`.

    A new one has the architecture of `--config_name_or_path`, or the flags' and as many tokens as the tokenizer.
    """
    from hfllm.errors import refuse
    from hfllm.runs.models import load_policy, load_tokenizer, named_fields, new_config

    if model_args.model_name_or_path:
        return load_policy(model_args)
    import torch

    from hfllm.models.modeling_hfllm import HfllmForCausalLM, HfllmForMaskedLM
    from hfllm.models.precision import cast_weights

    fields, size = {name: getattr(script_args, name) for name in architecture}, None
    if script_args.config_name_or_path:
        fields = named_fields(script_args.config_name_or_path)
        size = fields["vocab_size"]
        script_args = replace(script_args, vocab_size=size, max_position_embeddings=fields["max_position_embeddings"])
    if script_args.tokenizer_name_or_path:
        tokenizer = load_tokenizer(script_args.tokenizer_name_or_path)
    else:
        tokenizer = make_tokenizer(script_args, texts)
    if size is not None and len(tokenizer) > size:
        raise InputError(
            f"--config_name_or_path {script_args.config_name_or_path}: vocab_size={size} is less than the "
            f"{len(tokenizer)} tokens of the tokenizer"
        )
    refuse(model_args.load_in_4bit or model_args.load_in_8bit, "--load_in_4bit/8bit", "a new model learns all weights")
    is_masked = script_args.objective == "masked"
    of_the_run = {
        # A named architecture keeps rows of its tables that no token has.
        "vocab_size": size or len(tokenizer),
        "is_causal": not is_masked,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = new_config({**fields, **of_the_run, "attn_implementation": model_args.attn_implementation})
    try:
        # Not `_from_config`, which spreads the weights under ZeRO-3 before they are there.
        model = (HfllmForMaskedLM if is_masked else HfllmForCausalLM)(config)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--attn_implementation {model_args.attn_implementation}: {reason}") from None
    dtype = "float32" if model_args.dtype == "auto" else model_args.dtype
    return cast_weights(model, getattr(torch, dtype)), tokenizer


def make_tokenizer(script_args: Any, texts: Sequence[str]) -> Any:
    """A tokenizer trained on `texts`, with the special tokens of the objective."""
    from hfllm.data.objectives import INFILLING_TOKENS
    from hfllm.data.sources import WORLD
    from hfllm.data.tokenizer import MASK, train_tokenizer
    from hfllm.data.world.demonstrators import instruction_rows
    from hfllm.data.world.world import World

    sample = list(texts[:MOST_TOKENIZER_TEXTS])
    if script_args.dataset_name == WORLD and not getattr(script_args, "dataset_mixture", None):
        # The words of instructions are part of the language, though the base model is not taught to follow them.
        rows = instruction_rows(World(script_args.world_seed), 3000)
        sample = sample[:5000] + [f"{row['instruction']} {row['input']} {row['output']}" for row in rows]
    return train_tokenizer(
        sample,
        script_args.vocab_size,
        script_args.max_position_embeddings,
        mask_token=MASK if script_args.objective == "masked" else None,
        extra_special_tokens=INFILLING_TOKENS if script_args.objective == "infilling" else (),
    )


def packed_trainer(
    script_args: Any,
    training_args: Any,
    model: Any,
    tokenizer: Any,
    sources: dict[str, "Dataset"],
    test_texts: list[str],
    prepared: Prepared | None = None,
) -> tuple[Any, list[dict]]:
    """A trainer on packed rows by plan, and a table of what each source gives: texts, or rows without `prepared`."""
    from hfllm.data.mixtures import mixture_of
    from hfllm.data.packing import batch_of, pack
    from hfllm.trainers.pretraining.batch_plan import BatchPlan, Schedule
    from hfllm.trainers.pretraining.trainer import PretrainTrainer, has_flash_attention

    length, processes = script_args.max_length, training_args.world_size
    if prepared is None:
        rows = list(sources.values())
    else:
        rows = packed_rows(script_args, training_args, tokenizer, sources, prepared)
    batch_rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * processes
    batch_tokens = Schedule.parse(script_args.batch_ramp or batch_rows * length, "--batch_ramp")
    weights = [weight for _, weight in mixture_of(script_args)]
    transform = masking(tokenizer, training_args.seed) if script_args.objective == "masked" else None
    plan = BatchPlan(
        rows,
        length,
        rows_of_run(script_args, training_args, model, sum(map(len, rows)), batch_rows),
        batch_tokens,
        Schedule.parse(script_args.length_curriculum or length, "--length_curriculum"),
        pad_token_id=tokenizer.pad_token_id,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        weights=None if None in weights else weights,
        process=training_args.process_index,
        processes=processes,
        transform=transform,
    )
    training_args = changed(
        training_args,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=-1,
        # The collator reads `seq_lengths`, which no model takes.
        remove_unused_columns=False,
    )
    settings = loss_settings(model, script_args.loss_chunk_size)

    def collate(packed: list[dict]) -> dict[str, Any]:
        batch = batch_of(packed, length, tokenizer.pad_token_id)
        if transform is not None:
            # Held-out rows are masked in the same places each time.
            batch = transform(batch, batch["input_ids"].sum(1).tolist())
        if has_flash_attention(model):
            batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return {**batch, **settings}

    trainer = PretrainTrainer(
        plan=plan,
        settings=settings,
        z_loss_coef=script_args.z_loss_coef,
        model=model,
        args=training_args,
        eval_dataset=pack(test_texts, tokenizer, length),
        data_collator=collate,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(script_args, training_args),
    )
    table = [
        {"source": name, "documents": len(texts), "rows": len(packed), "tokens of the run": given * length}
        for (name, texts), packed, given in zip(sources.items(), rows, plan.rows_by_source(), strict=True)
    ]
    return trainer, table


def packed_rows(
    script_args: Any, training_args: Any, tokenizer: Any, sources: dict[str, "Dataset"], prepared: Prepared
) -> list["Dataset"]:
    """The packed rows of each source, on disk; one process of each machine makes them."""
    from hfllm.data.packing import packed_tables

    def tables(source: "Dataset") -> Iterator[Any]:
        texts: Iterable[str] = source["text"]
        if script_args.objective == "infilling":
            texts = infilled(texts, tokenizer, script_args.max_length, training_args.seed)
        return packed_tables(texts, tokenizer, script_args.max_length)

    with training_args.main_process_first(desc="packing"):
        return [
            prepared.table(f"rows-{number}", lambda source=source: tables(source))
            for number, source in enumerate(sources.values())
        ]


def padded_trainer(
    script_args: Any,
    training_args: Any,
    model: Any,
    tokenizer: Any,
    sources: dict[str, "Dataset"],
    test_texts: list[str],
    prepared: Prepared,
) -> tuple[Any, list[dict]]:
    """The stock trainer on single documents, in batches of like length."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer

    from hfllm.data.padding import length_grouped, pieces_of

    (source,) = sources.values()
    texts = source["text"][:]
    batch = training_args.per_device_train_batch_size * training_args.world_size
    training_args = changed(training_args, train_sampling_strategy="sequential")
    train_pieces = length_grouped(pieces_of(texts, tokenizer, script_args.max_length), batch, training_args.seed)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = loss_settings(model, script_args.loss_chunk_size)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_dict({"input_ids": train_pieces}),
        eval_dataset=Dataset.from_dict({"input_ids": pieces_of(test_texts, tokenizer, script_args.max_length)}),
        data_collator=lambda rows: {**collate(rows), **settings},
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(script_args, training_args),
    )
    return trainer, []


def optimizer_of(script_args: Any, training_args: Any) -> tuple[Any, dict] | None:
    """What `Trainer` makes Muon of; `None` is the optimiser of `--optim`."""
    if not script_args.use_muon:
        return None
    from hfllm.trainers.pretraining.muon import muon_factory

    return muon_factory, {
        "lr": training_args.learning_rate,
        "weight_decay": training_args.weight_decay,
        "betas": (training_args.adam_beta1, training_args.adam_beta2),
        "eps": training_args.adam_epsilon,
    }
