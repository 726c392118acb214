"""Distillation: its flags and checks, the stages before it, and its trainers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import ON_WORLD, InstructionArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.flags import NAMED, POSITIVE, SHARE, UNNAMED, Fact, Refused, at_least, check_flags, flag
from hfllm.runs.arguments import changed
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.runs.recipes import settings_file
from hfllm.stages.rlhf import flags as rlhf_flags
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.evaluation.before_after import GoldEvaluation
    from hfllm.trainers.distillation.config import DistillationConfig
    from hfllm.trainers.distillation.trainer import DistillationTrainer


# ---- flags ----


SIZES = ("student_hidden_size", "student_num_hidden_layers", "student_num_attention_heads")
NEW_STUDENT = (*SIZES, "student_initializer_range")
# The stages with settings named by `--NAME_config`.
OF_TEACHER = ("pretrain", "sft", "reward", "rlhf")
# How answers are learned, and their source.
OF_ANSWERS = ("temperature", "beta", "soft_weight", "hard_weight", "num_examples", "response_length")
TEACHER_NAMED = Fact(lambda flags: flags.teacher_model_name_or_path, "the teacher is named")
# For weights loaded in few bits: only an adapter can be trained on them.
NO_ADAPTER = Fact(
    lambda flags: not (flags.use_peft and flags.model_name_or_path),
    "it applies to the student, which then needs --model_name_or_path and --use_peft; for a teacher use "
    "--teacher_model_init_kwargs",
)
SEQUENCES = Fact(lambda flags: flags.sequence_level, "--sequence_level learns only from answers")


def whose_answers(script_args: "DistillArguments") -> str:
    """Return `data`, `sampled` or `greedy`."""
    return script_args.answers or ("greedy" if script_args.sequence_level else "data")


@dataclass(frozen=True)
class DistillArguments(InstructionArguments, BatchArguments, RemoteCodeArguments):
    """The student, what it learns from, and the settings of the stages before."""

    student_layers_every: int | None = flag(
        None,
        "Build the student from every n-th layer of the teacher; by default 3.",
        takes=at_least(2),
        never=NAMED.because("the student is named"),
    )
    student_hidden_size: int | None = flag(
        None, "Width of a new student.", takes=at_least(1), never=NAMED.because("the student is named")
    )
    student_num_hidden_layers: int | None = flag(
        None, "Layers of a new student.", takes=at_least(1), never=NAMED.because("the student is named")
    )
    student_num_attention_heads: int | None = flag(
        None, "Query heads of a new student.", takes=at_least(1), never=NAMED.because("the student is named")
    )
    student_initializer_range: float | None = flag(
        None,
        "Standard deviation of a new student's weights; the teacher's by default.",
        takes=POSITIVE,
        never=NAMED.because("the student is named"),
    )
    answers: str | None = flag(
        None,
        "Whose answers the student learns from: the data's, or the teacher's, sampled at temperature 1 or "
        "greedy. By default the data's, and greedy ones with --sequence_level; the world's settings: sampled.",
        choices=["data", "sampled", "greedy"],
    )
    mixed_prompts: float = flag(
        0.0,
        "Share of the prompts whose end, from some word on, is taken from another. The teacher answers "
        "questions of no dataset, and the student learns more from it (Beyer et al. 2022, arXiv:2106.05237).",
        takes=SHARE,
        never=Fact(
            lambda flags: whose_answers(flags) == "data",
            "no data answers such prompts; --answers sampled lets the teacher do it",
        ),
    )
    sequence_level: bool = flag(
        False,
        "Train on the teacher's answers as data, instead of on its distributions "
        "(Kim & Rush 2016, arXiv:1606.07947, section 3.2).",
    )
    train_baseline: bool = flag(True, "Also train the same student without the teacher, for as many steps.")
    num_examples: int = flag(
        9600,
        "Demonstrations of the embedded world to train on.",
        takes=at_least(1),
        never=ON_WORLD.absent("it is for the world; use --max_samples"),
    )
    num_documents: int = flag(
        0,
        "Documents of the embedded world to train on as well.",
        takes=at_least(0),
        never=ON_WORLD.absent("only the embedded world has documents"),
    )
    num_eval_prompts: int = flag(600, "Held-out prompts of the world to answer.", takes=at_least(1))
    num_samples: int = flag(4, "Answers sampled to each at temperature 1.", takes=at_least(1))
    response_length: int | None = flag(
        None,
        "Longest answer, in tokens: by default 40 on the embedded world, else 256.",
        takes=at_least(1),
        never=Fact(
            lambda flags: flags.dataset_name != WORLD and whose_answers(flags) == "data",
            "the answers are the data's; --answers sampled lets the teacher write them",
        ),
    )
    pretrain_config: str | None = flag(None, "YAML flags of the teacher's pretraining.", never=TEACHER_NAMED)
    sft_config: str | None = flag(None, "YAML flags of the teacher's fine-tuning.", never=TEACHER_NAMED)
    reward_config: str | None = flag(None, "YAML flags of the teacher's reward model.", never=TEACHER_NAMED)
    rlhf_config: str | None = flag(None, "YAML flags of the teacher's rlhf.", never=TEACHER_NAMED)

    refused: ClassVar[Refused] = {
        **dict.fromkeys(("load_in_8bit", "load_in_4bit"), NO_ADAPTER),
        "use_peft": UNNAMED.because(
            "the adapter's base, a new student, would be saved nowhere: name a student by --model_name_or_path"
        ),
        "attn_implementation": UNNAMED.because("the student is not named"),
        "teacher_model_revision": TEACHER_NAMED.absent("the teacher is not named"),
        "loss_on": Fact(
            lambda flags: whose_answers(flags) != "data" and flags.dataset_name != WORLD,
            "the teacher answers the last turn of a conversation, and that is learned",
        ),
        **dict.fromkeys(
            ("teacher_top_k", "hidden_weight", "temperature", "beta", "soft_weight", "hard_weight"), SEQUENCES
        ),
    }


def world_settings(given: Mapping[str, object]) -> list[Path]:
    """Return the settings of the world's student, unless the user names a student or a teacher."""
    is_own = given.get("model_name_or_path") or given.get("teacher_model_name_or_path")
    return [] if is_own else [settings_file("distill/world.yaml")]


def without_contradicted(
    script_args: DistillArguments, training_args: "DistillationConfig", given: Mapping[str, object]
) -> DistillArguments:
    """Return the flags without the world's settings contradicted by the user's flags.

    User flags without effect are refused here, before any training of a recipe with distillation at its end.

    Args:
        script_args, training_args: as parsed.
        given: the user's flags.
    """
    check_flags(script_args, training_args, names=OF_ANSWERS)
    contradicted = [
        *(NEW_STUDENT if script_args.student_layers_every else ()),
        *(("mixed_prompts",) if whose_answers(script_args) == "data" else ()),
    ]
    defaults = DistillArguments()
    return replace(script_args, **{name: getattr(defaults, name) for name in contradicted if name not in given})


def longest_answer(script_args: DistillArguments) -> int:
    """Return the maximum number of tokens of an answer."""
    if script_args.response_length is not None:
        return script_args.response_length
    return 40 if script_args.dataset_name == WORLD else 256


def new_student(script_args: DistillArguments, teacher: "PreTrainedModel") -> "PreTrainedModel":
    """Return a new student as the flags describe it."""
    from hfllm.trainers.distillation.students import smaller_student, student_from_layers

    sizes = {name.removeprefix("student_"): getattr(script_args, name) for name in SIZES}
    if any(sizes.values()) or script_args.student_initializer_range is not None:
        return smaller_student(teacher, **sizes, initializer_range=script_args.student_initializer_range)
    # A student cannot be trained in the teacher's bf16: small updates would be lost.
    return student_from_layers(teacher, script_args.student_layers_every or 3).float()


# ---- what is refused ----


def check(script_args: DistillArguments, training_args: "DistillationConfig", model_args: "ModelConfig") -> None:
    """Refuse contradictory flags and flags without effect, before any training."""
    if script_args.dataset_name != WORLD and not training_args.teacher_model_name_or_path:
        raise InputError(f"--dataset_name {script_args.dataset_name} needs --teacher_model_name_or_path")
    check_flags(script_args, training_args, model_args)
    sizes = [name for name in NEW_STUDENT if getattr(script_args, name) is not None]
    is_both = bool(sizes and script_args.student_layers_every)
    refuse(is_both, "--student_layers_every", f"--{''.join(sizes[:1])} describes a new student")
    is_from_data = script_args.sequence_level and script_args.answers == "data"
    refuse(is_from_data, "--answers data", "--sequence_level learns from the teacher's answers")


def check_student(script_args: DistillArguments, model_args: "ModelConfig", before: Chain) -> None:
    """Refuse a student with errors otherwise found only after the training of the stages before.

    Args:
        model_args: with the student's name, if it has one.
        before: the stages to make the teacher; none if it is named, since it is then loaded right away.
    """
    import torch

    from hfllm.models.loading.saved import empty_model
    from hfllm.runs.models import check_trainable, load_config, load_tokenizer, peft_config, try_adapter
    from hfllm.stages.pretrain.flags import config_to_train

    teacher_config = config_to_train(before.runs["rlhf"][2], before.nested["rlhf"]) if before.runs else None
    name, revision = model_args.model_name_or_path, model_args.model_revision
    # New weights of an adapter or a student must not change the random numbers drawn later.
    with torch.random.fork_rng(devices=[]):
        if name:
            load_tokenizer(name, revision)
            check_trainable(model_args)
            if model_args.use_peft:
                try_adapter(load_config(name, revision), peft_config(model_args))
        elif teacher_config is not None:
            with torch.device("meta"):
                new_student(script_args, empty_model(teacher_config))


# ---- the stages before ----


def stages_before(script_args: DistillArguments, training_args: "DistillationConfig") -> Chain:
    """Return the alignment of the world's teacher, with its required stages, if no teacher is named."""
    before = chain_before(
        "distill",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"rlhf": training_args.teacher_model_name_or_path},
        configs={name: getattr(script_args, f"{name}_config") for name in OF_TEACHER},
    )
    return replace(before, nested={name: rlhf_flags.stages_before(*parsed) for name, parsed in before.runs.items()})


# ---- trainers ----
#
# The parts of distillation: rows, the teacher and its answers, the students' trainers, and their comparison.


Rows = list[Mapping[str, object]]
# A model and its tokenizer.
Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def rows_to_learn(script_args: DistillArguments, seed: int) -> tuple[Rows, Rows]:
    """Return training rows, with the world's documents among them if requested, and held-out ones with a prompt."""
    from hfllm.data.world.world import World
    from hfllm.stages.sft.build import instruction_data

    train_rows, eval_rows = instruction_data(script_args, script_args.num_examples, seed)
    if script_args.num_documents:
        texts = World(script_args.world_seed).documents(script_args.num_documents, seed=seed)
        train_rows = [*train_rows, *({"text": text} for text in texts)]
    return train_rows, eval_rows


def load_teacher(training_args: "DistillationConfig") -> Loaded:
    """Return the teacher, frozen, and its tokenizer."""
    from hfllm.models.loading.saved import check_vocabulary
    from hfllm.runs.models import load_tokenizer
    from hfllm.trainers.distillation import students

    name, settings = training_args.teacher_model_name_or_path, training_args.teacher_settings
    tokenizer = load_tokenizer(name, settings["revision"])
    teacher = students.load_teacher(name, settings)
    if not getattr(teacher, "is_quantized", False):
        teacher = teacher.to(training_args.device)
    check_vocabulary(teacher, tokenizer, name)
    return teacher.eval().requires_grad_(False), tokenizer


def rows_to_teach(script_args: DistillArguments, teacher: Loaded, rows: Rows, seed: int) -> Rows:
    """Return the rows with the teacher's answers and a share of mixed prompts, or unchanged, as set by the flags."""
    from hfllm.data.formats import last_turn
    from hfllm.synthesis.answers import mix_prompts, write_answers

    answers = whose_answers(script_args)
    if answers == "data":
        return rows
    # The teacher answers the last turn of a conversation.
    rows = [last_turn(row) if "completion" in row else row for row in rows]
    rows = mix_prompts(rows, script_args.mixed_prompts, seed)
    return write_answers(*teacher, rows, longest_answer(script_args), answers == "sampled", seed)


def student_tokenizer(
    model_args: "ModelConfig", teacher_tokenizer: "PreTrainedTokenizerBase"
) -> "PreTrainedTokenizerBase":
    """Return the named student's own tokenizer, or the teacher's."""
    from hfllm.runs.models import load_tokenizer

    if model_args.model_name_or_path:
        return load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    return teacher_tokenizer


def make_student(
    script_args: DistillArguments,
    training_args: "DistillationConfig",
    model_args: "ModelConfig",
    teacher: "PreTrainedModel",
) -> "PreTrainedModel":
    """Return the untrained student, the same for the same seed; an adapter by name is trained further."""
    from transformers import set_seed

    from hfllm.runs.models import load_to_train

    set_seed(training_args.seed)
    if model_args.model_name_or_path:
        return load_to_train(model_args, training_args.output_dir)[0]
    return new_student(script_args, teacher)


def student_trainer(
    script_args: DistillArguments,
    training_args: "DistillationConfig",
    model_args: "ModelConfig",
    teacher: Loaded,
    train_rows: Rows,
    eval_rows: Rows,
) -> "DistillationTrainer":
    """Return a trainer of a new copy of the student."""
    from hfllm.runs.models import fitting_length, peft_config
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.distillation.trainer import DistillationTrainer

    teacher_model, teacher_tokenizer = teacher
    tokenizer = student_tokenizer(model_args, teacher_tokenizer)
    student = make_student(script_args, training_args, model_args, teacher_model)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher_model if training_args.needs_teacher else None,
        args=changed(training_args, max_length=fitting_length(training_args.max_length, student)),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer if training_args.needs_teacher else None,
        peft_config=peft_config(model_args),
    )
    use_plain_lines(trainer)
    return trainer


def without_teacher(training_args: "DistillationConfig") -> "DistillationConfig":
    """Return the arguments of the same training with the cross-entropy on the answers only."""
    weights = {"soft_weight": 0.0, "hard_weight": 1.0, "hidden_weight": 0.0}
    return changed(training_args, **weights, teacher_top_k=None, teacher_cache_dir=None)


def compare(
    script_args: DistillArguments,
    training_args: "DistillationConfig",
    teacher: Loaded,
    trainers: "Mapping[str, DistillationTrainer]",
) -> "tuple[dict[str, GoldEvaluation], dict[str, float]]":
    """Return all metrics, and each model's answers with the gold reward (the world's exact score) where it exists.

    Args:
        training_args: the recipe's.
        trainers: the students', by name in the report; one is `student`.
    """
    from torch.utils.data import DataLoader

    from hfllm.data.loading import world_of
    from hfllm.evaluation.before_after import fit_metrics, gold_metrics, judge_model
    from hfllm.trainers.run_record import final_train_loss

    trainer = trainers["student"]
    students = {name: (each.model, each.processing_class) for name, each in trainers.items()}
    models, judged, world = {"teacher": teacher, **students}, {}, world_of(script_args)
    if world is not None:
        judged = {
            name: judge_model(
                *(model, tokenizer, world, script_args.num_eval_prompts, longest_answer(script_args)),
                seed=training_args.seed,
                num_samples=script_args.num_samples,
            )
            for name, (model, tokenizer) in models.items()
        }
    # Perplexities of other tokens cannot be compared.
    same = teacher[1].get_vocab() == trainer.processing_class.get_vocab()
    read_alike = {name: model for name, (model, _) in models.items() if same or name != "teacher"}
    rows = getattr(trainer.eval_dataset, "rows", trainer.eval_dataset)
    loader = DataLoader(rows, training_args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    counts = {name: models[name][0].num_parameters() for name in ("teacher", "student")}
    return judged, {
        **(gold_metrics(judged) if judged else {}),
        **fit_metrics(loader, read_alike),
        "train_loss": final_train_loss(trainer),
        **{f"parameters_{name}": count for name, count in counts.items()},
        "share_of_parameters": counts["student"] / counts["teacher"],
        "steps": trainer.state.global_step,
    }
