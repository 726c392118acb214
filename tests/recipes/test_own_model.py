"""Adapters through the whole chain on a model of another family, by the commands of docs/guides/rlhf.md.

Every step is compared with PEFT by hand.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import distill
import pytest
import reward
import sft
import torch
from huggingface_hub import constants
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hfllm.errors import InputError
from hfllm.runs.recipes import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What the page leaves to the user: how long, and how fast.
QUICK = ["--max_steps", "3", "--save_strategy", "no", "--learning_rate", "0.05", "--per_device_train_batch_size", "4"]
BUDGET = {
    "sft": QUICK,
    "reward": QUICK,
    "rlhf": [*QUICK, "--num_ppo_epochs", "1", "--response_length", "6", "--logging_steps", "1", "--kl_coef", "0.01"],
    "quantize": [
        *("--schemes", "dynamic", "--save_scheme", "dynamic", "--sensitivity", "none", "--rounds", "0"),
        *("--max_length", "32", "--prompt_tokens", "8", "--new_tokens", "2"),
    ],
    "merge": [],
    "push": [],
}
LOAD = """
import json, sys
sys.modules["hfllm"] = None  # not installed
import torch
{lines}
from transformers import AutoModelForCausalLM
ids = torch.tensor({ids})
both = dict(adapter=model, merged=AutoModelForCausalLM.from_pretrained("me/my-model"))
print("LOADED", json.dumps(dict((name, each(input_ids=ids).logits.tolist()) for name, each in both.items())))
"""
IDS = torch.tensor([[5, 9, 40, 41, 60, 17, 33]])


def commands():
    """The commands of the page, in order, by recipe."""
    text = (DOCS / "guides" / "rlhf.md").read_text(encoding="utf-8").partition("## Adapters")[2]
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    lines = [shlex.split(line) for line in block.splitlines() if line]
    assert all(line[0] == "hfllm" for line in lines)
    return {line[1]: line[2:] for line in lines}


def run(name, *flags):
    recipe = load_recipe(name)
    return recipe.main(*recipe.parse([*map(str, flags), *BUDGET[name]]))


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["The fox is red and sleeps all day.", "The bird sings at night in the tree."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", model_max_length=128
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_llama(folder, seed=0, with_tokenizer=True, **overrides):
    """Save a tiny model of transformers' own, with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **overrides,
        },
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def logits_of_adapter(base, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def mean_b(folder):
    weights = load_file(Path(folder, "adapter_model.safetensors"))
    return torch.stack([value.abs().mean() for name, value in weights.items() if "lora_B" in name]).mean().item()


def settings_of(folder):
    return json.loads(Path(folder, "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    things = ["fox", "bird", "tree", "day", "night", "song"] * 3
    rows = {
        "alpaca.json": [{"instruction": f"What is a {each}?", "input": "", "output": f"A {each}."} for each in things],
        "pairs.jsonl": [{"prompt": f"A {each}?", "chosen": f"The {each}.", "rejected": "No"} for each in things],
        "prompts.jsonl": [{"prompt": f"Say {each}."} for each in things],
    }
    for name, values in rows.items():
        as_lines = "\n".join(json.dumps(each) for each in values)
        (folder / name).write_text(json.dumps(values) if name.endswith(".json") else as_lines)
    (folder / "texts.txt").write_text("The fox is red.\n\nThe bird sings at night.")
    make_llama(folder / "NAME")
    return folder


@pytest.fixture(scope="module")
def chain(data):
    """The page's commands up to the merged and the quantized model, and the metrics of each."""
    with chdir(data):
        return {name: run(name, *flags) for name, flags in commands().items() if name != "push"}


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.chdir(data)
    return data


@pytest.mark.slow
def test_every_step_keeps_what_the_adapters_have_learned(chain, here):
    base = logits(AutoModelForCausalLM.from_pretrained("NAME"))
    tuned = logits_of_adapter("NAME", "outputs/sft")
    assert (tuned - base).abs().max() > 0.1
    # rlhf merged the first adapter, and kept that under the second.
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("NAME"), "outputs/sft").merge_and_unload()
    assert torch.allclose(logits(by_hand), tuned, atol=1e-4)
    kept = AutoModelForCausalLM.from_pretrained("outputs/rlhf/base")
    assert all(torch.equal(one, other) for one, other in zip(kept.parameters(), by_hand.parameters(), strict=True))
    aligned = logits(PeftModel.from_pretrained(by_hand, "outputs/rlhf"))
    assert (aligned - tuned).abs().max() > 0.01
    # The plain lines load it, and the merged model is the same.
    assert settings_of("outputs/rlhf")["base_model_name_or_path"] == "outputs/rlhf/base"
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained("outputs/rlhf")), aligned, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained("outputs/merged")
    assert torch.allclose(logits(merged), aligned, atol=1e-4)
    assert type(merged) is LlamaForCausalLM
    assert chain["merge"]["max_logit_difference"] < 1e-4 < chain["merge"]["max_logit_change"]
    tokenizer = AutoTokenizer.from_pretrained("outputs/merged")
    assert tokenizer.chat_template == TEMPLATE
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say fox."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert merged.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    import hfllm  # noqa: F401

    rounded = logits(AutoModelForCausalLM.from_pretrained("outputs/quantized"))
    assert (rounded - aligned).abs().max() < 0.3 * (aligned - base).abs().max()


@pytest.mark.slow
def test_the_reward_model_stands_on_the_fine_tuned_one(chain, here):
    scorer = AutoPeftModelForSequenceClassification.from_pretrained("outputs/reward", num_labels=1)
    trunk = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("NAME"), "outputs/sft").merge_and_unload()
    with scorer.disable_adapter(), torch.no_grad():
        states = scorer.base_model.model.model(IDS).last_hidden_state
    assert torch.allclose(states, trunk.model(IDS).last_hidden_state, atol=1e-5)
    from hfllm.models.loading.adapters import load_scorer

    ours = load_scorer("outputs/reward")
    assert not ours.has_new_head and torch.allclose(logits(ours), logits(scorer), atol=1e-5)
    assert settings_of("outputs/reward")["task_type"] == "SEQ_CLS"


@pytest.mark.slow
@pytest.mark.turn(7)
def test_what_is_published_loads_by_name_without_hfllm(chain, hub, here, tmp_path, monkeypatch):
    run("push", "--model_name_or_path", "NAME", "--hub_model_id", "me/base")
    shutil.copytree("outputs/sft", tmp_path / "adapter", ignore=shutil.ignore_patterns("report.*"))
    settings = {**settings_of("outputs/sft"), "base_model_name_or_path": "me/base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    run("push", "--model_name_or_path", tmp_path / "adapter", "--hub_model_id", "me/adapter")
    run("push", *commands()["push"])
    card = hub.repos["me/my-model"].files()["README.md"].content.decode()
    assert "a local model (adapters `outputs/sft`, then `outputs/rlhf` merged into it)" in card
    assert "library_name: transformers" in card
    card = hub.repos["me/adapter"].files()["README.md"].content.decode()
    assert "library_name: peft" in card and "base_model: me/base" in card
    lines = re.search(r"```python\n(.*?)```", card, re.S)[1]
    # A recipe takes it by its name there, and the result is one of the same base.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template[1]}{template[2]}")
    run("sft", "--model_name_or_path", "me/adapter", "--dataset_name", "alpaca.json", "--output_dir", tmp_path / "on")
    assert settings_of(tmp_path / "on")["base_model_name_or_path"] == "me/base"
    by_name = [
        sft.parse(["--model_name_or_path", f"me/{name}", "--dataset_name", "x"]) for name in ("adapter", "base")
    ]
    assert [training_args.learning_rate for _, training_args, _ in by_name] == [2e-4, 2e-5]
    assert mean_b(tmp_path / "on") > mean_b("outputs/sft") / 2
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    own = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", LOAD.format(lines=lines, ids=IDS.tolist())]
    done = subprocess.run(command, env={**kept, **own}, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = json.loads(done.stdout.rpartition("LOADED ")[2])
    assert torch.allclose(torch.tensor(loaded["adapter"]), logits_of_adapter("NAME", "outputs/sft"), atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained("outputs/merged")
    assert torch.allclose(torch.tensor(loaded["merged"]), logits(merged), atol=1e-5)
    with pytest.raises(InputError, match=r"which is not on the Hub: merge it into its base \(hfllm merge"):
        run("push", "--model_name_or_path", "outputs/rlhf", "--hub_model_id", "me/other")
    with pytest.raises(InputError, match="which is not on the Hub: merge it into its base"):
        flags = ["--model_name_or_path", "outputs/rlhf", "--dataset_name", "alpaca.json", "--push_to_hub"]
        run("sft", *flags, "--output_dir", tmp_path / "further")


@pytest.mark.slow
def test_an_adapter_is_trained_further(chain, here, tmp_path, capsys):
    before = mean_b("outputs/sft")
    run("sft", "--model_name_or_path", "outputs/sft", "--dataset_name", "alpaca.json", "--output_dir", tmp_path / "on")
    assert "adapter outputs/sft of NAME is trained further" in capsys.readouterr().out
    assert mean_b(tmp_path / "on") > before / 2
    assert settings_of(tmp_path / "on")["base_model_name_or_path"] == "NAME"
    change = logits_of_adapter("NAME", tmp_path / "on") - logits_of_adapter("NAME", "outputs/sft")
    assert change.abs().max() > 1e-3
    # A rate of zero leaves it as it was.
    still = ["--learning_rate", "0", "--max_steps", "1", "--output_dir", tmp_path / "still"]
    sft.main(*sft.parse(["--model_name_or_path", "outputs/sft", "--dataset_name", "alpaca.json", *map(str, still)]))
    assert torch.equal(logits_of_adapter("NAME", tmp_path / "still"), logits_of_adapter("NAME", "outputs/sft"))


@pytest.mark.slow
def test_a_language_models_adapter_gets_a_head_for_scores(chain, here, tmp_path):
    flags = ["--model_name_or_path", "outputs/sft", "--dataset_name", "pairs.jsonl", "--learning_rate", "0"]
    flags += ["--max_steps", "1", "--output_dir", str(tmp_path / "reward")]
    reward.main(*reward.parse(flags))
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("NAME"), "outputs/sft")
    with torch.no_grad():
        states = scorer.base_model.model.model(IDS).last_hidden_state
        assert torch.equal(states, tuned.base_model.model.model(IDS).last_hidden_state)
    assert scorer.base_model.model.score.weight.abs().max() > 0
    assert settings_of(tmp_path / "reward")["base_model_name_or_path"] == "NAME"


@pytest.mark.slow
def test_ppo_compares_with_the_adapter_as_it_was(chain, here, tmp_path, monkeypatch):
    from hfllm.trainers.ppo.trainer import PPOTrainer

    kept = []
    collect = PPOTrainer.collect_rollout
    monkeypatch.setattr(PPOTrainer, "collect_rollout", lambda self, rows: kept.append(self) or collect(self, rows))
    flags = ["--model_name_or_path", "outputs/sft", "--reward_model_name_or_path", "outputs/reward"]
    flags += ["--dataset_name", "prompts.jsonl", "--apply_chat_template", "--output_dir", tmp_path / "rlhf"]
    run("rlhf", *flags)
    trainer = kept[-1]
    from hfllm.trainers.ppo.setup import as_reference

    start, end = logits_of_adapter("NAME", "outputs/sft"), logits_of_adapter("NAME", tmp_path / "rlhf")
    with as_reference(trainer.policy):
        assert torch.allclose(logits(trainer.policy), start, atol=1e-5)
    assert torch.allclose(logits(trainer.policy), end, atol=1e-5) and (end - start).abs().max() > 0.01
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert abs(first["kl"]) < 1e-4
    assert not any("ref" in name for name in os.listdir(tmp_path / "rlhf"))


@pytest.mark.slow
def test_a_teacher_and_a_student_may_be_adapters(chain, here, tmp_path):
    flags = ["--teacher_model_name_or_path", "outputs/rlhf", "--model_name_or_path", "outputs/sft", "--dataset_name"]
    flags += ["alpaca.json", "--no_train_baseline", "--output_dir", str(tmp_path / "student"), *QUICK]
    metrics = distill.main(*distill.parse(flags))
    assert metrics["parameters_teacher"] < metrics["parameters_student"]
    assert settings_of(tmp_path / "student")["base_model_name_or_path"] == "NAME"
    assert mean_b(tmp_path / "student") > mean_b("outputs/sft") / 2
    from hfllm.trainers.distillation.students import load_teacher, student_from_layers

    teacher = load_teacher("outputs/rlhf", {})
    assert torch.allclose(logits(teacher), logits(AutoModelForCausalLM.from_pretrained("outputs/merged")), atol=1e-5)
    assert student_from_layers(teacher, 2).config.num_hidden_layers == 1


@pytest.mark.slow
def test_an_adapter_is_converted_as_a_whole_model(chain, here, tmp_path):
    import hfllm

    load_recipe("convert").main(
        *load_recipe("convert").parse(["--model_name_or_path", "outputs/rlhf", "--output_dir", str(tmp_path / "ours")])
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(ours) is hfllm.HfllmForCausalLM
    assert torch.allclose(logits(ours), logits(AutoModelForCausalLM.from_pretrained("outputs/merged")), atol=1e-4)
    assert os.listdir(tmp_path) == ["ours"]


@pytest.mark.slow
def test_a_run_from_an_adapter_resumes(chain, here, tmp_path):
    """With a new adapter on the merged one, which the second start finds in the run's folder."""
    flags = ["--model_name_or_path", "outputs/sft", "--dataset_name", "alpaca.json", *QUICK, "--use_peft"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--output_dir", str(tmp_path)]
    weights, base = tmp_path / "adapter_model.safetensors", tmp_path / "base" / "model.safetensors"

    def train(*more):
        sft.main(*sft.parse([*flags, *more]))
        return load_file(weights), base.stat().st_mtime_ns

    whole, written = train()
    # As if it had been interrupted after its second step.
    shutil.rmtree(tmp_path / "checkpoint-3")
    (tmp_path / "report.json").unlink()
    weights.unlink()
    resumed, then = train("--resume_from_checkpoint", "auto")
    assert written == then and all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3 and mean_b(tmp_path) > 0


@pytest.mark.slow
def test_a_reward_adapter_is_merged_with_its_head(chain, here, tmp_path):
    flags = ["--model_name_or_path", "outputs/reward", "--output_dir", tmp_path / "merged"]
    metrics = run("merge", *flags)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    kept = AutoPeftModelForSequenceClassification.from_pretrained("outputs/reward", num_labels=1)
    assert torch.allclose(logits(scorer), logits(kept), atol=1e-5)
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert report["metrics"] == metrics and metrics["adapter_parameters"] > 32
    names = {}
    exec((tmp_path / "merged" / "report.md").read_text().partition("## Next")[2].split("```")[1], names)
    assert torch.equal(logits(names["model"]), logits(scorer))


@pytest.mark.slow
def test_what_cannot_be_merged_is_refused(chain, here, tmp_path, capsys):
    for flags, message in (
        ([], "--model_name_or_path is needed"),
        (["--model_name_or_path", "NAME"], "--model_name_or_path NAME: no adapter there"),
        (["--model_name_or_path", "outputs/sft", "--output_dir", "NAME"], "NAME exists and is not empty"),
        (["--model_name_or_path", "outputs/sft", "--output_dir", "outputs/sft"], "which it would overwrite"),
        (["--model_name_or_path", "outputs/sft", "--output_dir", "outputs/merged"], "holds a finished run with model"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            run("merge", *flags)
    output = ["--output_dir", tmp_path / "out"]
    capsys.readouterr()
    assert run("merge", *commands()["merge"]) == chain["merge"]
    assert "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="adapter 'outputs/reward' is for the task SEQ_CLS; expected CAUSAL_LM"):
        run("sft", "--model_name_or_path", "outputs/reward", "--dataset_name", "alpaca.json", *output)
    with pytest.raises(InputError, match="has no head for scores"):
        flags = ["--model_name_or_path", "NAME", "--reward_model_name_or_path", "outputs/sft"]
        run("rlhf", *flags, "--dataset_name", "prompts.jsonl", *output)
