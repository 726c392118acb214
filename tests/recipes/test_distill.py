"""The distillation stage in miniature: from nothing, from layers, by answers, and what it refuses."""

import json
from pathlib import Path

import distill
import pytest
import torch
import yaml
from killed import SAVES, Killed
from transformers import AutoModelForCausalLM, pipeline

from hfllm.data.tokenizer import train_tokenizer
from hfllm.errors import InputError
from hfllm.stages import distill as distill_module

KEYS = {
    *("gold_reward_teacher", "gold_reward_student", "gold_reward_student_alone", "fact_accuracy_student"),
    *("gold_reward_greedy_teacher", "gold_reward_greedy_student", "perplexity_teacher", "perplexity_student"),
    *("perplexity_student_alone", "agreement_student", "agreement_student_alone", "train_loss", "steps"),
    *("parameters_teacher", "parameters_student", "share_of_parameters"),
}
# On data of the user's own.
OWN = ("--dataset_name", "x.jsonl", "--teacher_model_name_or_path", "x")


@pytest.fixture(scope="session")
def distilled(tiny, tmp_path_factory):
    """The stage from nothing."""
    folder = tmp_path_factory.mktemp("distill")
    return folder, distill.main(*distill.parse(["--config", tiny["distill"], "--output_dir", str(folder)]))


@pytest.mark.slow
def test_it_leaves_a_report_and_a_student(distilled, tiny, capsys):
    folder, metrics = distilled
    report = json.loads((folder / "report.json").read_text())
    assert set(metrics) >= KEYS
    assert report["metrics"] == metrics
    assert (report["arguments"]["sft.max_steps"], report["arguments"]["rlhf.max_steps"]) == (4, 4)
    student = AutoModelForCausalLM.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "rlhf")
    assert metrics["parameters_student"] == student.num_parameters() < teacher.num_parameters()
    assert metrics["share_of_parameters"] == student.num_parameters() / teacher.num_parameters()
    assert metrics["steps"] == 4
    for name in ("loss", "parts", "gold"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "student alone, greedy" in text and "## Samples" in text
    chat = pipeline("text-generation", str(folder))([{"role": "user", "content": "Hi"}], max_new_tokens=3)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"
    assert distill.main(*distill.parse(["--config", tiny["distill"], "--output_dir", str(folder)])) == metrics
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_it_begins_again_from_the_teacher_that_is_there(distilled, tiny, capsys):
    folder, metrics = distilled
    (folder / "report.json").unlink()
    assert distill.main(*distill.parse(["--config", tiny["distill"], "--output_dir", str(folder)])) == metrics
    said = capsys.readouterr().out
    assert "rlhf: already done" in said and "=== rlhf" not in said
    # With another last step of the teacher's making, what it was made from stays.
    (folder / "report.json").unlink()
    made = (folder / "rlhf" / "sft" / "report.json").stat().st_mtime_ns
    with open(tiny["rlhf"]) as stream:
        other = {**yaml.safe_load(stream), "kl_coef": 0.3}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    distill.main(
        *distill.parse(
            ["--config", tiny["distill"], "--output_dir", str(folder), "--rlhf_config", f"{folder}/other.yaml"]
        )
    )
    assert (folder / "rlhf" / "sft" / "report.json").stat().st_mtime_ns == made
    assert json.loads((folder / "report.json").read_text())["arguments"]["rlhf.kl_coef"] == 0.3


def options(distilled, tmp_path, *flags):
    """Flags of a run on the teacher that the first one made."""
    shared = ["--num_examples", "40", "--max_steps", "2", "--per_device_train_batch_size", "4", "--num_eval_prompts"]
    shared += ["24", "--response_length", "6", "--save_strategy", "no", "--train_baseline", "false"]
    return [
        *("--teacher_model_name_or_path", str(Path(distilled[0]) / "rlhf"), "--output_dir", str(tmp_path / "out")),
        *shared,
        *flags,
    ]


@pytest.mark.slow
def test_a_students_layers_with_the_teachers_top_k(distilled, tmp_path):
    arguments = options(distilled, tmp_path, "--student_layers_every", "2", "--teacher_top_k", "5")
    metrics = distill.main(*distill.parse(arguments))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    assert "gold_reward_student_alone" not in metrics
    assert len(list((tmp_path / "out" / "teacher_cache").rglob("teacher.arrow"))) == 2


@pytest.mark.slow
def test_what_is_published_loads_and_learns_on(hub, distilled, learns_on, tmp_path):
    flags = ["--student_layers_every", "2", "--push_to_hub", "--hub_model_id", "me/student"]
    distill.main(*distill.parse(options(distilled, tmp_path, *flags)))
    folder = hub.repos["me/student"].download(tmp_path / "copy")
    assert not (folder / "alone").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    learns_on(folder)


@pytest.mark.slow
def test_another_vocabulary_needs_answers(distilled, make_model, world, tmp_path):
    tokenizer = train_tokenizer(world.documents(50), vocab_size=300)
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    arguments = options(distilled, tmp_path, "--model_name_or_path", str(tmp_path / "student"))
    with pytest.raises(InputError, match="sequence-level distillation: hfllm distill --sequence_level"):
        distill.main(*distill.parse(arguments))
    flags = ["--sequence_level", "--answers", "sampled", "--response_length", "64"]
    metrics = distill.main(*distill.parse([*arguments, *flags]))
    assert metrics["parameters_student"] == make_model(vocab_size=len(tokenizer)).num_parameters()
    assert "perplexity_student" in metrics and "agreement_student" not in metrics


@pytest.mark.slow
def test_a_share_of_the_prompts_is_mixed(distilled, tmp_path, monkeypatch):
    asked = []

    def write_answers(teacher, tokenizer, rows, *settings):
        asked.append([row["prompt"] for row in rows])
        raise InputError("seen")

    monkeypatch.setattr("hfllm.synthesis.answers.write_answers", write_answers)
    for share in ("0", "0.5"):
        flags = options(distilled, tmp_path, "--answers", "sampled", "--mixed_prompts", share)
        with pytest.raises(InputError, match="seen"):
            distill.main(*distill.parse(flags))
    usual, mixed = asked
    changed = sum(one != other for one, other in zip(usual, mixed, strict=True)) / len(usual)
    assert 0.2 < changed < 0.8


@pytest.mark.slow
def test_the_student_alone_has_as_many_steps(distilled, tmp_path, monkeypatch):
    made, make = [], distill_module.student_trainer
    monkeypatch.setattr(distill_module, "student_trainer", lambda *args: made.append(make(*args)) or made[-1])
    monkeypatch.setattr("hfllm.synthesis.answers.write_answers", lambda teacher, tokenizer, rows, *settings: rows[::4])
    flags = options(distilled, tmp_path, "--answers", "sampled", "--num_train_epochs", "1", "--max_steps", "-1")
    distill.main(*distill.parse([*flags, "--student_layers_every", "2", "--train_baseline", "true"]))
    student, alone = (trainer.state.global_step for trainer in made)
    assert student == alone == -(-len(made[0].train_dataset) // 4) < len(made[1].train_dataset) // 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "x", "--student_layers_every", "2"], "--student_layers_every cannot be used here"),
        (["--student_layers_every", "2", "--student_hidden_size", "32"], "here: --student_hidden_size describes"),
        (["--student_layers_every", "1"], "--student_layers_every 1: expected at least 2"),
        (["--dataset_name", "x.jsonl"], r"x\.jsonl needs --teacher_model_name_or_path"),
        (
            ["--dataset_name", "x.jsonl", "--teacher_model_name_or_path", "x", "--num_documents", "5"],
            "--num_documents cannot be used here",
        ),
        (["--sequence_level", "--hidden_weight", "1"], "--hidden_weight cannot be used here"),
        (["--sequence_level", "--answers", "data"], "--answers data cannot be used here"),
        (["--teacher_model_name_or_path", "x", "--use_peft"], "--use_peft cannot be used here: the adapter's base"),
        (["--load_in_8bit"], "--load_in_8bit cannot be used here"),
        (["--answers", "data", "--mixed_prompts", "0.5"], "--mixed_prompts cannot be used here: no data answers"),
        (["--answers", "data", "--mixed_prompts", "0.3"], "--mixed_prompts cannot be used here"),
        (["--student_layers_every", "2", "--student_hidden_size", "64"], "here: --student_hidden_size describes"),
        (["--mixed_prompts", "1.5"], r"--mixed_prompts 1\.5: expected a share in \[0, 1\]"),
        (["--attn_implementation", "eager"], "--attn_implementation cannot be used here"),
        (["--num_eval_prompts", "0"], "--num_eval_prompts 0: expected at least 1"),
        (["--teacher_model_name_or_path", "x", "--sft_config", "y"], "--sft_config cannot be used here"),
        (["--teacher_model_revision", "v2"], "--teacher_model_revision cannot be used here: the teacher is not named"),
        (["--sequence_level", "--temperature", "3"], "--temperature cannot be used here: --sequence_level learns"),
        (["--sequence_level", "--beta=1"], "--beta cannot be used here: --sequence_level learns only from answers"),
        (["--sequence_level", "--soft-weight", "1"], "--soft_weight cannot be used here"),
        (["--config", "{hard}"], "--hard_weight cannot be used here"),
        ([*OWN, "--num_examples", "5"], "--num_examples cannot be used here: it is for the world; use --max_samples"),
        ([*OWN, "--response_length", "9"], "--response_length cannot be used here: the answers are the data's"),
        # What needs the models is refused before any is trained.
        (["--model_name_or_path", "nowhere/x"], "model 'nowhere/x' could not be loaded"),
        (["--student_hidden_size", "63"], "a student of width 63 with 4 attention heads: the heads must divide"),
        (["--student_layers_every", "99"], "every 99th layer: the teacher has 4, so 2 to 4 are possible"),
        (
            ["--model_name_or_path", "{saved}", "--use_peft", "--lora_target_modules", "nowhere"],
            "--lora_target_modules nowhere: not in a model of type hfllm",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.pipeline.run_stage", lambda *args, **kwargs: pytest.fail("a stage was run"))
    (tmp_path / "hard.yaml").write_text("sequence_level: true\nhard_weight: 0.5\n")
    flags = [flag.format(saved=saved, hard=tmp_path / "hard.yaml") for flag in flags]
    with pytest.raises(InputError, match=message):
        distill.main(*distill.parse(["--output_dir", str(tmp_path / "out"), *flags]))


def test_a_teachers_settings_are_of_its_loading(saved):
    def load(settings):
        flags = ["--teacher_model_name_or_path", str(saved), "--teacher_model_init_kwargs", json.dumps(settings)]
        args = distill.parse(flags)[1]
        return distill_module.load_teacher(str(saved), args.teacher_settings, args.device)[0]

    assert load({"revision": "main", "dtype": "bfloat16"}).dtype == torch.bfloat16
    for settings, message in (
        ({"foo": 1}, "could not be loaded: .* unexpected keyword argument 'foo'"),
        ({"dtype": "flaot16"}, "could not be loaded: .* no attribute 'flaot16'"),
        ([1], r"teacher_model_init_kwargs must be a JSON object, got '\[1\]'"),
    ):
        with pytest.raises(InputError, match=message):
            load(settings)


def test_a_named_teacher_gets_no_settings_of_the_worlds():
    script_args, training_args, _ = distill.parse(["--teacher_model_name_or_path", "x"])
    assert (script_args.student_hidden_size, script_args.num_documents) == (None, 0)
    assert (training_args.temperature, training_args.soft_weight, training_args.hard_weight) == (3.0, 0.7, 0.3)
    assert distill.parse([])[0].student_hidden_size == 64
    assert distill.parse(["--student_layers_every", "4"])[0].student_hidden_size is None
    assert distill.parse(["--sequence_level"])[1].temperature == 1.0
    assert [distill.parse(flags)[0].mixed_prompts for flags in ([], ["--answers", "data"])] == [0.3, 0.0]


# ---- killed, see killed.py ----


def killed_flags(files):
    chain = [word for name in ("pretrain", "sft", "reward", "rlhf") for word in (f"--{name}_config", "")]
    teacher = files.model("teacher_model_name_or_path")
    return ["--config", files.tiny["distill"], *chain, *teacher, "--answers", "data", *SAVES]


KILLED = Killed(killed_flags)
