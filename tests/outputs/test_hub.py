"""Publishing, against a Hub on loopback: what arrives, retries, reruns, refusals, and that no secret gets out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, HubServer

from hfllm.errors import HIDDEN, InputError, redact
from hfllm.outputs.card import MARKER, model_card
from hfllm.outputs.hub import WAITS, push_folder
from hfllm.outputs.report import Plot, Report

ROOT = Path(__file__).parents[2]
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
LOAD = """
import json, sys
sys.modules["hfllm"] = None  # not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/model")
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Say red."}], tokenize=False)
logits = model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item()
print("LOADED", json.dumps({"chat": chat, "logits": logits, "eos": model.generation_config.eos_token_id}))
"""


@pytest.fixture
def finished(saved):
    """A run's output folder: the model, its report, and what must stay at home."""
    arguments = {
        "dataset_name": "/home/alice/secret-project/rows.jsonl",
        "dataset_name changed at": 1,
        "model_name_or_path": "outputs/base",
        "model_name_or_path changed at": 2,
        "learning_rate": 0.001,
        "seed": 42,
        "sft.seed": 42,
        "sft.learning_rate": 0.01,
        "eval_steps": None,
    }
    plot = Plot("loss", "step", "loss", {"loss": ([1, 2], [3.0, 2.0])})
    next_steps = [f"pipeline('text-generation', {str(saved)!r})"]
    Report("rlhf", arguments, {"gold_reward_after": 0.7}, curves={"loss": plot}, next_steps=next_steps).write(saved)
    for name in ("training_args.bin", "value_head.safetensors", "checkpoint-2/optimizer.pt", "sft/config.json"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_bytes(b"private")
    for name in ("stray.png", "stray.py"):
        (saved / name).write_bytes(b"#")
    return saved


def environment(tmp_path, server, **more):
    """Of a user's shell: nothing of this machine's accounts and caches, the Hub on loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    ours = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **ours, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **more}


# ---- what arrives ----


@pytest.mark.slow
@pytest.mark.turn(7)
def test_a_users_push_loads_back_without_hfllm(finished, make_model, tokenizer, tmp_path):
    """`python recipes/push.py`, then from_pretrained elsewhere, both as processes of their own."""
    with HubServer({TOKEN: ("me", "write")}) as server:
        command = [sys.executable, str(ROOT / "recipes/push.py"), "--model_name_or_path", str(finished)]
        pushed = subprocess.run(
            [*command, "--hub_model_id", "model"],
            env=environment(tmp_path, server, HF_TOKEN=TOKEN),
            capture_output=True,
            text=True,
        )
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        assert "me/model: pushed " in pushed.stdout
        loader = {**environment(tmp_path, server), "PYTHONPATH": ""}
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD], cwd=tmp_path, env=loader, capture_output=True, text=True, timeout=120
        )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    result = json.loads(loaded.stdout.partition("LOADED")[2])
    expected = make_model()(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item()
    assert abs(result["logits"] - expected) < 1e-3
    assert result["chat"] == tokenizer.apply_chat_template([{"role": "user", "content": "Say red."}], tokenize=False)
    assert result["eos"] == tokenizer.eos_token_id
    assert server.leaks == []
    assert TOKEN not in pushed.stdout + pushed.stderr


@pytest.mark.slow
def test_what_belongs_to_the_model_arrives_in_one_commit(hub, finished):
    url = push_folder(finished, "model", private=True, commit_message="First version")
    repo = hub.repos["me/model"]
    assert repo.messages == ["initial commit", "First version"]
    assert url == f"{hub.url}/me/model/commit/{repo.branches['main']}"
    assert repo.private
    files = repo.files()
    model = {path.name for path in finished.glob("*.py")} - {"stray.py"} | MODEL | TOKENIZER
    assert set(files) == model | {".gitattributes", "README.md", "report.json", "report.md", "loss.png"}
    assert {name for name, file in files.items() if file.lfs} == {"model.safetensors", "loss.png"}
    for name in model:
        assert files[name].content == (finished / name).read_bytes()
    assert hub.leaks == []


@pytest.mark.slow
def test_sharded_weights_replace_the_single_file(hub, make_model, saved, tmp_path):
    push_folder(saved, "me/model")
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    push_folder(tmp_path / "sharded", "me/model")
    weights = {name for name in hub.repos["me/model"].files() if name.endswith(".safetensors")}
    shards = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    # from_pretrained would prefer the old single file.
    assert weights == shards
    assert len(shards) > 1
    assert "model.safetensors.index.json" in hub.repos["me/model"].files()


@pytest.mark.slow
def test_a_branch_of_its_own(hub, saved):
    push_folder(saved, "me/model", revision="v1")
    assert "config.json" in hub.repos["me/model"].files("v1")
    assert "config.json" not in hub.repos["me/model"].files("main")


# ---- reruns and failures ----


@pytest.mark.slow
def test_a_rerun_that_changes_nothing_makes_no_commit(hub, finished, capsys):
    first = push_folder(finished, "me/model")
    assert push_folder(finished, "me/model") == first
    assert len(hub.repos["me/model"].messages) == 2
    assert "nothing has changed" in capsys.readouterr().out
    config = json.loads((finished / "generation_config.json").read_text())
    (finished / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    assert push_folder(finished, "me/model") != first
    assert len(hub.repos["me/model"].messages) == 3
    assert len(hub.seen("/put/")) == 2  # the weights and the plot, once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/repos/create", 503),
        ("/api/repos/create", "lost"),
        ("/api/validate-yaml", 502),
        ("/preupload/", 429),
        ("/objects/batch", "drop"),
        ("/put/", 503),
        ("/put/", "drop"),
        ("/lfs/verify", 500),
        ("/commit/", 504),
        ("/commit/", "drop"),
        ("/commit/", "lost"),
    ],
)
def test_a_failed_request_is_retried(hub, saved, path, kind):
    hub.fail(path, kind, body=b"<html>a gateway's page</html>")
    push_folder(saved, "me/model")
    assert hub.faults[0].times == 0
    repo = hub.repos["me/model"]
    assert len(repo.messages) == 2, "one commit, also where only its answer was lost"
    assert repo.files()["model.safetensors"].content == (saved / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "lacks"),
    [
        ("create_repo", KeyError("url")),
        ("create_commit", KeyError("commitUrl")),
        ("model_info", TypeError("not a dict")),
    ],
)
def test_an_answer_that_is_not_the_hubs_is_one_line(hub, saved, method, lacks, monkeypatch):
    def answer(*args, **kwargs):
        raise lacks

    monkeypatch.setattr(f"huggingface_hub.HfApi.{method}", answer)
    with pytest.raises(
        InputError, match=r"cannot push to me/model: the Hub's answer cannot be read \((no|not a)"
    ) as error:
        push_folder(saved, "me/model", private=True)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value) and hub.url in str(error.value)


def test_a_server_that_is_no_hub_is_one_line(hub, saved):
    hub.fail("/api/repos/create", 200, body=b'{"name": "me/model"}')
    with pytest.raises(InputError, match=r"the Hub's answer cannot be read \(no 'url' in it\)"):
        push_folder(saved, "me/model")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "kind"), [("/put/", 503), ("/put/", "drop"), ("/commit/", 503)])
def test_giving_up_leaves_nothing_half_done_and_a_rerun_resumes(hub, saved, capfd, path, kind):
    hub.fail(path, kind, times=1000)
    with pytest.raises(InputError, match=f"pushing to me/model failed {len(WAITS) + 1} times") as error:
        push_folder(saved, "me/model")
    assert "running the same command again resumes" in str(error.value)
    assert "\n" not in str(error.value)
    shown = "".join(capfd.readouterr())
    assert "trying again in 2 s" in shown
    assert "s3cret" not in shown + str(error.value), "the address of an upload is signed"
    assert hub.repos["me/model"].messages == ["initial commit"]
    hub.faults.clear()
    push_folder(saved, "me/model")
    assert len(hub.repos["me/model"].messages) == 2
    assert hub.seen("/put/").count(200) == 1, "weights that had arrived are not sent again"


def test_an_unreachable_hub(hub, saved):
    with pytest.raises(InputError, match="pushing to me/model failed"):
        push_folder(saved, "me/model", endpoint="http://127.0.0.1:9")


# ---- refusals ----


def refusal(hub, *arguments, **kwargs):
    """The message of a push that is refused at once: not retried, and one line."""
    before = len(hub.requests)
    with pytest.raises(InputError) as error:
        push_folder(*arguments, **kwargs)
    statuses = [status for _, _, status in hub.requests[before:]]
    assert len([status for status in statuses if status != 200]) <= 2, statuses
    message = str(error.value)
    assert "\n" not in message
    assert error.value.__cause__ is None
    return message


@pytest.mark.slow
def test_tokens_that_the_hub_refuses(hub, saved, monkeypatch):
    wrong = "hf_WrongWrongWrongWrongWrongWrongWrong"
    for message in (
        refusal(hub, saved, "me/model", token=wrong),
        refusal(hub, saved, "me/model", token="hf_readreadreadreadreadread"),
        refusal(hub, saved, "you/model"),
        refusal(hub, saved, "me/model", token=f"{wrong}\nX-Header: 1"),
        refusal(hub, saved, "me/model", token=f"{wrong}é"),
    ):
        assert "hf auth login" in message
        assert "HF_TOKEN" in message
        assert wrong not in message
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    assert "without an access token" in refusal(hub, saved, "me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(hub, saved, "me/model")


@pytest.mark.slow
def test_a_public_repository_is_not_taken_for_a_private_one(hub, saved):
    push_folder(saved, "me/model")
    assert "exists and is public" in refusal(hub, saved, "me/model", private=True)


def test_names_that_cannot_be(hub, saved):
    assert "--hub_model_id 'me/my model'" in refusal(hub, saved, "me/my model")


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, "bytes long where its header says"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"), "not safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (pickled, "holds pickled weights (pytorch_model.bin)"),
        (lose_shard, "names model-00002-of-00002.safetensors, which is missing"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "modeling_hfllm.py").unlink(), "auto_map names modeling_hfllm.py"),
        (lambda folder: (folder / "configuration_hfllm.py").unlink(), "configuration_hfllm.py"),
        (lambda folder: (folder / "experts_hfllm.py").unlink(), "imports experts_hfllm.py, which is missing"),
    ],
)
def test_a_spoilt_folder_is_refused_before_a_byte_goes_out(hub, saved, spoil, expected):
    spoil(saved)
    assert expected in refusal(hub, saved, "me/model")
    assert hub.requests == []


def test_an_unfinished_run_and_a_missing_folder(hub, tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    assert "only checkpoints of an unfinished run" in refusal(hub, tmp_path / "out", "me/model")
    assert "no such folder" in refusal(hub, tmp_path / "nowhere", "me/model")


@pytest.mark.slow
def test_an_adapter_goes_with_its_base_on_the_hub_only(hub, make_model, saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], base_model_name_or_path=str(saved))
    get_peft_model(make_model(), lora).save_pretrained(adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    (adapter / "README.md").unlink()  # PEFT's draft
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(saved)}))
    assert "which is not on the Hub: merge it" in refusal(hub, adapter, "me/adapter")
    path.write_text(json.dumps({**config, "base_model_name_or_path": "me/model"}))
    push_folder(adapter, "me/adapter")
    files = hub.repos["me/adapter"].files()
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].content.decode()
    assert "base_model: me/model" in card
    assert "library_name: peft" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in card


# ---- the card ----


@pytest.mark.slow
def test_the_card_tells_of_the_run(hub, finished):
    push_folder(finished, "me/model")
    files = hub.repos["me/model"].files()
    card = files["README.md"].content.decode()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hfllm", "rlhf"],
    }
    assert 'pipeline("text-generation", "me/model")' in card
    assert "trust_remote_code=True" in card
    assert "| gold_reward_after | 0.7   |" in card
    assert "![loss](loss.png)" in card
    assert "`rows.jsonl`, a local dataset" in card
    arguments = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert arguments == {
        "dataset_name": "rows.jsonl",
        "model_name_or_path": "outputs/base",
        "learning_rate": 0.001,
        "seed": 42,
        "sft.learning_rate": 0.01,
    }
    assert "| torch" in card
    published = card + files["report.json"].content.decode() + files["report.md"].content.decode()
    for private in ("alice", "secret-project", str(finished.parent)):
        assert private not in published
    assert json.loads(files["report.json"].content)["metrics"] == {"gold_reward_after": 0.7}


def test_hub_ids_become_metadata(saved):
    arguments = {"dataset_name": "someone/rows", "dataset_train_split": "train", "model_name_or_path": "org/base"}
    Report("sft", arguments, {}).write(saved)
    metadata = yaml.safe_load(model_card(saved).split("---\n")[1])
    assert metadata["base_model"] == "org/base"
    assert metadata["datasets"] == ["someone/rows"]


@pytest.mark.slow
def test_a_card_of_the_users_own_is_kept(hub, saved):
    push_folder(saved, "me/model")
    own = (saved / "README.md").read_text().replace(MARKER, "What I found out.")
    (saved / "README.md").write_text(own)
    push_folder(saved, "me/model")
    assert hub.repos["me/model"].files()["README.md"].content.decode() == own
    (saved / "README.md").write_text("---\ntags: [\n---\n")
    assert "Invalid metadata in README.md" in refusal(hub, saved, "me/model")


# ---- secrets ----


def test_secrets_are_hidden_in_errors():
    assert redact(f"Bearer {TOKEN}") == f"Bearer {HIDDEN}"
    assert redact("https://me:pass@hub.example/x") == f"https://{HIDDEN}@hub.example/x"
    assert redact("no-usual-look", "no-usual-look") == HIDDEN
    for harmless in ("hf_hub_download", "the hf-internal-testing/tiny model", "http://host:80/a@b"):
        assert redact(harmless) == harmless
    assert TOKEN not in str(InputError(f"model {TOKEN} could not be loaded"))


@pytest.mark.slow
def test_a_server_that_repeats_the_token_is_not_quoted(hub, saved, monkeypatch):
    own = "token-of-a-hub-of-ones-own"
    monkeypatch.delenv("HF_TOKEN")
    hub.tokens[own] = ("me", "write")
    hub.fail("/commit/", 400, body=json.dumps({"error": f"bad commit by Bearer {own} or {TOKEN}"}).encode())
    message = refusal(hub, saved, "me/model", token=own)
    assert f"bad commit by Bearer {HIDDEN} or {HIDDEN}" in message
