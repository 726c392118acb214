"""Bad input ends a recipe with one line that names the culprit, before anything is trained."""

import importlib
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import distill
import pretrain
import pytest
import quantize
import reward
import rlhf
import sft
import speculative
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import import_utils

from hfllm import HfllmForSequenceClassification
from hfllm.data.loading import TextArguments
from hfllm.errors import InputError
from hfllm.flags import check_flags
from hfllm.runs.recipes import load_recipe

ROOT = Path(__file__).parent.parent.parent
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "rlhf": rlhf}
# With the nearest flag to a misspelled one.
OTHERS = {
    "distill": (distill, "learning_rat", "learning_rate"),
    "quantize": (quantize, "save_schem", "save_scheme"),
    "speculative": (speculative, "max_new_token", "max_new_tokens"),
}
ALL = {**{name: (module, "learning_rat", "learning_rate") for name, module in STAGES.items()}, **OTHERS}


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def train(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("transformers.Trainer.train", train)


def complaint(stage, *argv):
    with pytest.raises(InputError) as error:
        ALL[stage][0].main(*ALL[stage][0].parse([str(word) for word in argv]))
    message = str(error.value)
    assert "\n" not in message
    return message


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_help_shows_the_flag_that_trusts_code_where_it_is_heeded(name, capsys):
    recipe = importlib.import_module(name)
    with pytest.raises(SystemExit):
        recipe.parse(["--help"])
    assert ("--trust_remote_code" in capsys.readouterr().out) == hasattr(recipe, "trusts_code_if_asked")


@pytest.mark.parametrize("stage", ALL)
def test_unknown_flags_and_keys_name_the_nearest(stage, tmp_path):
    _, misspelled, meant = ALL[stage]
    assert complaint(stage, f"--{misspelled}", "1") == f"unknown flag '{misspelled}'; did you mean '{meant}'?"
    config = tmp_path / "config.yaml"
    config.write_text(f"{misspelled}: 0.1\n")
    assert complaint(stage, "--config", config) == f"unknown key in {config}: '{misspelled}'; did you mean '{meant}'?"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_help_shows_how_to_launch(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f" recipes/{name}.py" in shown
    flag = ALL[name][2] if name in ALL else "config"
    assert f"--{flag}" in shown


@pytest.mark.parametrize(("name", "flag"), [("rlhf", "--kl_coef"), ("distill", "--teacher_top_k")])
def test_help_lists_the_trainers_own_flags_without_torch(name, flag):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_path('recipes/{name}.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"\n  {flag} " in done.stdout


@pytest.mark.parametrize(("stage", "flag"), [(sft, "--pretrain_config"), (reward, "--sft_config")])
def test_the_config_of_a_stage_that_does_not_run_is_refused(stage, flag, tmp_path):
    flags = ["--model_name_or_path", "x", flag, "y.yaml", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=f"{flag} cannot be used here: the model is named"):
        stage.main(*stage.parse(flags))


def test_bad_values_and_configs(tmp_path):
    assert "invalid float value: 'fast'" in complaint("sft", "--learning_rate", "fast")
    assert "unexpected argument 'stray'" in complaint("sft", "stray")
    assert "nowhere.yaml: no such file" in complaint("sft", "--config", "nowhere.yaml")
    for text, expected in (("a: [", "not YAML"), ("- a\n", "expected a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        assert expected in complaint("sft", "--config", tmp_path / "bad.yaml")
    assert "num_ppo_epochs must be at least 1, got 0" in complaint("rlhf", "--num_ppo_epochs", 0)
    assert "--label_noise 2.0: expected a share in [0, 1]" in complaint("reward", "--label_noise", 2)
    assert "--fp16 does nothing on a CPU" in complaint("sft", "--fp16", "true", "--output_dir", tmp_path / "o")


@pytest.mark.parametrize("stage", [*STAGES, "distill", "quantize"])
def test_datasets(stage, saved_model, tmp_path):
    output = ("--output_dir", tmp_path / "out")
    if stage == "distill":
        output += ("--teacher_model_name_or_path", saved_model, "--student_layers_every", 2)
    if stage == "quantize":
        output += ("--schemes", "dynamic", "--save_scheme", "dynamic")
    assert "does not exist" in complaint(stage, "--dataset_name", tmp_path / "no.jsonl", *output)
    empty = jsonl(tmp_path / "empty.jsonl")
    assert f"dataset '{empty}' is empty" in complaint(stage, "--dataset_name", empty, *output)
    broken = jsonl(tmp_path / "broken.jsonl", '{"text": "a", "prompt": "b"', "x")
    assert "broken.jsonl, line 1: not JSON" in complaint(stage, "--dataset_name", broken, *output)
    lacking = jsonl(tmp_path / "lacking.jsonl", {"question": "Q", "reply": "A"})
    message = complaint(stage, "--dataset_name", lacking, *output)
    assert "lacking.jsonl, line 1: columns question, reply; expected one of" in message
    assert not (tmp_path / "out").exists()


def test_a_preference_that_is_neither_a_nor_b(tmp_path):
    row = {"prompt": "Q", "response_a": "1", "response_b": "2", "preference": "a"}
    path = jsonl(tmp_path / "pairs.jsonl", row, {**row, "preference": "both"})
    message = complaint("reward", "--dataset_name", path, "--output_dir", tmp_path / "out")
    assert message == f"{path}, line 2: preference is 'both'; expected 'a' or 'b'"


@pytest.mark.parametrize(
    ("stage", "flag"),
    [("pretrain", "num_documents"), ("sft", "num_examples"), ("reward", "num_pairs"), ("rlhf", "num_prompts")],
)
def test_sizes_of_the_world_are_refused_for_rows_of_ones_own(stage, flag, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    rows = ("--model_name_or_path", tmp_path, "--dataset_name", tmp_path / "rows.jsonl")
    message = complaint(stage, *rows, f"--{flag}", 5, "--output_dir", tmp_path / "out")
    assert (
        message.startswith(f"--{flag} cannot be used here: it is of the embedded world") and "--max_samples" in message
    )


def test_the_worlds_flags_have_effect_where_a_part_of_the_data_is_the_worlds():
    mixed = TextArguments(dataset_mixture=["world:1", "rows.jsonl:1"], num_documents=7)
    check_flags(mixed)
    with pytest.raises(InputError, match="--num_documents cannot be used here"):
        check_flags(replace(mixed, dataset_mixture=["rows.jsonl:1"]))


def test_help_sets_the_worlds_flags_apart(capsys):
    with pytest.raises(SystemExit):
        reward.parse(["--help"])
    before, apart = capsys.readouterr().out.split("The embedded world alone:")
    apart = apart.partition("\n\n")[0]
    assert "--num_pairs" in apart and "--world_seed" in apart and "--bad_rows" not in apart and "--augment" in before


def test_flags_without_effect_are_refused(tmp_path):
    output = ("--output_dir", tmp_path / "out")
    assert "--use_peft cannot be used here" in complaint("pretrain", "--use_peft", *output)
    assert "--max_samples cannot be used here" in complaint("sft", "--max_samples", 5, *output)
    assert "--model_init_kwargs cannot" in complaint("rlhf", "--model_init_kwargs", '{"dtype": "auto"}', *output)
    assert "--train_sampling_strategy cannot" in complaint(
        "pretrain", "--train_sampling_strategy", "sequential", *output
    )
    assert "no complete checkpoint in" in complaint("sft", "--resume_from_checkpoint", "true", *output)
    assert "not a checkpoint folder" in complaint("sft", "--resume_from_checkpoint", tmp_path, *output)


def test_yaml_values_are_read_as_flags_are(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("reward_funcs: gold\nlearning_rate: 1e-3\n")
    script_args, training_args, _ = rlhf.parse(["--config", str(config)])
    assert script_args.reward_funcs == ["gold"]
    assert training_args.learning_rate == 1e-3
    config.write_text("num_ppo_epochs: 2.5\n")
    assert "invalid int value: '2.5'" in complaint("rlhf", "--config", config)


@pytest.fixture
def saved_model(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


REWARDS = """
def short(completions, **columns): return [1.0]
def none(completions, **columns): [1.0] * len(completions)
def nan(completions, **columns): return [float("nan")] * len(completions)
def fine(completions, **columns): return [0.0] * len(completions)
"""


def test_reward_functions(saved_model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    prompts = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"number {index}"} for index in range(9)))
    flags = ("--model_name_or_path", saved_model, "--dataset_name", prompts, "--output_dir", tmp_path / "out")
    for name, expected in (
        ("short", "'short' returned 1 values for 2 completions"),
        ("none", "'none' returned NoneType; expected a list of 2 numbers"),
        ("nan", "'nan' returned nan for completion 0"),
        ("absent", "no function 'absent' in"),
    ):
        assert expected in complaint("rlhf", *flags, "--reward_funcs", f"{file}:{name}")
    assert "no file 'nowhere.py'" in complaint("rlhf", *flags, "--reward_funcs", "nowhere.py:f")
    assert "only the embedded world has it" in complaint("rlhf", *flags, "--reward_funcs", "gold")
    assert "--reward_weights has 2 values for 1 reward(s)" in complaint(
        "rlhf", *flags, "--reward_funcs", f"{file}:fine", "--reward_weights", 1, 2
    )
    assert "--value_model reward needs a reward model" in complaint(
        "rlhf", *flags, "--reward_funcs", f"{file}:fine", "--value_model", "reward"
    )
    assert "needs a reward" in complaint("rlhf", *flags)
    file.write_text("def fine(answer, **columns): return answer")
    message = complaint("rlhf", *flags, "--reward_funcs", f"{file}:fine")
    assert "'fine': the rows have no column 'answer', which it needs" in message
    assert "columns given: completion_ids" in message
    file.write_text("import not_installed_anywhere")
    assert "does not run: ModuleNotFoundError" in complaint("rlhf", *flags, "--reward_funcs", f"{file}:fine")


@pytest.mark.slow
def test_what_needs_no_trained_stage_is_refused_before_one(saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    (tmp_path / "reward").mkdir()
    for path in saved_model.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / "reward" / path.name).write_bytes(path.read_bytes())
    texts = jsonl(tmp_path / "texts.jsonl", {"words": "red"})
    critic = HfllmForSequenceClassification.from_pretrained(saved_model, num_labels=1)
    critic.save_pretrained(tmp_path / "critic")
    adapter = get_peft_model(critic, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for part in (adapter, AutoTokenizer.from_pretrained(saved_model)):
        part.save_pretrained(tmp_path / "adapter")
    edit = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    edit["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(edit))
    is_reward = ("--reward_model_name_or_path", tmp_path / "adapter", "--value_model", "reward")
    lora = ("--use_peft", "--lora_target_modules", "nowhere")
    no_such = "--lora_target_modules nowhere: not in a model of type hfllm; its linear layers are down_proj, gate_proj"
    for flags, expected in (
        (("--value_model", "no/such-model"), "model 'no/such-model' could not be loaded"),
        (("--value_model", tmp_path / "adapter"), "which could not be loaded"),
        (is_reward, "which could not be loaded"),
        (("--reward_model_name_or_path", tmp_path / "reward"), "reward' could not be loaded: Error no file named"),
        (("--use_vllm",), "vLLM is not installed"),
        (("--load_in_8bit",), "--load_in_8bit cannot be used here: such weights cannot be trained; --use_peft"),
        (lora, no_such),
        ((*lora, "--model_name_or_path", saved_model), no_such),
        (("--ptx_coef", 0.1), "--ptx_coef 0.1 and --ptx_dataset_name None: give both, or neither"),
        (("--ptx_coef", 0.1, "--ptx_dataset_name", texts), "texts.jsonl, line 1: columns words"),
    ):
        message = complaint("rlhf", "--num_prompts", 8, "--output_dir", tmp_path / "out", *flags)
        assert expected in message
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_the_context(saved_model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    long = jsonl(tmp_path / "long.jsonl", *({"prompt": "red " * (400 + index)} for index in range(9)))
    flags = ("--model_name_or_path", saved_model, "--dataset_name", long, "--output_dir", tmp_path / "out")
    assert "model's context of 256 leaves room for 203" in complaint("rlhf", *flags, "--reward_funcs", f"{file}:fine")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, "distill"])
def test_quantized_weights_are_not_trained(saved_model, tmp_path, stage):
    config = json.loads((saved_model / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (saved_model / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    flags = ("--model_name_or_path", saved_model, "--output_dir", tmp_path / "out")
    message = complaint(stage, *flags, *(("--reward_funcs", "gold") if stage == "rlhf" else ()))
    assert f"model '{saved_model}' is quantized (bitsandbytes), and such weights cannot be trained" in message
    assert ("--use_peft trains an adapter" in message) == (stage != "pretrain")


@pytest.mark.slow
def test_sizes_that_describe_no_model(tmp_path):
    (tmp_path / "base.yaml").write_text("hidden_size: 63\nnum_attention_heads: 8\n")
    for stage, flag in (("pretrain", "--config"), ("rlhf", "--pretrain_config"), ("distill", "--pretrain_config")):
        message = complaint(stage, flag, tmp_path / "base.yaml", "--output_dir", tmp_path / "out")
        assert message.startswith("hidden_size 63, num_attention_heads 8 and the other fields describe no model")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_tokenizers_without_end_token(saved_model, tmp_path, stage):
    path = saved_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    flags = ("--model_name_or_path", saved_model, "--output_dir", tmp_path / "out")
    more = ("--reward_funcs", "gold") if stage == "rlhf" else ()
    assert "has no eos_token" in complaint(stage, *flags, *more)


def test_a_model_that_is_not_there(tmp_path):
    flags = ("--model_name_or_path", tmp_path / "no-model", "--output_dir", tmp_path / "out")
    assert "no-model: there is no such folder" in complaint("sft", *flags)


def test_no_model_is_written_over_one_that_is_read(saved_model, tmp_path):
    for stage, flag, more in (
        ("sft", "--model_name_or_path", ()),
        ("distill", "--teacher_model_name_or_path", ()),
        ("rlhf", "--reward_model_name_or_path", ("--model_name_or_path", tmp_path / "other")),
    ):
        message = complaint(stage, flag, saved_model, *more, "--output_dir", saved_model)
        assert message.endswith(f"model is {flag}, which it would overwrite: choose another")


def test_the_command_line_prints_one_line_and_exits_with_2(processes):
    printed = processes.run("recipes/rlhf.py", "--kl_coeff", "0.1", code=2)
    assert printed.splitlines()[-1] == "error: unknown flag 'kl_coeff'; did you mean 'kl_coef'?"
    assert "Traceback" not in printed


@pytest.mark.parametrize("name", ["federated", "reward", "sft", "tools"])
def test_help_shows_the_defaults_that_a_run_uses(name, capsys):
    """On the embedded world as its settings say, not as the class of flags does."""
    with pytest.raises(SystemExit):
        load_recipe(name).parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    own = load_recipe(name).parse([])[0]
    found = {}
    for item in fields(own):
        about = shown.partition(f"--{item.name} ")[2].partition(" --")[0]
        if "(default: " in about and item.name != "dataset_name":
            found[item.name] = about.partition("(default: ")[2].partition(")")[0].partition(";")[0]
    assert len(found) > 8 and found == {flag: str(getattr(own, flag)) for flag in found}
