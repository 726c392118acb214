"""Every stage alone, the whole chain, and its reuse."""

import json
import os
from itertools import islice
from pathlib import Path

import pytest
import rlhf
import sft
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hfllm.errors import InputError
from hfllm.rewards.functions import length_penalty
from hfllm.runs import models
from hfllm.stages.rlhf import build as rlhf_stage
from hfllm.stages.rlhf import flags as rlhf_flags
from hfllm.stages.rlhf.build import NO_TOOLS
from hfllm.stages.sft.build import instruction_data

RLHF_METRICS = {
    "gold_reward_before",
    "gold_reward_after",
    "proxy_reward_before",
    "proxy_reward_after",
    "reward_model_accuracy",
    "kl_to_reference",
    "response_length",
}


@pytest.fixture(scope="session")
def aligned(tiny, tmp_path_factory):
    """The main job in miniature, from nothing."""
    folder = tmp_path_factory.mktemp("rlhf")
    metrics = rlhf.main(*rlhf.parse(["--config", tiny["rlhf"], "--output_dir", str(folder)]))
    return folder, metrics


def test_the_main_job_leaves_a_report_and_a_model(aligned, tiny):
    folder, metrics = aligned
    report = json.loads((folder / "report.json").read_text())
    assert set(metrics) >= RLHF_METRICS
    assert report["metrics"] == metrics
    assert set(report) >= {
        "stage",
        "hfllm_version",
        "arguments",
        "metrics",
        "artifacts",
        "wall_seconds",
        "environment",
    }
    for name in ("loss", "rewards", "overoptimization"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    for name in (
        "gold_reward",
        "gold_reward_greedy",
        "fact_accuracy",
        "proxy_reward",
        "response_length",
        "unfinished",
    ):
        assert metrics[f"{name}_change"] == metrics[f"{name}_after"] - metrics[f"{name}_before"]
        assert metrics[f"{name}_change_se"] >= 0 and metrics[f"{name}_n"] == (60 if name == "fact_accuracy" else 24)
    assert metrics["eval_prompts"] == metrics["kl_to_reference_n"] == 24 and metrics["reward_model_accuracy_n"] > 0
    text = (folder / "report.md").read_text()
    verdict = report["verdict"]
    assert text.startswith(f"# rlhf\n\n**Verdict: {verdict['sentence']}.**\n\n{report['summary']}\n")
    assert verdict["sentence"].startswith("every response was cut off") and verdict["next"].startswith("hfllm chat")
    assert "on 24 held-out prompts; KL" in report["summary"]
    assert set(report["given"]) == set(yaml.safe_load(Path(tiny["rlhf"]).read_text()))
    assert report["given"]["num_prompts"] == 40
    made = [(entry["role"], entry["stage"]) for entry in report["parents"]]
    assert made == [("model", "pretrain"), ("model", "sft"), ("reward model", "reward")]
    card = (folder / "README.md").read_text()
    assert all(part in card for part in (report["summary"], "## Origin", "## Reward", "num_prompts: 40"))
    assert "Gold reward by task family" in text
    assert "## The same prompts before and after" in text
    for stage in ("pretrain", "sft", "reward"):
        assert json.loads((folder / stage / "report.json").read_text())["stage"] == stage
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder).config.vocab_size, int)
    chat = pipeline("text-generation", str(folder))([{"role": "user", "content": "Hi"}], max_new_tokens=3)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
def test_the_main_job_is_reused_and_stages_too(aligned, tiny, capsys):
    folder, metrics = aligned
    written = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.safetensors")}
    arguments = ["--config", tiny["rlhf"], "--output_dir", str(folder)]
    assert rlhf.main(*rlhf.parse(arguments)) == metrics
    assert "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"finished run with kl_coef=0\.15, this one has kl_coef=0\.3"):
        rlhf.main(*rlhf.parse([*arguments, "--kl_coef", "0.3"]))
    os.remove(folder / "report.json")  # as if PPO had been interrupted
    # In another precision than the stages before, which stay as they are.
    metrics = rlhf.main(*rlhf.parse([*arguments, "--kl_coef", "0.3", "--bf16", "true"]))
    assert set(metrics) >= RLHF_METRICS
    after = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.safetensors")}
    changed = {str(path.relative_to(folder)) for path in after if after[path] != written[path]}
    assert changed == {"model.safetensors", "value_head.safetensors"}


@pytest.mark.slow
def test_a_changed_stage_runs_again_with_all_that_build_on_it(tiny, tmp_path):
    import pretrain

    from hfllm.runs.pipeline import run_stage

    folders = {stage: str(tmp_path / stage) for stage in ("pretrain", "sft")}

    def chain(documents):
        flags = ["--config", tiny["pretrain"], "--output_dir", folders["pretrain"]]
        run_stage("pretrain", pretrain.parse([*flags, "--num_documents", str(documents)]), {folders["sft"]: "sft"})
        base = ["--model_name_or_path", folders["pretrain"]]
        run_stage("sft", sft.parse(["--config", tiny["sft"], "--output_dir", folders["sft"], *base]))
        return (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns

    first = chain(300)
    assert chain(300) == first
    assert chain(301) != first


@pytest.mark.slow
def test_sft_learns_from_the_response_only(tiny, tmp_path, monkeypatch):
    """Training on a user's own rows; the labels of the prompt are masked."""
    import trl

    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("red", "blue", "one", "two") * 5]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    seen = {}
    train = trl.SFTTrainer.train

    def spy(self, *args, **kwargs):
        seen.update(next(iter(self.get_train_dataloader())))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "train", spy)
    arguments = ["--config", tiny["sft_rows"], "--pretrain_config", tiny["pretrain"], "--dataset_name", str(path)]
    sft.main(*sft.parse([*arguments, "--output_dir", str(tmp_path / "sft")]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    for labels in seen["labels"]:
        assert tokenizer.decode(labels[labels != -100]) in {f"{row['output']}<|end|>" for row in rows}


@pytest.mark.slow
def test_pretraining_computes_the_loss_in_chunks_and_saves_a_plain_model(tiny, tmp_path):
    import pretrain

    def run(name, *flags):
        return pretrain.main(
            *pretrain.parse(["--config", tiny["pretrain"], "--output_dir", str(tmp_path / name), *flags])
        )

    whole, chunked = run("whole", "--loss_chunk_size", "0"), run("chunked", "--loss_chunk_size", "50")
    for metrics in (whole, chunked):
        assert metrics.pop("tokens_per_second") > 0
    assert chunked == pytest.approx(whole, rel=1e-5, abs=1e-4)
    assert json.loads((tmp_path / "chunked" / "config.json").read_text()).get("loss_chunk_size") is None
    with pytest.raises(InputError, match="--loss_chunk_size"):
        run("bad", "--loss_chunk_size", "-1")


def test_a_changed_config_file_is_noticed(aligned, tiny, tmp_path):
    import yaml

    folder, _ = aligned
    with open(tiny["sft"]) as stream:
        values = yaml.safe_load(stream)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({**values, "num_examples": 121}))
    run = json.loads((folder / "report.json").read_text())["arguments"]
    arguments = ["--config", tiny["rlhf"], "--output_dir", str(folder)]
    arguments += [word for name in ("kl_coef", "bf16") for word in (f"--{name}", str(run[name]))]
    arguments += ["--sft_config", str(tmp_path / "sft.yaml")]
    with pytest.raises(InputError, match=r"sft\.num_examples=120, this one has sft\.num_examples=121"):
        rlhf.main(*rlhf.parse(arguments))


def test_a_changed_reward_is_noticed(tmp_path):
    from hfllm.runs.stage import stage_arguments

    def noted(*flags):
        arguments = stage_arguments(*rlhf.parse(["--output_dir", str(tmp_path / "out"), *flags]))
        return {name: value for name, value in arguments.items() if name.endswith((" changed at", " contents"))}

    file, model = tmp_path / "mine.py", tmp_path / "model" / "config.json"
    model.parent.mkdir()
    flags = {
        "reward_funcs": (file, [f"{file}:score", "gold"]),
        "reward_model_name_or_path": (model, ["on/the-hub", str(model.parent)]),
        "value_model": (model, [str(model.parent)]),
    }
    for flag, (path, named) in flags.items():
        path.write_text("{}")
        for time in (1, 2):
            os.utime(path, ns=(time, time))
            contents = noted(f"--{flag}", *named)
            assert contents.pop(f"{flag} changed at") == time and contents.keys() == {f"{flag} contents"}
        path.write_text("{ }")
        assert noted(f"--{flag}", *named)[f"{flag} contents"] != contents[f"{flag} contents"]
    assert noted() == noted("--reward_funcs", "gold", "--value_model", "head") == {}


@pytest.mark.slow
def test_a_users_reward_and_prompts(aligned, tiny, tmp_path):
    """A text-only model and prompts, with a reward from a file, as `--model_name_or_path ... --reward_funcs`."""
    folder, _ = aligned
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"The {word}", "target": "e"}) for word in "abcdefghij" * 4))
    function = tmp_path / "mine.py"
    function.write_text(
        "def count(prompts, completions, target, **columns):\n"
        "    return [float(text.count(letter)) for text, letter in zip(completions, target)]\n"
    )
    output = tmp_path / "out"
    metrics = rlhf.main(
        *rlhf.parse(
            [
                *("--model_name_or_path", str(folder / "sft"), "--dataset_name", str(prompts)),
                *("--reward_funcs", f"{function}:count", "--output_dir", str(output), "--total_episodes", "16"),
                *("--per_device_train_batch_size", "8", "--response_length", "8", "--save_strategy", "no"),
            ]
        )
    )
    assert "gold_reward_after" not in metrics
    assert {"proxy_reward_before", "proxy_reward_after", "kl_to_reference"} <= set(metrics)
    assert (output / "model.safetensors").is_file()


def test_the_proxy_alone_trains_the_policy(aligned, tiny):
    """The gold reward is logged at weight 0; `--reward_funcs gold` must be asked for."""
    from hfllm.rewards.functions import gold_reward

    script_args, training_args, _ = rlhf.parse(["--config", tiny["rlhf"]])
    trained, rewards = rlhf_stage.log_gold_reward(training_args, ["proxy"], "world")
    assert trained.reward_weights == [1.0, 0.0] and training_args.reward_weights is None
    assert rewards == ["proxy", gold_reward]
    script_args, training_args, _ = rlhf.parse(["--config", tiny["rlhf"], "--reward_funcs", "gold"])
    functions = rlhf_stage.checked_functions(script_args.reward_funcs)
    assert functions == [gold_reward]
    assert rlhf_stage.log_gold_reward(training_args, functions, "world")[0].reward_weights is None


def test_text_prompts_become_a_users_turn_on_demand(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"number {index}"}) for index in range(9)))
    for flags, kind in (([], str), (["--apply_chat_template"], list)):
        script_args, _, _ = rlhf.parse(["--model_name_or_path", "any", "--dataset_name", str(path), *flags])
        train_rows, eval_rows = rlhf_stage.prompt_data(script_args, 0, [])
        assert {type(row["prompt"]) for row in [*train_rows, *eval_rows]} == {kind}
        assert not {str(row["prompt"]) for row in train_rows} & {str(row["prompt"]) for row in eval_rows}


def test_reward_functions_are_tried_with_what_the_trainer_gives_them():
    def each_token(prompts, completions, completion_ids, **columns):
        assert set(columns) == {"answer", "completion_beginning", "trainer_state", "log_metric", "log_extra"}
        return [[1.0] * len(ids) for ids in completion_ids]

    rows = [{"prompt": text, "completion": "c", "answer": "a"} for text in ("one", "two")]
    rlhf_stage._try_functions([each_token, length_penalty(0.01)], rows, NO_TOOLS, timeout=60)


def test_what_the_policy_is_loaded_by_stays_with_it(monkeypatch):
    loaded = {}
    monkeypatch.setattr(
        "hfllm.models.loading.adapters.load_scorer", lambda name, kind, **kwargs: loaded.update({name: kwargs})
    )
    flags = ["--model_name_or_path", "my/policy", "--model_revision", "v2", "--use_peft", "--load_in_8bit"]
    script_args, training_args, model_args = rlhf.parse([*flags, "--value_model", "my/critic"])
    policy = models.named_model(model_args)
    models.load_reward_model("my/reward", policy)
    models.load_value_model(script_args.value_model, policy, ["my/reward"])
    assert {name: kwargs["revision"] for name, kwargs in loaded.items()} == {"my/reward": "main", "my/critic": "main"}
    assert "quantization_config" in loaded["my/reward"] and "quantization_config" not in loaded["my/critic"]
    (reward,) = rlhf_flags.stages_before(script_args, training_args, model_args).runs.values()
    assert reward[2].model_name_or_path == "my/policy" and reward[2].model_revision == "v2"


def test_the_stages_before_learn_from_as_many_other_forms(tmp_path):
    (config := tmp_path / "reward.yaml").write_text("augment: 0.5\n")

    def shares(*flags: str) -> dict[str, float]:
        runs = rlhf_flags.stages_before(*rlhf.parse([*flags])).runs
        return {name: runs[name][0].augment for name in ("sft", "reward")}

    assert shares("--augment", "0.25") == {"sft": 0.25, "reward": 0.25}
    assert shares("--augment", "0") == {"sft": 0, "reward": 0}
    # A config of the user's own says it for its stage.
    assert shares("--augment", "0.25", "--reward_config", str(config)) == {"sft": 0.25, "reward": 0.5}


@pytest.mark.parametrize("name", ["world", "texts.jsonl"])
def test_pretraining_texts_reach_the_trainer(name, saved, world, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def trainer(ptx_dataset, **kwargs):
        raise Seen(ptx_dataset["text"][:])

    monkeypatch.setattr("hfllm.trainers.ppo.trainer.PPOTrainer", trainer)
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "red"}\n{"text": " "}\n{"text": "blue"}\n')
    flags = ["--model_name_or_path", str(saved), "--reward_funcs", "gold", "--num_prompts", "8", "--output_dir", "out"]
    with pytest.raises(Seen) as seen:
        rlhf.main(*rlhf.parse([*flags, "--ptx_coef", "0.1", "--ptx_dataset_name", name, "--seed", "3"]))
    assert seen.value.args[0] == (world.documents(8, seed=3) if name == "world" else ["red", "blue"])


def test_the_longest_row_is_also_that_of_pretraining_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "red"}\n{"text": "%s"}\n' % ("x" * 100))
    flags = ["--ptx_dataset_name", str(path), "--ptx_coef", "0.1", "--output_dir", str(tmp_path / "out")]
    for limit, count in ((50, None), (0, 2)):
        script_args, training_args, _ = rlhf.parse([*flags, "--max_row_bytes", str(limit)])
        documents = (script_args.num_prompts, training_args.seed, script_args.world_seed, script_args.max_row_bytes)
        if count is None:
            with pytest.raises(InputError, match="line 2: a row of more than 50 bytes; --max_row_bytes N"):
                rlhf_stage.ptx_texts(str(path), *documents)
        else:
            assert len(rlhf_stage.ptx_texts(str(path), *documents)) == count


@pytest.mark.slow
def test_no_stage_is_trained_on_evaluation_rows(tiny, world):
    evaluation = {task.question for count in (360, 1440) for task in world.evaluation_tasks(count)}  # rlhf, reward
    script_args, training_args, _ = rlhf.parse(["--config", tiny["rlhf"], "--num_prompts", "3000"])
    train_rows, eval_rows = rlhf_stage.prompt_data(script_args, training_args.seed, [])
    assert not evaluation & {row["prompt"][0]["content"] for row in train_rows}
    compared = islice(world.tasks(training_args.seed + 1_000_000), 15_000)  # what reward.py draws
    assert not evaluation & {task.question for task in compared}
    demonstrated, _ = instruction_data(sft.parse([])[0], 9600, training_args.seed)
    assert not evaluation & {row["prompt"][0]["content"] for row in demonstrated}
    assert {row["prompt"][0]["content"] for row in eval_rows} <= evaluation


@pytest.mark.slow
def test_a_new_head_is_that_of_the_seed(aligned, tiny, tmp_path):
    """Whatever was drawn before in the same process, or was not."""
    import reward

    weights = []
    for number, seed in enumerate(("5", "5", "6")):
        folder = tmp_path / str(number)
        torch.manual_seed(number)
        shared = ["--model_name_or_path", f"{aligned[0]}/sft", "--seed", seed, "--max_steps", "1"]
        reward.main(*reward.parse(["--config", tiny["reward"], *shared, "--output_dir", str(folder)]))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(base, tiny, tmp_path):
    import pretrain

    weights = [AutoModelForCausalLM.from_pretrained(base).lm_head.weight]
    for seed in ("42", "6"):
        folder = str(tmp_path / seed)
        pretrain.main(*pretrain.parse(["--config", tiny["pretrain"], "--seed", seed, "--output_dir", folder]))
        weights.append(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
