"""Distil a language model into a smaller one. With no flags: from nothing to a student of the world's model.

    accelerate launch recipes/distill.py
    accelerate launch recipes/distill.py --teacher_model_name_or_path NAME --dataset_name alpaca.json \\
        --student_layers_every 3
    accelerate launch recipes/distill.py --teacher_model_name_or_path NAME --model_name_or_path STUDENT \\
        --dataset_name alpaca.json --sequence_level

The student is `--model_name_or_path`, or every n-th layer of the teacher, or a new model of the given sizes. It learns
from the teacher's distributions, on the data's answers or on the teacher's own (`--answers sampled`), or with
`--sequence_level` from such answers alone, for which the two need no common vocabulary. Without
`--teacher_model_name_or_path` the embedded world's aligned model is made first, by rlhf.py under the output folder.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.runs.command_line import given_flags, parse_recipe, run
from hfllm.trainers.learning_rate import BatchArguments

CONFIG = Path(__file__).parent / "configs" / "distill" / "world.yaml"
SIZES = ("student_hidden_size", "student_num_hidden_layers", "student_num_attention_heads")
NEW_STUDENT = (*SIZES, "student_initializer_range")


@dataclass
class DistillArguments(DataArguments, BatchArguments):
    """The student, what it learns from, and the settings of the stages before."""

    student_layers_every: int | None = field(
        default=None, metadata={"help": "Make the student of every n-th layer of the teacher; 3 if nothing is said."}
    )
    student_hidden_size: int | None = field(default=None, metadata={"help": "Width of a new student."})
    student_num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers of a new student."})
    student_num_attention_heads: int | None = field(default=None, metadata={"help": "Query heads of a new student."})
    student_initializer_range: float | None = field(
        default=None, metadata={"help": "Standard deviation of a new student's weights; the teacher's by default."}
    )
    answers: str | None = field(
        default=None,
        metadata={
            "help": "Whose answers the student reads: the data's, or the teacher's, sampled at temperature 1 or "
            "greedy. By default the data's, and greedy ones with --sequence_level; the world's settings: sampled.",
            "choices": ["data", "sampled", "greedy"],
        },
    )
    mixed_prompts: float = field(
        default=0.0,
        metadata={
            "help": "Share of the prompts that go on, from some word, as another one ends. The teacher answers what "
            "no data asks, and the student learns more of what it would say (Beyer et al. 2022, arXiv:2106.05237)."
        },
    )
    sequence_level: bool = field(
        default=False,
        metadata={
            "help": "Train on answers that the teacher writes, as on data, in place of its distributions "
            "(Kim & Rush 2016, arXiv:1606.07947, section 3.2)."
        },
    )
    train_baseline: bool = field(
        default=True, metadata={"help": "Also train the same student without the teacher, for as many steps."}
    )
    num_examples: int = field(default=9600, metadata={"help": "Demonstrations of the embedded world to train on."})
    num_documents: int = field(default=0, metadata={"help": "Documents of the embedded world to train on besides."})
    num_eval_prompts: int = field(default=600, metadata={"help": "Held-out prompts of the world to answer."})
    num_samples: int = field(default=4, metadata={"help": "Answers to each that are sampled at temperature 1."})
    response_length: int | None = field(
        default=None,
        metadata={"help": "Longest answer, in tokens: by default 40 on the embedded world, else 256."},
    )
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the teacher's pretraining."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the teacher's fine-tuning."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the teacher's reward model."})
    rlhf_config: str | None = field(default=None, metadata={"help": "YAML flags of the teacher's alignment."})


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig

    from hfllm.trainers.distillation.config import DistillationConfig

    kinds, argv = (DistillArguments, DistillationConfig, ModelConfig), ["--output_dir", "outputs/distill", *argv]
    parsed = parse_recipe(kinds, argv, CONFIG, __doc__)
    # The world's settings suit the small models made here; a teacher of the user's own gets the libraries'.
    if parsed[1].teacher_model_name_or_path:
        parsed = parse_recipe(kinds, argv, None, __doc__)
    check_given(parsed[0], given_flags(argv))
    # What the world's config says gives way to flags that it contradicts; what the user says is refused beside them.
    idle = list(NEW_STUDENT) if parsed[0].student_layers_every else []
    idle += ["mixed_prompts"] if whose_answers(parsed[0]) == "data" else []
    said = parse_recipe(kinds, argv, None, __doc__)[0] if idle else parsed[0]
    for name in idle:
        setattr(parsed[0], name, getattr(said, name))
    return parsed


def check_given(script_args: DistillArguments, given: set[str]) -> None:
    """Refuse flags without effect that the world's settings have too, if it is the user who gives them.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.sources import WORLD
    from hfllm.errors import refuse

    for name in ("temperature", "beta", "soft_weight", "hard_weight") if script_args.sequence_level else ():
        refuse(name in given, f"--{name}", "--sequence_level learns from answers alone")
    is_world, is_data = script_args.dataset_name == WORLD, whose_answers(script_args) == "data"
    refuse("num_examples" in given and not is_world, "--num_examples", "it is for the world; use --max_samples")
    is_idle = "response_length" in given and not is_world and is_data
    refuse(is_idle, "--response_length", "the answers are the data's; --answers sampled lets the teacher write them")


def main(script_args: DistillArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Make what is missing, distil, compare, save, report. Returns the metrics."""
    import rlhf

    from hfllm.data.loading import world_of
    from hfllm.evaluation.distillation import distillation_plots, gold_tables
    from hfllm.runs.chain import run_stage
    from hfllm.runs.stage import Stage
    from hfllm.stages.distillation import check_student
    from hfllm.synthesis.prompt_mixing import mix_prompts
    from hfllm.synthesis.teacher_answers import write_answers
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scale_learning_rate

    check(script_args, training_args, model_args)
    before = {} if training_args.teacher_model_name_or_path else teacher_stages(script_args, training_args)
    stage = Stage("distill", script_args, training_args, model_args, before)
    if stage.report is not None:
        return stage.report["metrics"]
    teacher_config = rlhf.policy_config(before["rlhf"][2], before) if before else None
    check_student(model_args, teacher_config, lambda teacher: new_student(script_args, teacher))
    used = scale_learning_rate(script_args, training_args)
    if script_args.response_length is None:
        script_args.response_length = 256 if world_of(script_args) is None else 40
    train_rows, eval_rows = rows_to_learn(script_args, training_args.seed)
    if before:
        *others, aligned = before
        run_stage(rlhf, before[aligned], before={name: before[name] for name in others})
        training_args.teacher_model_name_or_path = before[aligned][1].output_dir
    teacher, teacher_tokenizer = load_teacher(training_args)
    tokenizer = student_tokenizer(model_args, teacher_tokenizer)
    answers = whose_answers(script_args)
    if answers != "data":
        train_rows = mix_prompts(train_rows, script_args.mixed_prompts, training_args.seed)
        settings = (script_args.response_length, answers == "sampled", training_args.seed)
        train_rows = write_answers(teacher, teacher_tokenizer, train_rows, *settings)

    def learn(args: Any, checkpoint: str | None = None) -> Any:
        trainer = student_trainer(
            script_args, args, model_args, (teacher, teacher_tokenizer), tokenizer, train_rows, eval_rows
        )
        train(trainer, checkpoint)
        trainer.save_model()
        return trainer

    args = without_teacher(training_args) if script_args.sequence_level else training_args
    trainer = learn(args, stage.checkpoint)
    models, alone = {"teacher": (teacher, teacher_tokenizer), "student": (trainer.model, tokenizer)}, None
    if script_args.train_baseline:
        train_rows, eval_rows = rows_to_learn(script_args, training_args.seed)
        alone_args = without_teacher(training_args, f"{training_args.output_dir}/alone")
        # Without the rows that were left out, the student has had fewer steps than epochs of the data are.
        alone_args.max_steps = trainer.state.max_steps
        alone = learn(alone_args)
        models["student_alone"] = (alone.model, tokenizer)
    judged, metrics = compare(script_args, training_args, models, trainer)
    history = alone.state.log_history if alone else []
    return stage.finish(
        trainer,
        {**metrics, **used},
        tables=gold_tables(judged) if judged else None,
        curves=distillation_plots(trainer.state.log_history, history, metrics),
        next_steps=next_steps(training_args.output_dir, world_of(script_args) is not None),
    )


def whose_answers(script_args: DistillArguments) -> str:
    """`data`, `sampled` or `greedy`."""
    return script_args.answers or ("greedy" if script_args.sequence_level else "data")


def check(script_args: DistillArguments, training_args: Any, model_args: Any) -> None:
    """Refuse flags that contradict each other or would have no effect, before anything is trained.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.sources import WORLD
    from hfllm.errors import InputError, refuse

    is_world, has_teacher = script_args.dataset_name == WORLD, bool(training_args.teacher_model_name_or_path)
    if not is_world and not has_teacher:
        raise InputError(f"--dataset_name {script_args.dataset_name} needs --teacher_model_name_or_path")
    sizes = [name for name in NEW_STUDENT if getattr(script_args, name) is not None]
    every, named = script_args.student_layers_every, model_args.model_name_or_path
    refuse(bool(named and (sizes or every)), f"--{(sizes or ['student_layers_every'])[0]}", "the student is named")
    refuse(bool(sizes and every), "--student_layers_every", f"--{(sizes or [''])[0]} describes a new student")
    refuse(every is not None and every < 2, "--student_layers_every", f"at least 2, got {every}")
    refuse(
        bool(script_args.num_documents) and not is_world, "--num_documents", "only the embedded world has documents"
    )
    for name in ("load_in_8bit", "load_in_4bit"):
        learns = model_args.use_peft and named
        reason = "it is the student's, who then needs --model_name_or_path and --use_peft; a teacher is loaded so by "
        refuse(getattr(model_args, name) and not learns, f"--{name}", reason + "--teacher_model_init_kwargs")
    reason = "the adapter's base, a new student, would be saved nowhere: name a student by --model_name_or_path"
    refuse(model_args.use_peft and not named, "--use_peft", reason)
    refuse(bool(model_args.attn_implementation) and not named, "--attn_implementation", "the student is not named")
    for name in ("pretrain_config", "sft_config", "reward_config", "rlhf_config"):
        refuse(bool(getattr(script_args, name)) and has_teacher, f"--{name}", "the teacher is named")
    is_idle = bool(training_args.teacher_model_revision) and not has_teacher
    refuse(is_idle, "--teacher_model_revision", "the teacher is not named")
    is_from_data = script_args.sequence_level and script_args.answers == "data"
    refuse(is_from_data, "--answers data", "--sequence_level learns from the teacher's answers")
    if not 0 <= script_args.mixed_prompts <= 1:
        raise InputError(f"--mixed_prompts must be from 0 to 1, got {script_args.mixed_prompts}")
    is_unanswered = bool(script_args.mixed_prompts) and whose_answers(script_args) == "data"
    refuse(is_unanswered, "--mixed_prompts", "no data answers such prompts; --answers sampled lets the teacher do it")
    for name in ("teacher_top_k", "hidden_weight"):
        given = bool(getattr(training_args, name))
        refuse(script_args.sequence_level and given, f"--{name}", "--sequence_level learns from answers alone")
    for name in ("num_examples", "num_eval_prompts", "num_samples", "response_length"):
        value = getattr(script_args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")


def teacher_stages(script_args: DistillArguments, training_args: Any) -> dict[str, tuple]:
    """The stages that make the world's aligned model, each with its parsed flags; the last one runs the others."""
    import rlhf

    flags = ["--seed", str(training_args.seed), "--world_seed", str(script_args.world_seed)]
    flags += ["--output_dir", f"{training_args.output_dir}/rlhf"]
    flags += ["--config", script_args.rlhf_config or str(rlhf.CONFIG)]
    for name in ("pretrain_config", "sft_config", "reward_config"):
        given = getattr(script_args, name)
        flags += [f"--{name}", given] if given else []
    aligned = rlhf.parse(flags)
    return {**rlhf.missing_stages(*aligned), "rlhf": aligned}


def rows_to_learn(script_args: DistillArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """Training rows, with the world's documents among them if asked for, and held-out ones with a prompt."""
    from sft import instruction_data

    from hfllm.data.world.world import World

    train_rows, eval_rows = instruction_data(script_args, seed)
    if script_args.num_documents:
        texts = World(script_args.world_seed).documents(script_args.num_documents, seed=seed)
        train_rows = [*train_rows, *({"text": text} for text in texts)]
    return train_rows, eval_rows


def load_teacher(training_args: Any) -> tuple[Any, Any]:
    """The teacher, frozen, and its tokenizer.

    Raises:
        InputError: when either cannot be loaded, or the teacher is larger than memory.
    """
    from hfllm.runs.models import load_tokenizer
    from hfllm.trainers.distillation import students

    name, settings = training_args.teacher_model_name_or_path, training_args.teacher_settings
    tokenizer = load_tokenizer(name, settings["revision"])
    teacher = students.load_teacher(name, settings)
    if not getattr(teacher, "is_quantized", False):
        teacher = teacher.to(training_args.device)
    return teacher.eval().requires_grad_(False), tokenizer


def student_tokenizer(model_args: Any, teacher_tokenizer: Any) -> Any:
    """The named student's own tokenizer, or the teacher's."""
    from hfllm.runs.models import load_tokenizer

    if model_args.model_name_or_path:
        return load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    return teacher_tokenizer


def make_student(script_args: DistillArguments, training_args: Any, model_args: Any, teacher: Any) -> Any:
    """The student before training: the same each time for the same seed."""
    from transformers import set_seed

    from hfllm.runs.models import load_policy

    set_seed(training_args.seed)
    if model_args.model_name_or_path:
        return load_policy(model_args)[0]
    return new_student(script_args, teacher)


def new_student(script_args: DistillArguments, teacher: Any) -> Any:
    """The student that no flag names, as the flags describe it."""
    from hfllm.trainers.distillation.students import smaller_student, student_from_layers

    sizes = {name.removeprefix("student_"): getattr(script_args, name) for name in SIZES}
    if any(sizes.values()) or script_args.student_initializer_range is not None:
        return smaller_student(teacher, **sizes, initializer_range=script_args.student_initializer_range)
    # A teacher in bf16 is none that can be trained so: small updates would be lost.
    return student_from_layers(teacher, script_args.student_layers_every or 3).float()


def student_trainer(
    script_args: DistillArguments,
    training_args: Any,
    model_args: Any,
    taught_by: tuple[Any, Any],
    tokenizer: Any,
    train_rows: list[dict],
    eval_rows: list[dict],
) -> Any:
    """A trainer of a new copy of the student."""
    from hfllm.runs.models import fitting_length, peft_config
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.distillation.trainer import DistillationTrainer

    teacher, teacher_tokenizer = taught_by
    student = make_student(script_args, training_args, model_args, teacher)
    training_args.max_length = fitting_length(training_args.max_length, student)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher if training_args.needs_teacher else None,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer if training_args.needs_teacher else None,
        peft_config=peft_config(model_args),
    )
    use_plain_lines(trainer)
    return trainer


def without_teacher(training_args: Any, output_dir: str | None = None) -> Any:
    """The same training on the data alone, in a folder of its own if one is named."""
    args = copy.copy(training_args)
    args.soft_weight, args.hard_weight, args.hidden_weight = 0.0, 1.0, 0.0
    args.teacher_top_k = args.teacher_cache_dir = None
    if output_dir:
        args.output_dir, args.push_to_hub = output_dir, False
    return args


def compare(
    script_args: DistillArguments, training_args: Any, models: dict[str, tuple[Any, Any]], trainer: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """Judged answers of each model where the data has a gold reward, and all metrics."""
    from torch.utils.data import DataLoader

    from hfllm.data.loading import world_of
    from hfllm.evaluation.distillation import fit_metrics, gold_metrics, judge_model

    judged, world = {}, world_of(script_args)
    if world is not None:
        judged = {
            name: judge_model(
                *(model, tokenizer, world, script_args.num_eval_prompts, script_args.response_length),
                seed=training_args.seed,
                num_samples=script_args.num_samples,
            )
            for name, (model, tokenizer) in models.items()
        }
    metrics = gold_metrics(judged) if judged else {}
    same = models["teacher"][1].get_vocab() == models["student"][1].get_vocab()
    read_alike = {name: model for name, (model, _) in models.items() if same or name != "teacher"}
    rows = getattr(trainer.eval_dataset, "rows", trainer.eval_dataset)
    loader = DataLoader(rows, training_args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    metrics |= fit_metrics(loader, read_alike)
    counts = {name: models[name][0].num_parameters() for name in ("teacher", "student")}
    return judged, {
        **metrics,
        "train_loss": next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry),
        **{f"parameters_{name}": count for name, count in counts.items()},
        "share_of_parameters": counts["student"] / counts["teacher"],
        "steps": trainer.state.global_step,
    }


def next_steps(output_dir: str, is_world: bool) -> list[str]:
    """The lines that load and try the result."""
    question = "What colour is the fox?" if is_world else "Hello!"
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"student = pipeline('text-generation', {output_dir!r})",
        f"messages = [{{'role': 'user', 'content': {question!r}}}]",
        "print(student(messages, max_new_tokens=48)[0]['generated_text'][-1]['content'])",
    ]


if __name__ == "__main__":
    run(main, parse)
