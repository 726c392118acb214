"""The parts of distillation: rows, the teacher and its answers, the students' trainers, and their comparison."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfllm.runs.arguments import changed
from hfllm.stages.distill import DistillArguments, longest_answer, new_student, whose_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.evaluation.before_after import GoldEvaluation
    from hfllm.trainers.distillation.config import DistillationConfig
    from hfllm.trainers.distillation.trainer import DistillationTrainer

Rows = list[Mapping[str, object]]
# A model and its tokenizer.
Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def rows_to_learn(script_args: DistillArguments, seed: int) -> tuple[Rows, Rows]:
    """Return training rows, with the world's documents among them if asked for, and held-out ones with a prompt."""
    from hfllm.data.world.world import World
    from hfllm.stages.sft import instruction_data

    train_rows, eval_rows = instruction_data(script_args, script_args.num_examples, seed)
    if script_args.num_documents:
        texts = World(script_args.world_seed).documents(script_args.num_documents, seed=seed)
        train_rows = [*train_rows, *({"text": text} for text in texts)]
    return train_rows, eval_rows


def load_teacher(training_args: "DistillationConfig") -> Loaded:
    """Return the teacher, frozen, and its tokenizer.

    Raises:
        InputError: when either cannot be loaded, they do not fit, or the teacher is larger than memory.
    """
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
    """Return the rows with the teacher's answers and a share of mixed prompts, or unchanged, as the flags say.

    Raises:
        InputError: when no answer can be written.
    """
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
        training_args: those of the recipe.
        trainers: those of the students, by name in the report; one is `student`.
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
