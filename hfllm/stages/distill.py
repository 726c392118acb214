"""Distillation: its flags and checks, the stages before it, and its trainers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import ON_WORLD, InstructionArguments
from hfllm.data.sources import WORLD
from hfllm.flags import NAMED, POSITIVE, SHARE, UNNAMED, WORLD_GROUP, Clashes, Fact, Refused, at_least, changed, flag
from hfllm.outputs.verdict import Promise
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.runs.recipes import settings_file
from hfllm.stages.rlhf import flags as rlhf_flags
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.data.world.world import World
    from hfllm.evaluation.before_after import GoldEvaluation
    from hfllm.runs.models import NamedModel
    from hfllm.trainers.distillation.config import DistillationConfig
    from hfllm.trainers.distillation.trainer import DistillationTrainer


# ---- flags ----


NEW_STUDENT = (
    *("student_hidden_size", "student_num_hidden_layers", "student_num_attention_heads"),
    "student_initializer_range",
)
# The stages with settings named by `--NAME_config`.
OF_TEACHER = ("pretrain", "sft", "reward", "rlhf")
# How answers are learned, and their source.
OF_ANSWERS = ("temperature", "beta", "soft_weight", "hard_weight", "num_examples", "response_length")
STUDENT_NAMED = NAMED.because("the student is named")
NEW_WEIGHTS = tuple(
    Fact(lambda flags, name=name: flags[name] is not None, f"--{name} describes a new student") for name in NEW_STUDENT
)
TEACHER_NAMED = Fact(lambda flags: flags.teacher_model_name_or_path, "the teacher is named")
# For weights loaded in few bits: only an adapter can be trained on them.
NO_ADAPTER = Fact(
    lambda flags: not (flags.use_peft and flags.model_name_or_path),
    "it applies to the student, which then needs --model_name_or_path and --use_peft; for a teacher use "
    "--teacher_model_init_kwargs",
)
SEQUENCES = Fact(lambda flags: flags.sequence_level, "--sequence_level learns only from answers")
ANSWERED_BY_DATA = Fact(
    lambda flags: answer_source(flags.answers, flags.sequence_level) == "data",
    "no data answers such prompts; --answers sampled lets the teacher do it",
)


def answer_source(answers: str | None, sequence_level: bool) -> str:
    """Return `data`, `sampled` or `greedy`, by the flags of these names."""
    return answers or ("greedy" if sequence_level else "data")


@dataclass(frozen=True)
class StudentShape:
    """The shape of a student made here: some of the teacher's layers, or sizes with new weights.

    Args:
        layers_every: copies every n-th layer of the teacher, by default every third.
        hidden_size, num_hidden_layers, num_attention_heads, initializer_range: of new weights, the teacher's where
            one of them alone is set.
    """

    layers_every: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    initializer_range: float | None = None

    def student_of(self, teacher: "PreTrainedModel") -> "PreTrainedModel":
        """Return a new student of a teacher."""
        from hfllm.trainers.distillation.students import smaller_student, student_from_layers

        sizes = {name: value for name, value in vars(self).items() if name != "layers_every"}
        if any(value is not None for value in sizes.values()):
            return smaller_student(teacher, **sizes)
        # A student cannot be trained in the teacher's bf16: small updates would be lost.
        return student_from_layers(teacher, self.layers_every or 3).float()


@dataclass(frozen=True)
class DistillArguments(InstructionArguments, BatchArguments, RemoteCodeArguments):
    """The student, what it learns from, and the settings of the stages before."""

    student_layers_every: int | None = flag(
        None,
        "Build the student from every n-th layer of the teacher; by default 3.",
        takes=at_least(2),
        never=(STUDENT_NAMED, *NEW_WEIGHTS),
    )
    student_hidden_size: int | None = flag(None, "Width of a new student.", takes=at_least(1), never=STUDENT_NAMED)
    student_num_hidden_layers: int | None = flag(
        None, "Layers of a new student.", takes=at_least(1), never=STUDENT_NAMED
    )
    student_num_attention_heads: int | None = flag(
        None, "Query heads of a new student.", takes=at_least(1), never=STUDENT_NAMED
    )
    student_initializer_range: float | None = flag(
        None,
        "Standard deviation of a new student's weights; the teacher's by default.",
        takes=POSITIVE,
        never=STUDENT_NAMED,
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
        never=ANSWERED_BY_DATA,
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
            lambda flags: flags.dataset_name != WORLD and ANSWERED_BY_DATA.holds(flags),
            "the answers are the data's; --answers sampled lets the teacher write them",
        ),
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the teacher's pretraining.", never=TEACHER_NAMED, group=WORLD_GROUP
    )
    sft_config: str | None = flag(
        None, "YAML flags of the teacher's fine-tuning.", never=TEACHER_NAMED, group=WORLD_GROUP
    )
    reward_config: str | None = flag(
        None, "YAML flags of the teacher's reward model.", never=TEACHER_NAMED, group=WORLD_GROUP
    )
    rlhf_config: str | None = flag(None, "YAML flags of the teacher's rlhf.", never=TEACHER_NAMED, group=WORLD_GROUP)

    refused: ClassVar[Refused] = {
        **dict.fromkeys(("load_in_8bit", "load_in_4bit"), NO_ADAPTER),
        "use_peft": UNNAMED.because(
            "the adapter's base, a new student, would be saved nowhere: name a student by --model_name_or_path"
        ),
        "attn_implementation": UNNAMED.because("the student is not named"),
        "teacher_model_revision": TEACHER_NAMED.absent("the teacher is not named"),
        "loss_on": Fact(
            lambda flags: not ANSWERED_BY_DATA.holds(flags) and flags.dataset_name != WORLD,
            "the teacher answers the last turn of a conversation, and that is learned",
        ),
        **dict.fromkeys(
            ("teacher_top_k", "hidden_weight", "temperature", "beta", "soft_weight", "hard_weight"), SEQUENCES
        ),
    }
    clashes: ClassVar[Clashes] = {
        "--dataset_name {dataset_name} needs --teacher_model_name_or_path": lambda flags: (
            not (ON_WORLD.holds(flags) or TEACHER_NAMED.holds(flags))
        ),
        "--answers data cannot be used here: --sequence_level learns from the teacher's answers": lambda flags: (
            flags.sequence_level and flags.answers == "data"
        ),
    }

    @property
    def student_shape(self) -> StudentShape:
        """The shape of a student made here."""
        return StudentShape(**{each.name: getattr(self, f"student_{each.name}") for each in fields(StudentShape)})

    @property
    def answer_source(self) -> str:
        """Whose answers are learned: `data`, or the teacher's `sampled` or `greedy` ones."""
        return answer_source(self.answers, self.sequence_level)

    @property
    def longest_answer(self) -> int:
        """The maximum number of tokens of an answer."""
        if self.response_length is not None:
            return self.response_length
        return 40 if self.dataset_name == WORLD else 256

    @property
    def teacher_configs(self) -> dict[str, str | None]:
        """The YAML flags of the stages that make the teacher, by stage."""
        return {name: getattr(self, f"{name}_config") for name in OF_TEACHER}

    @property
    def idle(self) -> tuple[str, ...]:
        """The world's settings that have no effect beside other flags."""
        of_students = NEW_STUDENT if self.student_layers_every else ()
        return (*of_students, "mixed_prompts") if self.answer_source == "data" else of_students


def world_settings(user_flags: Mapping[str, object]) -> list[Path]:
    """Return the settings of the world's student, unless the user names a student or a teacher."""
    is_own = user_flags.get("model_name_or_path") or user_flags.get("teacher_model_name_or_path")
    return [] if is_own else [settings_file("distill/world.yaml")]


# ---- what is refused ----


def check_student(shape: StudentShape, model_args: "ModelConfig", before: Chain) -> None:
    """Refuse a student with errors otherwise found only after the training of the stages before.

    Args:
        shape: of a student made here.
        model_args: with the student's name, if it has one.
        before: the stages to make the teacher; none if it is named, since it is then loaded right away.
    """
    import torch

    from hfllm.models.loading.saved import empty_model
    from hfllm.runs.models import check_trainable, load_config, load_tokenizer, peft_config, try_adapter
    from hfllm.stages.pretrain.flags import config_to_train

    teacher_config = None
    if before.runs:
        teacher = before.runs["rlhf"][2]
        teacher_config = config_to_train(teacher.model_name_or_path, teacher.model_revision, before.nested["rlhf"])
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
                shape.student_of(empty_model(teacher_config))


# ---- the stages before ----


def stages_before(
    teacher_name: str | None, output_dir: str, seed: int, world_seed: int, configs: Mapping[str, str | None]
) -> Chain:
    """Return the alignment of the world's teacher, with its required stages, if no teacher is named.

    Args:
        teacher_name: the teacher, if it is named.
        output_dir: of the student.
        seed: of all stages.
        world_seed: of the embedded world.
        configs: YAML flags, by stage.
    """
    before = chain_before(
        "distill", output_dir, seed, world_seed, given_models={"rlhf": teacher_name}, configs=configs
    )
    return replace(before, nested={name: rlhf_flags.stages_before(*parsed) for name, parsed in before.runs.items()})


# ---- trainers ----
#
# The parts of distillation: rows, the teacher and its answers, the students' trainers, and their comparison.


Rows = list[Mapping[str, object]]
# A model and its tokenizer.
Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def rows_to_learn(source: InstructionArguments, num_examples: int, num_documents: int, seed: int) -> tuple[Rows, Rows]:
    """Return training rows, with the world's documents among them if requested, and held-out ones with a prompt."""
    from hfllm.data.world.world import World
    from hfllm.stages.sft.build import instruction_data

    train_rows, eval_rows = instruction_data(source, num_examples, seed)
    if num_documents:
        texts = World(source.world_seed).documents(num_documents, seed=seed)
        train_rows = [*train_rows, *({"text": text} for text in texts)]
    return train_rows, eval_rows


def load_teacher(name: str, settings: Mapping[str, Any], device: "torch.device") -> Loaded:
    """Return the teacher, frozen, and its tokenizer.

    Args:
        settings: arguments of `from_pretrained`, `revision` among them.
        device: of a teacher in full precision.
    """
    from hfllm.models.loading.saved import check_vocabulary
    from hfllm.runs.models import load_tokenizer
    from hfllm.trainers.distillation import students

    tokenizer = load_tokenizer(name, settings["revision"])
    teacher = students.load_teacher(name, settings)
    if not getattr(teacher, "is_quantized", False):
        teacher = teacher.to(device)
    check_vocabulary(teacher, tokenizer, name)
    return teacher.eval().requires_grad_(False), tokenizer


def rows_to_teach(
    teacher: Loaded, rows: Rows, answers: str, mixed_prompts: float, max_new_tokens: int, seed: int
) -> Rows:
    """Return the rows with the teacher's answers and a share of mixed prompts, or unchanged with the data's answers.

    Args:
        answers: `data`, `sampled` or `greedy`.
        mixed_prompts: the share.
        max_new_tokens: of an answer.
        seed: of both.
    """
    from hfllm.data.formats import last_turn
    from hfllm.synthesis.answers import mix_prompts, write_answers

    if answers == "data":
        return rows
    # The teacher answers the last turn of a conversation.
    rows = [last_turn(row) if "completion" in row else row for row in rows]
    rows = mix_prompts(rows, mixed_prompts, seed)
    return write_answers(*teacher, rows, max_new_tokens, answers == "sampled", seed)


def student_trainer(
    args: "DistillationConfig",
    student: "NamedModel | StudentShape",
    adapter: "PeftConfig | None",
    teacher: Loaded,
    train_rows: Rows,
    eval_rows: Rows,
) -> "DistillationTrainer":
    """Return a trainer of a new copy of the student, the same for the same seed; a named adapter is trained further.

    Args:
        args: the trainer's.
        student: the named one, or the shape of one made here.
        adapter: a new one to train.
    """
    from transformers import set_seed

    from hfllm.runs.models import fitting_length, load_to_train, load_tokenizer
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.distillation.trainer import DistillationTrainer

    (teacher_model, teacher_tokenizer), is_new = teacher, isinstance(student, StudentShape)
    tokenizer = teacher_tokenizer if is_new else load_tokenizer(student.name, student.revision)
    set_seed(args.seed)
    model = student.student_of(teacher_model) if is_new else load_to_train(student, args.output_dir)[0]
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher_model if args.needs_teacher else None,
        args=changed(args, max_length=fitting_length(args.max_length, model)),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer if args.needs_teacher else None,
        peft_config=adapter,
    )
    use_plain_lines(trainer)
    return trainer


def compare_students(
    teacher: Loaded,
    trainers: "Mapping[str, DistillationTrainer]",
    world: "World | None",
    num_prompts: int,
    max_new_tokens: int,
    num_samples: int,
) -> "tuple[dict[str, GoldEvaluation], dict[str, float]]":
    """Return all metrics, and each model's answers with the gold reward (the world's exact score) where it exists.

    Args:
        trainers: the students', by name in the report; one is `student`.
        world: the embedded one, if the rows are its own.
        num_prompts: held-out ones of the world.
        max_new_tokens: of an answer.
        num_samples: of each prompt, at temperature 1.
    """
    from torch.utils.data import DataLoader

    from hfllm.evaluation.before_after import fit_metrics, gold_metrics, judge_model
    from hfllm.trainers.run_record import final_train_loss

    trainer = trainers["student"]
    students = {name: (each.model, each.processing_class) for name, each in trainers.items()}
    models, judged = {"teacher": teacher, **students}, {}
    if world is not None:
        settings = {"seed": trainer.args.seed, "num_samples": num_samples}
        judged = {
            name: judge_model(model, tokenizer, world, num_prompts, max_new_tokens, **settings)
            for name, (model, tokenizer) in models.items()
        }
    # Perplexities of other tokens cannot be compared.
    same = teacher[1].get_vocab() == trainer.processing_class.get_vocab()
    read_alike = {name: model for name, (model, _) in models.items() if same or name != "teacher"}
    rows = getattr(trainer.eval_dataset, "rows", trainer.eval_dataset)
    loader = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    counts = {name: models[name][0].num_parameters() for name in ("teacher", "student")}
    return judged, {
        **(gold_metrics(judged) if judged else {}),
        **fit_metrics(loader, read_alike),
        "train_loss": final_train_loss(trainer),
        **{f"parameters_{name}": count for name, count in counts.items()},
        "share_of_parameters": counts["student"] / counts["teacher"],
        "steps": trainer.state.global_step,
    }


def claims_of(metrics: Mapping[str, float]) -> list[Promise]:
    """Return what a student must surpass: the same student without its teacher, by gold reward where there is one."""
    if "gold_reward_against_alone_change" in metrics:
        what = "gold reward beyond the same student without its teacher"
        return [Promise(what, "gold_reward_against_alone_change", 0.0, "no change")]
    alone = "of the same student without its teacher"
    return [
        Promise("perplexity of the student", "perplexity_student", "perplexity_student_alone", alone, is_less=True)
    ]
