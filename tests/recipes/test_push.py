"""`hfllm push`, and --push_to_hub of the stages: one push of the finished model, and no secret left anywhere."""

import json
import re

import push
import pytest
import sft
from hub_server import TOKEN

from hfllm.errors import HIDDEN, InputError
from hfllm.runs.identity import run_arguments


@pytest.fixture
def command(saved, tmp_path):
    """A small run with checkpoints that publishes its result, without its token."""
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("red", "blue", "one", "two") * 5]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--model_name_or_path", str(saved), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--output_dir", str(tmp_path / "my-model"), "--max_steps", "2", "--save_steps", "1", "--bf16", "false"),
        *("--per_device_train_batch_size", "2", "--push_to_hub"),
    ]


def run(recipe, *argv):
    return recipe.main(*recipe.parse([str(word) for word in argv]))


def complaint(recipe, *argv):
    with pytest.raises(InputError) as error:
        run(recipe, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_no_token(tmp_path, hub, capfd):
    """Not in anything printed, on disk (pickled arguments and checkpoints included) or published."""
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for repo in hub.repos.values():
        assert not any(TOKEN.encode() in file.content for files in repo.commits.values() for file in files.values())


def test_a_stage_publishes_its_result_once(hub, command, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    command = [*command, "--hub_token", TOKEN, "--hub_private_repo", "true", "--hub_revision", "trial"]
    run(sft, *command)
    assert (tmp_path / "my-model" / "checkpoint-1").is_dir()
    repo = hub.repos["me/my-model"]
    assert repo.private
    assert repo.messages == ["initial commit", "Upload model"]
    files = repo.files("trial")
    assert {"model.safetensors", "generation_config.json", "chat_template.jinja", "modeling_hfllm.py"} <= set(files)
    assert {"report.json", "report.md", "loss.png", "experts_hfllm.py"} <= set(files)
    assert not any("checkpoint" in name or name.endswith(".bin") for name in files)
    card = files["README.md"].content.decode()
    assert "| eval_loss" in card
    assert "sft" in card
    assert str(tmp_path) not in card + files["report.json"].content.decode() + files["report.md"].content.decode()
    monkeypatch.setattr("transformers.Trainer.train", None)
    run(sft, *command)  # finished already: nothing is trained, and nothing new to publish
    assert len(repo.messages) == 2
    assert_no_token(tmp_path, hub, capfd)


@pytest.mark.slow
def test_a_failed_push_loses_nothing(hub, command, tmp_path, capfd):
    hub.fail("/commit/", 503, times=1000)
    message = complaint(sft, *command)
    folder = tmp_path / "my-model"
    assert f"hfllm push --model_name_or_path {folder} --hub_model_id me/my-model" in message
    assert (folder / "report.json").is_file()
    assert hub.repos["me/my-model"].messages == ["initial commit"]
    hub.faults.clear()
    run(push, "--model_name_or_path", folder, "--hub_model_id", "me/my-model", "--commit_message", "At last")
    assert hub.repos["me/my-model"].messages == ["initial commit", "At last"]
    assert_no_token(tmp_path, hub, capfd)


def test_what_cannot_be_published_stops_before_training(hub, command, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", None)
    assert "the finished model is pushed once" in complaint(sft, *command, "--hub_strategy", "checkpoint")
    assert "the finished model is pushed once" in complaint(sft, *command, "--hub_always_push", "true")
    assert "its base must be a model of the Hub" in complaint(sft, *command, "--use_peft")
    assert hub.requests == []
    assert "hf auth login" in complaint(sft, *command, "--hub_token", "hf_WrongWrongWrongWrongWrong")


def test_push_says_what_it_needs(hub, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "outputs/rlhf: no such folder; run hfllm rlhf first" in complaint(push)
    assert "for example --hub_model_id me/my-model" in complaint(push, "--model_name_or_path", saved)
    assert complaint(push, "--hub_model", "x") == "unknown flag 'hub_model'; did you mean 'hub_model_id'?"
    (tmp_path / "push.yaml").write_text("privat: true\n")
    assert "'privat'; did you mean 'private'?" in complaint(push, "--config", "push.yaml")


def test_credentials_among_the_arguments_are_not_reported(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--model_init_kwargs", '{"token": "mine", "revision": "v1"}']
    reported = run_arguments(*sft.parse([*flags, "--run_name", "x", "--dataset_name", f"me/rows-{TOKEN}"]))
    assert reported["model_init_kwargs"] == {"token": HIDDEN, "revision": "v1"}
    assert TOKEN not in str(reported)


@pytest.mark.parametrize("word", ["--help", "--help_all"])
def test_help_does_not_show_a_token_of_a_config_file(word, tmp_path, capsys):
    (tmp_path / "push.yaml").write_text(f"hub_token: {TOKEN}\n")
    with pytest.raises(SystemExit):
        push.parse(["--config", str(tmp_path / "push.yaml"), word])
    shown = capsys.readouterr().out
    assert "    hfllm push --hub_model_id" in shown
    assert "--hub_token" in shown
    assert TOKEN not in shown


def test_flags_as_they_may_be_written(tmp_path):
    (tmp_path / "push.yaml").write_text("private: yes\ndry_run: 0\nrevision: trial\n")
    (parsed,) = push.parse(["--config", str(tmp_path / "push.yaml"), "--dry-run", "--commit-message", "Two words"])
    assert (parsed.private, parsed.dry_run, parsed.revision) == (True, True, "trial")
    assert (parsed.commit_message, parsed.model_name_or_path) == ("Two words", "outputs/rlhf")
    for words in (["--private", "false"], ["--private=no"]):
        assert not push.parse(["--config", str(tmp_path / "push.yaml"), *words])[0].private


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"norm_type": "foo"}, "norm_type='foo'"),
        ({"model_type": "nope", "auto_map": {}}, "cannot be loaded: .*nope"),
        ({"model_type": ["a"]}, "cannot be loaded"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be loaded|could not be loaded"),
    ],
)
@pytest.mark.parametrize("more", [["--dry_run"], []])
def test_a_config_that_nobody_could_load_is_not_pushed(fields, named, more, hub, saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **fields}))
    line = complaint(push, "--model_name_or_path", saved, "--hub_model_id", "me/model", *more)
    assert re.search(named, line) and str(saved) in line
    assert hub.requests == []


def test_code_that_a_model_brings_along_is_not_run_to_push_it(hub, saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "mine.py").write_text("raise SystemExit('it ran')")
    assert "mine.py" in run(push, "--model_name_or_path", saved, "--hub_model_id", "me/model", "--dry_run")


def test_a_dry_run_needs_no_network(hub, saved, capsys):
    sizes = run(push, "--model_name_or_path", saved, "--hub_model_id", "me/model", "--dry_run")
    shown = capsys.readouterr().out
    assert f"{(saved / 'model.safetensors').stat().st_size:,}  model.safetensors" in shown
    assert set(sizes) >= {"README.md", "model.safetensors", "chat_template.jinja"}
    assert (saved / "README.md").is_file()
    assert hub.requests == []


def test_only_the_main_process_pushes(hub, saved, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(push, "--model_name_or_path", saved, "--hub_model_id", "me/model") == {}
    assert hub.requests == []
