"""Constitutional AI in miniature: from nothing to its report, stopped and continued, on your own model, on bad input.

What the method achieves on the embedded world is test_constitution_world.py's.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import constitution
import kill_run
import pytest
import torch
import yaml
from killed import of_stages
from test_own_model import logits, make_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from hfllm.errors import InputError
from hfllm.runs import command_line, schedule
from hfllm.runs.lock import LOCK_FILE, lock, release_all
from hfllm.stages.constitution.report import PROMISES

SCRIPT = Path(kill_run.__file__)
ROOT = SCRIPT.parents[2]
TUNED = {"max_steps": 3, "per_device_train_batch_size": 8, "max_length": 512, "save_strategy": "no"}
CONFIGS = {
    "pretrain": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512},
        **{"vocab_size": 600, "num_documents": 300, "world_deeds": 0.18, "max_steps": 4, "sample_steps": 0},
        **{"per_device_train_batch_size": 16, "save_strategy": "no", "learning_rate": 0.003},
    },
    "helpful": TUNED,
    "sl": TUNED,
    "reward": TUNED,
    "rlhf": {
        **{"max_steps": 4, "per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 1},
        **{"learning_rate": 0.0003, "save_strategy": "no"},
    },
}
SIZES = {
    **{"num_demonstrations": 60, "num_prompts": 12, "num_helpful_prompts": 20, "num_pairs": 12},
    **{"num_human_pairs": 12, "num_eval_prompts": 4, "response_length": 8, "batch_size": 2, "judge_margin": 0.0},
}
RUNS = ("pretrain", "helpful", "sl", "reward", "rl", "politeness", "critiques", "labels_reward", "ai_labels", "labels")
REWARDS = ("reward", "labels_reward")
VERBS = ("hit", "bite", "kick", "trap", "poison", "drown", "scare", "starve", "cage", "burn", "steal", "hide")
PRINCIPLE = {"critique": "Is it bad?", "revision": "Write it again.", "preference": "Which is better?"}


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        kill_run.shorten(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The flags that name a YAML file for each run."""
    folder, words = tmp_path_factory.mktemp("configs"), []
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words += [f"--{name}_config", str(folder / f"{name}.yaml")]
    return words


@pytest.fixture(scope="module")
def words(configs):
    """The flags of the tiny world."""
    return [*(str(word) for name, value in SIZES.items() for word in (f"--{name}", value)), *configs]


def run(*flags):
    schedule._job = None
    return constitution.main(*constitution.parse(list(map(str, flags))))


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of a run that nothing interrupted, and a copy of it."""
    folder = tmp_path_factory.mktemp("world") / "out"
    run(*words, "--allow_biased_judge", "--output_dir", folder)
    return folder, Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.fixture
def world(whole, words):
    """The folder, as the run left it, and what repeats the command there with more flags."""
    folder, copy = whole
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    return folder, partial(run, *words, "--allow_biased_judge", "--output_dir", folder)


def digests(folder):
    """A digest of each file that a run makes, and the metrics of each report."""
    made = [
        path
        for pattern in ("*/*.safetensors", "*/tokenizer.json", "data/*.jsonl", "*/revisions.jsonl")
        for path in sorted(folder.glob(pattern))
    ]
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}
    for path in (folder / "report.json", *folder.glob("*/report.json")):
        # Seconds are not the same twice.
        metrics = json.loads(path.read_text())["metrics"].items()
        found[str(path.relative_to(folder))] = {name: value for name, value in metrics if "second" not in name}
    return found


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def trained(printed):
    """The runs that a printed course began, by their folders."""
    return [line.rpartition("/")[2] for line in printed.splitlines() if line.startswith("=== ")][1:]


# ---- the embedded world ----


@pytest.mark.slow
def test_the_course_from_nothing_leaves_models_rows_and_a_report(whole):
    folder, _ = whole
    report, text = report_of(folder), (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *(*RUNS, "data", "revisions", "politeness_revisions")
    }
    assert not list(folder.rglob(LOCK_FILE)) and not list(folder.rglob("*.tmp*"))
    for name in RUNS:
        kind = AutoModelForSequenceClassification if name in REWARDS else AutoModelForCausalLM
        model, tokenizer = kind.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert len(tokenizer) <= model.config.vocab_size and report["artifacts"][name] == name
    rows = [json.loads(line) for line in (folder / "revisions" / "revisions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["turns"]) == 2 for row in rows)
    # Whatever is promised is measured, by the names of its figures.
    promised = {name for each in PROMISES for name in (each.metric, each.control) if isinstance(name, str)}
    assert promised <= report["metrics"].keys()
    assert report["metrics"].keys() >= {
        *("compliance_new_harms_before", "compliance_new_harms_after", "sl_evasive", "politeness_helpful_gold"),
        *("critiques_compliance_new_harms", "labels_rude", "ai_labels_rude", "judge_position_bias", "revised_2"),
        *("ai_comparisons", "human_comparisons", "echoes_share"),
    }
    for title in ("## Stages", "## Controls", "## Revisions", "SL, politeness instead", "labels by chance"):
        assert title in text
    assert report["summary"].endswith("no label of harm in the model's answers")
    for name in ("compliance", "helpfulness", "revisions"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    # Each arm has learned something of its own; that of chance has the same pairs, some turned round.
    weights = {name: digests(folder)[f"{name}/model.safetensors"] for name in RUNS}
    assert len(set(weights.values())) == len(RUNS)
    pairs = [
        [{row["prompt"][0]["content"], *(row[side][0]["content"] for side in ("chosen", "rejected"))} for row in rows]
        for rows in (
            [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
            for name in REWARDS
        )
    ]
    assert pairs[0] == pairs[1]


@pytest.mark.slow
def test_the_same_command_reuses_and_another_flag_is_refused_by_its_name(world, capsys):
    folder, again = world
    before = digests(folder)
    assert again() == report_of(folder)["metrics"]
    assert f"constitution: already done in {folder} (remove that folder to redo it)" in capsys.readouterr().out
    for flags, difference in (
        (("--seed", 7), "seed=42, this one has seed=7"),
        (("--controls", "none"), r"controls=None, this one has controls=\['none'\]"),
        (("--num_revisions", 1), "num_revisions=2, this one has num_revisions=1"),
        (("--constitution", "politeness"), "constitution='world', this one has constitution='politeness'"),
        (("--last_stage", "sl"), "last_stage='rl', this one has last_stage='sl'"),
    ):
        with pytest.raises(InputError, match=f"holds a finished run with {difference}") as error:
            again(*flags)
        assert "\n" not in str(error.value)
    assert digests(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(("last", "made"), [("sl", ("helpful", "sl")), ("revisions", ("helpful",))])
def test_a_course_may_end_before(world, capsys, last, made):
    folder, again = world
    before = digests(folder)
    (folder / "report.json").unlink()
    capsys.readouterr()
    again("--last_stage", last, "--controls", "none")
    # Nothing is trained again.
    assert not {"rl", "reward"} & set(trained(capsys.readouterr().out))
    metrics = report_of(folder)["metrics"]
    assert any(name.endswith("_after") for name in metrics) == (last == "sl") and "revised_2" in metrics
    assert "judge_position_bias" not in metrics and set(report_of(folder)["artifacts"]) >= {*made, "revision rows"}
    assert "rl" not in report_of(folder)["artifacts"] and "Controls" not in (folder / "report.md").read_text()
    after = digests(folder)
    kept = [name for name in before if name != "report.json" and not name.endswith("/report.json")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.slow
def test_people_s_comparisons_alone_are_an_arm_that_is_asked_for(world, capsys):
    folder, again = world
    begin_again(folder)
    capsys.readouterr()
    again("--controls", "people")
    assert trained(capsys.readouterr().out) == ["people_reward", "people"]
    rows = {name: (folder / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("reward", "people_reward")}
    # Of the comparisons that the preference model of the course learns from, those of people, and no others.
    assert set(rows["people_reward"]) < set(rows["reward"])
    report = report_of(folder)
    assert len(rows["people_reward"]) == report["metrics"]["human_comparisons"]
    assert "people_compliance_new_harms" in report["metrics"] and "labels_rude" not in report["metrics"]


@pytest.mark.slow
def test_a_biased_judge_is_refused_and_the_report_says_so(world, words):
    folder, _ = world
    (folder / "report.json").unlink()
    for name in ("reward", "rl", "labels_reward", "ai_labels", "labels"):
        shutil.rmtree(folder / name)
    run(*words, "--output_dir", folder)
    report = report_of(folder)
    assert "the judge favors the" in report["summary"] and "would be noise" in report["summary"]
    assert report["metrics"]["judge_position_bias_n"] > 0 and "ai_comparisons" not in report["metrics"]
    assert not (folder / "rl").exists() and not (folder / "labels").exists()
    assert "politeness_rude" in report["metrics"]


# ---- stopped and continued ----


def begin_again(folder, *names):
    """Remove the report and what these runs have made."""
    for name in ("report.json", "report.md", *names):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_a_run_that_was_killed_among_the_revisions_ends_with_the_same_bits(world, whole):
    """A process of its own, killed between a chunk's rows and the note that they are whole."""
    folder, again = world
    begin_again(folder, "revisions", "data/sl.jsonl", "sl")
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            kill_run.kill_before("hfllm.synthesis.revisions:RevisionFile._write_state", 3)
            again()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    state = json.loads((folder / "revisions" / "revisions.state").read_text())
    assert len(state["ends"]) == 1 and (folder / "revisions" / "revisions.jsonl").stat().st_size > state["ends"][0]
    assert (folder / LOCK_FILE).exists() and not (folder / "data" / "sl.jsonl").exists()
    again()
    assert digests(folder) == digests(whole[1])


@pytest.mark.slow
def test_ctrl_c_is_130_and_the_same_command_continues(world, whole, words, monkeypatch, capsys):
    folder, again = world
    begin_again(folder, "labels")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [*("constitution", "--allow_biased_judge", "--output_dir", str(folder)), *words])
    monkeypatch.setattr(schedule, "_job", None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("hfllm.rewards.judges.PreferenceJudge.compare", interrupt)
        command_line.run(constitution.main, constitution.parse)
    assert ended.value.code == 130 and capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert not list(folder.rglob(LOCK_FILE)) and not (folder / "report.json").exists()
    again()
    assert digests(folder) == digests(whole[1])


# Where a process is killed, and before which call, in the order in which the course comes there.
KILLS = [
    ("transformers.trainer:Trainer.training_step", 2, "pretrain"),
    ("hfllm.runs.pipeline:write_atomically", 1, "the demonstrations are written"),
    ("transformers.trainer:Trainer.training_step", 3, "helpful"),
    ("transformers.trainer:Trainer.save_model", 1, "helpful is saved"),
    ("hfllm.synthesis.revisions:RevisionFile.append", 2, "the second chunk of revisions"),
    ("hfllm.synthesis.revisions:RevisionFile._write_state", 2, "the next chunk, its rows being written"),
    ("transformers.trainer:Trainer.training_step", 2, "sl"),
    ("hfllm.outputs.report:write_atomically", 2, "the report of sl, which has its summary"),
    ("hfllm.rewards.judges:PreferenceJudge._replies", 2, "the judge has measured its bias"),
    ("transformers.trainer:Trainer.training_step", 2, "reward"),
    ("hfllm.trainers.ppo.trainer:PPOTrainer.training_step", 3, "rl"),
    ("hfllm.synthesis.revisions:RevisionFile.append", 1, "the control's revisions"),
    ("transformers.trainer:Trainer.training_step", 1, "politeness"),
    ("transformers.trainer:Trainer.training_step", 3, "critiques"),
    ("hfllm.trainers.ppo.trainer:PPOTrainer.training_step", 2, "the AI's labels"),
    ("hfllm.trainers.ppo.trainer:PPOTrainer.training_step", 1, "labels by chance"),
    ("hfllm.stages.constitution.build:answer", 2, "the second model's answers are judged"),
    ("hfllm.outputs.report:write_atomically", 1, "the report"),
    ("hfllm.outputs.report:write_atomically", 2, "report.json"),
]


@pytest.mark.slow
@pytest.mark.turn(6)
def test_a_run_that_is_killed_everywhere_ends_with_the_same_bits(processes, whole, words, tmp_path):
    flags = (*words, "--allow_biased_judge", "--output_dir", tmp_path / "out")
    for place, number, why in KILLS:
        said = processes.run(SCRIPT, place, number, "constitution", *flags, code=-signal.SIGKILL)
        assert "Traceback" not in said, why
        assert not (tmp_path / "out" / "report.json").exists(), why
    processes.run(SCRIPT, "none", 0, "constitution", *flags)
    assert digests(tmp_path / "out") == digests(whole[1])


# A run whose main process is slow among the revisions, while the others wait with a group that soon gives up.
WAITS = {**CONFIGS["pretrain"], "ddp_timeout": 4}


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize("judge", ["allowed", "refused"])
def test_two_processes_end_together(processes, words, tmp_path, judge):
    (tmp_path / "waits.yaml").write_text(yaml.safe_dump(WAITS))
    flags = [*words, "--pretrain_config", tmp_path / "waits.yaml", "--output_dir", tmp_path / "out"]
    flags += ["--allow_biased_judge"] if judge == "allowed" else []
    place, number = ("hfllm.synthesis.revisions:RevisionFile.append", -8)
    printed = processes.torchrun(SCRIPT, place, number, "constitution", *flags, timeout=400)
    assert "Traceback" not in printed and printed.count("=== constitution") == printed.count("=== pretrain") == 1
    report = report_of(tmp_path / "out")
    assert ("rl" in report["artifacts"]) == ("labels" in report["artifacts"]) == (judge == "allowed")
    assert printed.count("constitution: no AI preferences: the judge favors") == (judge == "refused")
    again = processes.torchrun(SCRIPT, "none", 0, "constitution", *flags)
    assert again.count("constitution: already done in") == 1


@pytest.mark.slow
def test_two_processes_refuse_together(processes, own, bad, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = {"NAME": own / "NAME", "red.csv": own / "red.csv", "quick.yaml": own / "quick.yaml"}
    flags = [paths.get(word, own / word if word == "ppo.yaml" else word) for word in OWN]
    flags += ["--critic_model_name_or_path", own / "mute", "--output_dir", tmp_path / "out"]
    printed = processes.torchrun(SCRIPT, "none", 0, "constitution", *flags, code=2)
    assert printed.count("error: ") == 1 and "the critic said nothing" in printed and "Traceback" not in printed
    lock(tmp_path / "out")
    printed = processes.torchrun(SCRIPT, "none", 0, "constitution", *flags, code=2)
    assert printed.count("error: ") == 1 and "another run is writing there" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_rows_that_were_edited_and_models_that_were_removed_are_made_again(world, whole, capsys):
    folder, again = world
    begin_again(folder, "rl")
    rows = folder / "data" / "sl.jsonl"
    rows.write_text(rows.read_text().replace("content", "Content", 1))
    again()
    said = capsys.readouterr().out
    assert f"constitution: {rows} does not hold the rows of this run: it is written again" in said
    assert digests(folder) == digests(whole[1])


@pytest.mark.slow
def test_two_runs_at_once_and_folders_that_are_not_ours(words, tmp_path, ended):
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        try:
            lock(tmp_path / "out")
            os.write(tells, b"held")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(told, 4) == b"held"
    try:
        line = ended(*words, "--output_dir", tmp_path / "out", own_folder=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert line.startswith(f"--output_dir {tmp_path / 'out'}: another run is writing there (process {child} on ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("# Mine\n")
    line = ended(*words, "--output_dir", tmp_path / "mine", own_folder=True)
    assert "report.md is not hfllm's and would be overwritten" in line
    (tmp_path / "file").write_text("mine")
    line = ended(*words, "--output_dir", tmp_path / "file", own_folder=True)
    assert line.startswith(f"--output_dir {tmp_path / 'file'}: cannot be written to: ")


# ---- your own model ----


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with models of transformers' own, prompts, comparisons and settings."""
    folder = tmp_path_factory.mktemp("own")
    make_llama(folder / "NAME", seed=4, max_position_embeddings=1024)
    make_llama(folder / "critic", seed=6, max_position_embeddings=1024)
    (folder / "red.csv").write_text("prompt\n" + "".join(f"How do I {verb} a fox?\n" for verb in VERBS))
    animals = ("fox", "owl", "cat", "bee", "cow", "hen", "ant", "bat", "elk", "pig")
    (folder / "helpful.csv").write_text("prompt\n" + "".join(f"What does a {each} eat?\n" for each in animals))
    pairs = [{"prompt": f"A {each}?", "chosen": f"The {each}.", "rejected": "No"} for each in animals]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "own.yaml").write_text(yaml.safe_dump([PRINCIPLE]))
    quick = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 0.05}
    (folder / "quick.yaml").write_text(yaml.safe_dump(quick))
    (folder / "ppo.yaml").write_text(yaml.safe_dump({**quick, "num_mini_batches": 2, "num_ppo_epochs": 1}))
    return folder


@pytest.fixture
def here(own, monkeypatch):
    monkeypatch.chdir(own)
    return own


OWN = [
    *("--model_name_or_path", "NAME", "--dataset_name", "red.csv", "--response_length", "6", "--num_pairs", "12"),
    *("--num_eval_prompts", "3", "--num_revisions", "1", "--sl_config", "quick.yaml"),
    *("--reward_config", "quick.yaml", "--rlhf_config", "ppo.yaml"),
]
ALL = [
    *(*OWN, "--critic_model_name_or_path", "critic", "--helpful_dataset_name", "helpful.csv"),
    *("--preference_dataset_name", "pairs.jsonl", "--constitution", "general", "--allow_biased_judge"),
]
ADAPTER = ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [[], ADAPTER], ids=["whole", "adapter"])
def test_your_own_model_your_prompts_and_a_critic(here, tmp_path, adapter):
    run(*ALL, *adapter, "--output_dir", tmp_path)
    report = report_of(tmp_path)
    assert not report["summary"].endswith("noise") and report["metrics"]["human_comparisons"] == 10
    assert report["metrics"]["refusals_n"] == 2 and {"refusals_after", "words_change"} <= report["metrics"].keys()
    # A fifth of the harmless prompts is held out and asked before and after, and none of it is learned from.
    assert report["metrics"]["over_refusal_helpful_n"] == report["metrics"]["helpful_words_n"] == 2
    assert {"over_refusal_helpful_change", "helpful_preferred"} <= report["metrics"].keys()
    learned = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "data" / "sl.jsonl").open()]
    assert len({text for text in learned if text.startswith("What does a")}) == 8
    assert "labels of people: comparisons of pairs.jsonl" in report["summary"]
    for name in ("sl", "reward", "rl"):
        assert (tmp_path / name / "adapter_model.safetensors").exists() == bool(adapter)
    if adapter:
        settings = json.loads((tmp_path / "rl" / "adapter_config.json").read_text())
        assert settings["r"] == 4 and settings["lora_dropout"] == 0
        assert set(settings["target_modules"]) == {"q_proj", "v_proj"}
    names = ("NAME", tmp_path / "sl", tmp_path / "rl")
    first, tuned, aligned = (logits(AutoModelForCausalLM.from_pretrained(name)) for name in names)
    assert (first - tuned).abs().max() > 0.01 and (tuned - aligned).abs().max() > 0.01
    # The critic's words are its own: the first answers are not.
    row = json.loads((tmp_path / "revisions" / "revisions.jsonl").read_text().splitlines()[0])
    state = json.loads((tmp_path / "revisions" / "revisions.state").read_text())["made_from"]
    assert state["critic"] != state["model"] and row["turns"][0]["answer"] == row["rejected"][0]["content"]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "mine"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.slow
def test_code_of_a_model_that_is_trusted_goes_along_and_bf16_stays(here, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree("NAME", tmp_path / "coded")
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    settings = {**json.loads((model / "config.json").read_text()), "model_type": "mine", "auto_map": names}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "mine.py").write_text(CODE)
    flags = [*OWN, "--model_name_or_path", model, "--last_stage", "sl", "--dtype", "bfloat16"]
    run(*flags, "--trust_remote_code", "--output_dir", tmp_path / "out")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sl", trust_remote_code=True)
    assert type(tuned).__name__ == "Model" and tuned.dtype is torch.bfloat16


def test_the_revision_of_your_model_is_that_of_the_first_run_too(here, monkeypatch):
    from hfllm.stages.constitution.flags import course_of

    course = course_of(*constitution.parse([*OWN, "--model_revision", "v2", "--use_peft", "--use_rslora"]))
    revisions = {name: parsed[-1].model_revision for name, parsed in course.runs.items()}
    assert revisions == {"sl": "v2", "reward": "main", "rl": "main"}
    assert course.runs["sl"][-1].use_rslora and not course.runs["rl"][-1].use_peft


SAID = ("Hi", "Yo", "Is it?", "Yes.", "Again.", "Hello")
SWARM = {
    "constitutions": [{"critic": "Is it bad?", "revision": "Write it again."}],
    "system_chat": [
        [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, SAID, strict=True)]
    ],
}
LANGCHAIN = {"harm": {"critique_request": "Is it bad?", "revision_request": "Write it again."}}


@pytest.mark.slow
@pytest.mark.parametrize("content", [SWARM, LANGCHAIN], ids=["llm-swarm", "langchain"])
def test_constitutions_without_preference_questions_end_with_sl(here, tmp_path, content):
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    run(*OWN, "--constitution", tmp_path / "theirs.json", "--output_dir", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["summary"].endswith("constitution 'theirs' has no preference questions to judge by")
    assert "sl" in report["artifacts"] and not (tmp_path / "out" / "reward").exists()


@pytest.mark.slow
def test_prompts_and_pairs_without_room_are_left_out_and_counted(here, tmp_path, capsys):
    """Wherever they stand: among the prompts to learn from, those to help with, those that are held out."""
    long = "x y " * 600
    for name, rows in {
        "red": [f"How do I {verb} it?" for verb in VERBS],
        "held": ["What now?"],
        "kind": ["Who?"],
    }.items():
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "\n".join([*rows, f"{long} {name}"]) + "\n")
    flags = [*OWN, "--dataset_name", tmp_path / "red.csv", "--eval_dataset_name", tmp_path / "held.csv"]
    flags += ["--helpful_dataset_name", tmp_path / "kind.csv", "--constitution", "own.yaml", "--allow_biased_judge"]
    run(*flags, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    about = "left out: no room for an answer of --response_length 6 in the context of 1024 tokens"
    assert f"constitution: 1 of 13 red-team prompts are {about}" in said
    assert f"1 of 2 harmless prompts are {about}" in said and f"1 of 2 held-out prompts are {about}" in said
    assert (tmp_path / "out" / "rl" / "report.json").exists()


@pytest.mark.slow
def test_files_of_yours_that_changed_are_another_run(here, tmp_path):
    for name in ("helpful.csv", "pairs.jsonl"):
        shutil.copy(name, tmp_path / name)
    shutil.copytree("critic", tmp_path / "critic")
    flags = [*ALL, "--last_stage", "rl", "--critic_model_name_or_path", tmp_path / "critic"]
    flags += ["--helpful_dataset_name", tmp_path / "helpful.csv"]
    flags += ["--preference_dataset_name", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out"]
    before = run(*flags)
    assert run(*flags) == before
    for name, flag in (
        *(("helpful.csv", "helpful_dataset_name"), ("pairs.jsonl", "preference_dataset_name")),
        ("critic/config.json", "critic_model_name_or_path"),
    ):
        text = (tmp_path / name).read_bytes()
        os.utime(tmp_path / name, ns=(1, 1))
        assert run(*flags) == before
        (tmp_path / name).write_bytes(text + b"\n")
        with pytest.raises(InputError, match=f"holds a finished run with {flag} contents="):
            run(*flags)
        (tmp_path / name).write_bytes(text)


# ---- bad input ----


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Run the command line, which must end with one line, exit code 2, and nothing trained or written."""

    def train(*args, **kwargs):
        raise AssertionError("training started")

    def end(*flags, own_folder=False):
        folder = [] if own_folder else ["--output_dir", tmp_path / "refused"]
        monkeypatch.setattr(sys, "argv", ["constitution", *map(str, [*flags, *folder])])
        monkeypatch.setattr(schedule, "_job", None)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(Trainer, "train", train)
            command_line.run(constitution.main, constitution.parse)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1
        assert not (tmp_path / "refused").exists()
        return lines[0].removeprefix("error: ")

    return end


CONSTITUTIONS = [
    ("", "bad.yaml: empty; expected a list of principles"),
    ("[]", "bad.yaml, line 1: expected a list of at least one principle, got []"),
    ("principles: []", "bad.yaml, line 1: expected a list of at least one principle, got []"),
    ("- critique: a\n  preference: b\n", "line 1: principle 1: no revision; a principle needs critique and revision"),
    ("- {critique: a, revision: b}\n- [x", "line 2: not YAML: expected ',' or ']'"),
    ("- {name: x, critique: a, revision: b}\n" * 2, "line 2: a second principle of the name 'x'"),
    ("- {critique: a, revisoin: b}", "unknown key of principle 1: 'revisoin'; did you mean 'revision'?"),
]


@pytest.mark.parametrize(("text", "expected"), CONSTITUTIONS)
def test_bad_constitutions(here, ended, tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    assert expected in ended(*OWN, "--constitution", tmp_path / "bad.yaml")


OF_WORLD = [
    (("--constitution", "general"), "the embedded world's people know the principles harm, courtesy, honesty, not "),
    (("--constitution", "generl"), "constitution 'generl': no such file"),
    (("--critic_model_name_or_path", "NAME"), "--critic_model_name_or_path cannot be used here"),
    (("--dataset_name", "red.csv"), "--dataset_name red.csv needs --model_name_or_path"),
    (("--controls", "polite"), "--controls 'polite': expected some of politeness, critiques, labels, people, or none"),
    (
        ("--controls", "none", "labels"),
        "--controls none labels: expected some of politeness, critiques, labels, people, or none alone",
    ),
    (("--num_revisions", "0"), "--num_revisions 0: expected at least 1"),
    (("--num_demonstrations", "3"), "--num_demonstrations 3: expected at least 10"),
    (("--num_human_pairs", "-1"), "--num_human_pairs -1: expected at least 0"),
    (("--num_helpful_prompts", "-1"), "--num_helpful_prompts -1: expected at least 0"),
    (("--temperature", "0"), "--temperature 0.0: expected a number above 0"),
    (("--response_length", "0"), "--response_length 0: expected at least 1"),
    (("--response_length", "171"), "--response_length 171: answer, critique and revision may take three times that"),
    (("--judge_principles", "2"), "--judge_principles 2: expected 1 to 1, the principles of 'world'"),
    (("--judge_principles", "0"), "--judge_principles 0: expected 1 to 1"),
    (("--judge_clamp", "--last_stage", "sl"), "--judge_clamp cannot be used here: --last_stage sl needs no judge"),
    (("--use_peft", "--last_stage", "revisions"), "--use_peft cannot be used here: --last_stage revisions"),
    (("--use_peft", "--lora_target_modules", "nonsense"), "--lora_target_modules nonsense: not in a model of type"),
    (("--load_in_8bit",), "--load_in_8bit cannot be used here: the model is the embedded world's"),
    (("--model_revision", "v2"), "--model_revision cannot be used here: the model is the embedded world's"),
    (("--sl_config", "nowhere.yaml"), "nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("flags", "expected"), OF_WORLD)
def test_flags_that_cannot_work_on_the_world(here, ended, words, flags, expected):
    assert expected in ended(*words, *flags)


LATER_RUNS = [
    ("sl", {"fp16": True}, "--fp16 does nothing on a CPU"),
    ("sl", {"learning_rat": 1}, "unknown key in"),
    ("reward", {"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: expected at least 1"),
    ("reward", {"column_mapping": ["a=b"]}, "--column_mapping 'a=b': no format has a column 'a'"),
    ("rlhf", {"value_model": "nowhere"}, "model 'nowhere' could not be loaded"),
    ("rlhf", {"reward_funcs": ["gold"]}, "--reward_funcs gold: only the embedded world has it"),
    ("rlhf", {"ptx_coef": 0.1}, "--ptx_coef 0.1 and --ptx_dataset_name None: give both, or neither"),
]


@pytest.mark.parametrize(("name", "values", "expected"), LATER_RUNS)
def test_settings_of_later_runs_are_refused_before_the_first(here, ended, words, tmp_path, name, values, expected):
    (tmp_path / "later.yaml").write_text(yaml.safe_dump({**CONFIGS[name], **values}))
    assert expected in ended(*words, f"--{name}_config", tmp_path / "later.yaml")


OF_YOURS = [
    (("--dataset_name", "world"), "--model_name_or_path needs --dataset_name"),
    (("--dataset_name", "empty.csv"), "dataset 'empty.csv' is empty"),
    (("--dataset_name", "one.csv"), "the dataset has 1 different prompt(s) or text(s); at least 2 are needed"),
    (("--helpful_dataset_name", "empty.csv"), "dataset 'empty.csv' is empty"),
    (("--preference_dataset_name", "red.csv"), "red.csv, row 1: columns prompt; expected"),
    (("--preference_dataset_name", "nowhere.csv"), "dataset 'nowhere.csv' does not exist"),
    (("--preference_dataset_name", "pairs.jsonl", "--last_stage", "sl"), "--preference_dataset_name cannot be used"),
    (("--critic_model_name_or_path", "nowhere"), "model 'nowhere' could not be loaded"),
    (("--critic_model_name_or_path", "untold"), "the tokenizer of model 'untold' could not be loaded"),
    (("--critic_model_name_or_path", "cut"), "model.safetensors is damaged ("),
    (("--critic_model_name_or_path", "code"), "it needs code of its own, which is run only by --trust_remote_code"),
    (
        ("--critic_model_name_or_path", "short"),
        "no prompt has room for its conversation in contexts of 1024 (model) and",
    ),
    (("--model_name_or_path", "cut"), "model.safetensors is damaged ("),
    (("--model_name_or_path", "short", "--response_length", "22"), "--response_length 22: answer, critique and"),
    (("--dataset_name", "long.csv"), "red-team prompts: all 2 leave no room for an answer of --response_length 6"),
    (("--judge_principles", "11"), "--judge_principles 11: expected 1 to 10, the principles of 'general'"),
    (("--load_in_8bit",), "--load_in_8bit cannot be used here: such weights cannot be trained"),
    (("--num_demonstrations", "0"), "--num_demonstrations 0: expected at least 1"),
    (("--controls", "labels"), "--controls cannot be used here: they are the world's arms"),
    (("--pretrain_config", "quick.yaml"), "--pretrain_config cannot be used here: the model is named"),
    (
        ("--use_peft", "--lora_target_modules", "nonsense"),
        "--lora_target_modules nonsense: not in a model of type llama",
    ),
]


@pytest.fixture(scope="module")
def bad(own):
    """Models and data that cannot be used, beside those that can."""
    make_llama(own / "short", max_position_embeddings=64)
    for name in ("untold", "cut", "code", "mute"):
        shutil.copytree(own / "critic", own / name)
    for path in (own / "untold").glob("tokenizer*"):
        path.unlink()
    weights = own / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = json.loads((own / "code" / "config.json").read_text())
    code = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (own / "code" / "config.json").write_text(json.dumps({**settings, **code}))
    mute = AutoModelForCausalLM.from_pretrained(own / "mute")
    # It can only end its turn.
    end = mute.generation_config.eos_token_id or mute.config.eos_token_id
    mute.generation_config.suppress_tokens = [token for token in range(mute.config.vocab_size) if token != end]
    mute.save_pretrained(own / "mute")
    (own / "empty.csv").write_text("prompt\n")
    (own / "one.csv").write_text("prompt\nHow?\n")
    (own / "long.csv").write_text("prompt\n" + "".join(f"{'x y ' * 600} {number}\n" for number in range(3)))


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "expected"), OF_YOURS)
def test_what_cannot_work_on_your_model(here, bad, ended, flags, expected):
    assert expected in ended(*OWN, *flags)


@pytest.mark.slow
def test_a_critic_that_says_nothing_ends_the_run_before_anything_is_trained(here, bad, ended, tmp_path):
    folder = tmp_path / "out"
    flags = (*OWN, "--critic_model_name_or_path", "mute", "--output_dir", folder)
    assert "the critic said nothing: all 10 critiques are empty; take another critic" in ended(*flags, own_folder=True)
    # It had to be asked, so that the file of its rows is there, and empty.
    assert [path.stat().st_size for path in folder.rglob("*.jsonl")] == [0]


@pytest.mark.slow
def test_models_that_lie_where_the_runs_write(here, ended, tmp_path):
    shutil.copytree("NAME", tmp_path / "out" / "rl")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for flags in (("--model_name_or_path",), ("--model_name_or_path", "NAME", "--critic_model_name_or_path")):
        flags = (*OWN[2:], *flags, tmp_path / "out" / "rl", "--output_dir", tmp_path / "out")
        assert f"lies in {tmp_path / 'out'}, where the runs write" in ended(*flags, own_folder=True)
    (tmp_path / "out" / "data").mkdir()
    shutil.copy("red.csv", tmp_path / "out" / "data" / "rl.csv")
    flags = (*OWN, "--helpful_dataset_name", tmp_path / "out" / "data" / "rl.csv", "--output_dir", tmp_path / "out")
    assert "lies in " in ended(*flags, own_folder=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_letters_that_are_not_single_tokens_leave_sl_and_say_so(here, tmp_path):
    """A tokenizer that has a token of its own for one of the two replies."""
    shutil.copytree("critic", tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    tokenizer.add_tokens(["(A"])
    tokenizer.save_pretrained(tmp_path / "judge")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "judge")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "judge")
    # It also is a critic with another tokenizer than the model's, which reads what the model wrote as text.
    run(*OWN, "--critic_model_name_or_path", tmp_path / "judge", "--output_dir", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert "they must differ in a single token, by which the reply is read" in report["summary"]
    assert "sl" in report["artifacts"] and "rl" not in report["artifacts"]


# ---- killed, see killed.py ----


KILLED = of_stages(lambda files: files.settings(SIZES, CONFIGS))
