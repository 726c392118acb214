"""Bad input of the first hour: one line that names the culprit, exit code 2, and nothing lost.

The tables run recipes as the command line does (`command_line.run`). What concerns data is in test_own_data.py, what
concerns resuming in test_resume_identity.py and test_interruptions.py.
"""

import errno
import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import distill
import pretrain
import pytest
import quantize
import reward
import rlhf
import sft
import speculative
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer
from transformers.integrations import integration_utils

from hfllm import HfllmForSequenceClassification
from hfllm.errors import InputError
from hfllm.flags import changed
from hfllm.models.loading.saved import check_vocabulary
from hfllm.outputs.report import Report
from hfllm.rewards.functions import checked_rewards, load_reward_function
from hfllm.runs import command_line, schedule
from hfllm.runs.flags import check_ranges
from hfllm.runs.output import explained
from hfllm.trainers.ppo.setup import with_total_steps

STAGES = {
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "rlhf": rlhf,
    "distill": distill,
    "quantize": quantize,
    "speculative": speculative,
}
FEW = ("--num_examples", 40)
TRAIN = ("pretrain", "sft", "reward", "rlhf", "distill")


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run a recipe's command line, which must end with one line and exit code 2; return the line after `error: `."""

    def end(stage, *argv):
        monkeypatch.setattr(sys, "argv", [stage, *map(str, argv)])
        monkeypatch.setattr(schedule, "_job", None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line.run(STAGES[stage].main, STAGES[stage].parse)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert last.startswith("error: "), said
        return last.removeprefix("error: ")

    return end


@pytest.fixture
def refused(ended, monkeypatch, tmp_path):
    """The same, before anything is trained or written."""

    def train(*args, **kwargs):
        raise AssertionError("training started")

    def end(stage, *argv):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", train)
            line = ended(stage, *argv, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return line

    return end


# ---- flags ----

NUMBERS = [
    ("--learning_rate", "-1e-4", "-0.0001: expected a number of at least 0", TRAIN),
    ("--learning_rate", "nan", "nan: expected a number of at least 0", TRAIN),
    ("--learning_rate", "inf", "inf: expected a number of at least 0", TRAIN),
    ("--per_device_train_batch_size", "0", "0: expected at least 1", TRAIN),
    ("--per_device_eval_batch_size", "0", "0: expected at least 1", TRAIN),
    ("--gradient_accumulation_steps", "0", "0: expected at least 1", TRAIN),
    ("--max_steps", "0", "0: expected at least 1, or -1 for --num_train_epochs", TRAIN),
    ("--num_train_epochs", "0", "0.0: expected a number above 0", TRAIN),
    ("--weight_decay", "-1", "-1.0: expected a number of at least 0", TRAIN),
    ("--max_grad_norm", "nan", "nan: expected a number of at least 0", TRAIN),
    ("--seed", "-1", "-1: expected a whole number from 0 to 4294967295", TRAIN),
    ("--adam_beta2", "1.5", "1.5: expected a number in [0, 1)", ("sft",)),
    ("--lora_r", "0", "0: expected at least 1", ("sft", "reward", "rlhf", "distill")),
    ("--lora_alpha", "-1", "-1: expected at least 1", ("sft", "rlhf")),
    ("--lora_dropout", "1.5", "1.5: expected a number in [0, 1)", ("sft", "rlhf")),
    ("--max_length", "0", "0: expected at least 1", ("pretrain", "sft", "reward")),
    ("--max_length", "1", "1: expected at least 2", ("quantize",)),
    ("--response_length", "0", "0: expected at least 1", ("reward", "quantize")),
    ("--num_examples", "0", "0: expected at least 1", ("sft", "distill")),
    ("--num_prompts", "-3", "-3: expected at least 1", ("rlhf", "speculative")),
    ("--num_pairs", "0", "0: expected at least 1", ("reward",)),
    ("--max_samples", "0", "0: expected at least 1", TRAIN),
    ("--num_documents", "-1", "-1: expected at least 0", ("pretrain",)),
    ("--mixed_prompts", "2", "2.0: expected a share in [0, 1]", ("distill",)),
]


# Each by one of its recipes, in turn; the others have the same check.
@pytest.mark.parametrize(
    ("flag", "value", "expected", "stages"),
    [
        pytest.param(flag, value, expected, [stage for stage in stages if (stage == first) != rest], marks=marks)
        for number, (flag, value, expected, stages) in enumerate(NUMBERS)
        for first in [stages[number % len(stages)]]
        for rest, marks in ((False, []), (True, [pytest.mark.slow]))
        if len(stages) > 1 or not rest
    ],
    ids=lambda each: str(each)[:30],
)
def test_numbers_that_make_no_sense(flag, value, expected, stages, refused):
    for stage in stages:
        assert refused(stage, f"{flag}={value}") == f"{flag} {expected}"


def test_the_libraries_own_ranges_end_in_a_line_too(refused):
    assert "warmup_steps" in refused("sft", "--warmup_steps=-1")
    assert refused("rlhf", "--response_length", "0") == "response_length must be at least 1, got 0"
    assert (
        refused("rlhf", "--total_episodes", "0", "--model_name_or_path", "mine")
        == "total_episodes must be at least 1, got 0"
    )


def test_every_default_is_in_its_range():
    for stage in STAGES.values():
        check_ranges(*stage.parse([]))
    # No limit is a wish: the norm is logged, and nothing is clipped.
    check_ranges(*sft.parse(["--max_grad_norm", "inf"]))


YAML = [
    ("learning_rate: abc\n", "invalid float value: 'abc'"),
    ("learning_rate: [1, 2]\n", "invalid float value: '[1, 2]'"),
    ("learning_rate: {a: 1}\n", "--learning_rate {'a': 1}: expected a number of at least 0"),
    ("learning_rate:\n", "--learning_rate has no value: expected a number of at least 0"),
    ("learning_rate: .nan\n", "--learning_rate nan: expected"),
    ("seed: 1\nlearning_rate: 1e-4\nseed: 2\n", "not YAML: 'seed' a second time in line 3"),
    ("seed:\t1\n\tlearning_rate: 1\n", "not YAML: "),
    ("", "bad.yaml: empty; expected a mapping of flags to values"),
    ("# nothing\n", "bad.yaml: empty; expected a mapping of flags to values"),
    ("1: 2\n", "unknown key in"),
    (b"\xff\xfe", "bad.yaml: not UTF-8 text (byte 0)"),
]


@pytest.mark.parametrize(("text", "expected"), YAML)
def test_config_files(text, expected, refused, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refused("sft", "--config", tmp_path / "bad.yaml")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rlhf"])
def test_settings_of_an_engine(stage, refused, tmp_path):
    bad = tmp_path / "bad.json"
    assert refused(stage, "--deepspeed", "no.json") == "--deepspeed no.json: no such file; expected a JSON file"
    bad.write_text("{'a': 1}")
    assert refused(stage, "--deepspeed", bad).startswith(f"--deepspeed {bad}: not JSON: ")
    bad.write_text("[]")
    assert refused(stage, "--fsdp_config", bad) == f"--fsdp_config {bad}: expected a JSON object, got list"


@pytest.mark.parametrize("stage", TRAIN)
def test_trackers(stage, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    line = refused(stage, "--report_to", "wandb")
    assert line == "--report_to wandb: not installed (pip install wandb); there is tensorboard"
    (tmp_path / "flags.yaml").write_text("report_to: [tensorboard, wandbb]")
    for flags in (("--report_to", "wandbb"), ("--config", tmp_path / "flags.yaml")):
        line = refused(stage, *flags)
        assert line.startswith("--report_to wandbb: expected none, all or one of azure_ml, ")
        assert line.endswith("; did you mean 'wandb'?")
    assert "pip install comet-ml" in refused(stage, "--report_to", "comet_ml")


def test_kernels_that_are_not_installed(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_kernel" else find(name))
    line = refused("sft", "--use_liger_kernel", "true")
    assert line == "--use_liger_kernel: not installed (pip install liger-kernel)"


@pytest.mark.parametrize("stage", STAGES)
def test_kinds_of_attention(stage, refused, monkeypatch):
    find = importlib.util.find_spec
    there = {"kernels": None, "flash_attn": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there[name] if name in there else find(name))
    line = refused(stage, "--attn_implementation", "flash_attention_2")
    assert line.startswith("--attn_implementation flash_attention_2: not installed (pip install flash-attn, ")
    assert line.endswith("there is banded, eager, flex_attention, sdpa, sparse")
    line = refused(stage, "--attn_implementation", "quick")
    assert line == "--attn_implementation quick: unknown; there is banded, eager, flex_attention, sdpa, sparse"
    assert "need pip install kernels" in refused(stage, "--attn_implementation", "someone/kernel")


ADAPTERS = [
    (
        ("--lora_target_modules", "nonsense"),
        "--lora_target_modules nonsense: not in a model of type hfllm; its linear",
    ),
    (("--lora_target_modules", "q_proj", "nonsense"), "--lora_target_modules nonsense: not in a model of type hfllm"),
    (("--lora_modules_to_save", "nonsense"), "--lora_modules_to_save nonsense: not in a model of type hfllm"),
    (("--lora_target_parameters", "nonsense"), "--lora_target_parameters nonsense: not in a model of type hfllm"),
    (("--lora_target_modules", "(q"), "--use_peft on a model of type hfllm: missing ), unterminated subpattern"),
]


# Each flag by one recipe, and one flag by each recipe.
@pytest.mark.parametrize(
    ("stage", "flags", "expected"),
    [
        pytest.param(stage, *adapter, marks=[pytest.mark.slow] if number and stage != "sft" else [])
        for stage in ("sft", "reward", "rlhf")
        for number, adapter in enumerate(ADAPTERS)
    ],
)
def test_adapters_that_fit_no_layer_before_the_first_stage(stage, flags, expected, refused, saved):
    sizes = {"sft": FEW, "reward": (), "rlhf": ("--num_prompts", 8, "--num_eval_prompts", 4)}[stage]
    assert expected in refused(stage, "--use_peft", *flags, *sizes)
    if stage == "sft":
        assert expected in refused(stage, "--use_peft", *flags, *sizes, "--model_name_or_path", saved)


# ---- models ----


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def garbage(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(1, 200)))


def lose_shard(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lead_outside(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../x.safetensors"}}
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lose_weights(folder):
    (folder / "model.safetensors").unlink()


def change_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def fewer_layers(folder):
    change_config(folder, num_hidden_layers=1, layer_types=None)


def more_layers(folder):
    change_config(folder, num_hidden_layers=4, layer_types=None)


def name_a_kernel(folder):
    change_config(folder, attn_implementation="evil/kernel")


def bring_code(folder):
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text("raise SystemExit('the code ran')")


def other_architecture(folder):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    other.save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder)


def break_config(folder):
    (folder / "config.json").write_text("{'model_type': 'hfllm'}")


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


DAMAGES = [
    (cut, "model.safetensors is damaged ("),
    (cut_header, "model.safetensors is damaged (cut short, or no safetensors file)"),
    (empty, "model.safetensors is damaged (it is empty)"),
    (garbage, "model.safetensors is damaged (cut short, or no safetensors file)"),
    (lose_shard, "model-00001-of-00001.safetensors is missing, which model.safetensors.index.json lists"),
    (lead_outside, "model.safetensors.index.json names '../x.safetensors', which is not in its folder"),
    (damage_index, "model.safetensors.index.json is damaged: it lists no files"),
    (pickle_weights, "has pickled weights alone (pytorch_model.bin), which can run code when they are read"),
    (lose_weights, "could not be loaded: Error no file named model.safetensors"),
    (change_size, "mlp.down_proj.weight is of the shape"),
    (other_architecture, "weights are of the HfllmForCausalLM not in its files, such as"),
    (more_layers, "of the HfllmForCausalLM not in its files, such as model.layers.2."),
    (fewer_layers, "in its files and not of the HfllmForCausalLM, such as model.layers.1."),
    (name_a_kernel, "its config names attn_implementation='evil/kernel', which would be downloaded and run"),
    (bring_code, "it needs code of its own, which is run only by --trust_remote_code"),
    (break_config, "is not a valid JSON file"),
    (break_tokenizer, "the tokenizer of model"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=lambda each: getattr(each, "__name__", ""))
def test_damaged_models(damage, expected, refused, saved, monkeypatch):
    damage(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    line = refused("sft", "--model_name_or_path", saved, *FEW)
    assert expected in line
    assert str(saved) in line
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before


def flags_naming(stage, flag, model, good, tmp_path):
    """The flags of a stage that reads `model` by `flag`, and `good` models by the others."""
    (tmp_path / "reward.py").write_text("def one(completions, **columns): return [1.0] * len(completions)")
    function = ("--reward_funcs", f"{tmp_path / 'reward.py'}:one", "--num_prompts", 8, "--num_eval_prompts", 4)
    return {
        "pretrain": ("--num_documents", 20),
        "sft": FEW,
        "reward": ("--num_pairs", 4),
        "rlhf": (*(() if flag == "--reward_model_name_or_path" else function), "--num_prompts", 8),
        "distill": (*FEW, "--student_layers_every", 2) if "teacher" in flag else (*FEW, "--teacher_model", good),
        "quantize": ("--schemes", "dynamic", "--save_scheme", "dynamic"),
        "speculative": ("--draft", "prompt_lookup") if "assistant" not in flag else (),
    }[stage]


READ_BY = [
    ("pretrain", "--model_name_or_path"),
    ("reward", "--model_name_or_path"),
    ("rlhf", "--model_name_or_path"),
    ("rlhf", "--reward_model_name_or_path"),
    ("rlhf", "--value_model"),
    ("distill", "--teacher_model_name_or_path"),
    ("quantize", "--model_name_or_path"),
    ("speculative", "--model_name_or_path"),
    ("speculative", "--assistant_model_name_or_path"),
]


EVERYWHERE = {
    cut: "is damaged (",
    change_size: "is of the shape",
    fewer_layers: "would be left out",
    name_a_kernel: "names attn_implementation='evil/kernel'",
    bring_code: "--trust_remote_code",
}


# Two kinds of damage for each model that is read, in turn; `test_damaged_models` has them all.
@pytest.mark.parametrize(
    ("stage", "flag", "damage"),
    [
        pytest.param(*reader, damage, marks=[pytest.mark.slow] if (number + 2 * turn) % 5 > 1 else [])
        for number, reader in enumerate(READ_BY)
        for turn, damage in enumerate(EVERYWHERE)
    ],
)
def test_every_recipe_looks_at_every_model(stage, flag, damage, refused, saved, tmp_path, monkeypatch):
    good = shutil.copytree(saved, tmp_path / "good")
    damage(saved)
    base = () if flag == "--model_name_or_path" or "teacher" in flag else ("--model_name_or_path", good)

    def ask(*args):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", ask)
    line = refused(stage, flag, saved, *base, *flags_naming(stage, flag, saved, good, tmp_path))
    assert str(saved) in line
    assert EVERYWHERE[damage] in line


# ---- tokenizers ----


def add_tokens(folder, tokenizer, **special):
    larger = type(tokenizer).from_pretrained(folder)
    larger.add_special_tokens(special) if special else larger.add_tokens(["kumquat", "lychee"])
    larger.save_pretrained(folder)
    return larger


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rlhf", "quantize", "speculative"])
def test_tokenizers_larger_than_the_embedding(stage, refused, saved, tokenizer, tmp_path):
    size = len(add_tokens(saved, tokenizer))
    more = flags_naming(stage, "--model_name_or_path", saved, saved, tmp_path)
    line = refused(stage, "--model_name_or_path", saved, *more)
    sizes = f"the tokenizer has {size} tokens and model '{saved}' embeddings for {size - 2}, none for 'kumquat'"
    assert line.startswith(sizes)


def test_tokenizers_of_reward_models_and_teachers(refused, saved, tokenizer, make_model, tmp_path):
    good = shutil.copytree(saved, tmp_path / "good")
    make_model(model_class=HfllmForSequenceClassification, num_labels=1).save_pretrained(saved)
    add_tokens(saved, tokenizer)
    flags = ("--model_name_or_path", good, "--num_prompts", 8, "--num_eval_prompts", 4)
    assert "none for 'kumquat'" in refused("rlhf", "--reward_model_name_or_path", saved, *flags)
    add_tokens(good, tokenizer)
    assert "none for 'kumquat'" in refused(
        "distill", "--teacher_model_name_or_path", good, *FEW, "--student_layers_every", 2
    )


def test_marks_that_no_text_has_are_let_pass(saved, tokenizer, make_model):
    """Gemma 3's tokenizer has the place of an image behind the embedding of its models of words."""
    model = make_model()
    with pytest.warns(UserWarning, match="texts must not contain <image>"):
        check_vocabulary(model, add_tokens(saved, tokenizer, additional_special_tokens=["<image>"]))
    with pytest.raises(InputError, match="none for '<padding>'"):
        check_vocabulary(model, add_tokens(saved, tokenizer, pad_token="<padding>"))


# ---- rewards ----

REWARDS = {
    "sys.exit(1)": "sys.exit(1)",
    "exit in a call": "def f(completions, **columns): sys.exit('enough')",
    "a fault": "def f(completions, **columns):\n    return 1 / 0",
    "syntax": "x = 1\ndef f(:\n",
    "words": "def f(completions, **columns): return 'good'",
    "a table": "def f(completions, **columns): return {0: 1.0, 1: 1.0}",
    "a number": "def f(completions, **columns): return 1.0",
    "too few": "def f(completions, **columns): yield 1.0",
    "nan": "def f(completions, **columns): return torch.full((len(completions),), float('nan'))",
    "absurd": "def f(completions, **columns): return [1e30] * len(completions)",
    "hangs": "def f(completions, **columns):\n    while True: pass",
    "ends all": "import os\ndef f(completions, **columns): os._exit(0)",
    "ends all, by a name": "from os import _exit\ndef f(completions, **columns): _exit(0)",
    "ends all when read": "import os\nos._exit(0)",
}
ABOUT = {
    "sys.exit(1)": "does not run: SystemExit(1) in {file}, line 3",
    "exit in a call": "reward function 'f' failed with SystemExit('enough') in {file}, line 3; columns given: ",
    "a fault": "failed with ZeroDivisionError('division by zero') in {file}, line 4",
    "syntax": "{file}, line 4: invalid syntax",
    "words": "returned str; expected a list of 2 numbers",
    "a table": "returned dict; expected a list of 2 numbers",
    "a number": "returned float; expected a list of 2 numbers",
    "too few": "returned 1 values for 2 completions",
    "nan": "returned nan for completion 0",
    "absurd": "returned 1e+30 for completion 0 ('This is a trial response.'); expected a finite number of at most ",
    "hangs": "function 'f' did not return within 0.3 seconds in {file}, line 4; --reward_timeout gives it more",
    "ends all": "{file}, line 4: os._exit(0) would end the run before it is done",
    "ends all, by a name": "{file}, line 4: os._exit(0) would end the run before it is done",
    "ends all when read": "{file}, line 4: os._exit(0) would end the run before it is done",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_reward_files(name, refused, saved, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"import sys\nimport torch\n{REWARDS[name]}\n")
    flags = ("--model_name_or_path", saved, "--num_prompts", 8, "--num_eval_prompts", 4, "--reward_timeout", 0.3)
    assert ABOUT[name].format(file=file) in refused("rlhf", *flags, "--reward_funcs", f"{file}:f")


def test_numbers_of_any_kind_are_rewards(tmp_path):
    file = tmp_path / "mine.py"
    kinds = ("numpy.arange(n)", "torch.arange(n) / 1", "(i for i in range(n))", "list(numpy.arange(n))", "range(n)")
    for kind in (*kinds, "[torch.tensor(i) for i in range(n)]", "map(float, range(n))"):
        file.write_text(
            f"import numpy, torch\ndef f(completions, **columns):\n    n = len(completions)\n    return {kind}"
        )
        assert checked_rewards(load_reward_function(f"{file}:f"), ["a"] * 3, ["b"] * 3) == [0.0, 1.0, 2.0]
    file.write_text("import torch\ndef f(completions, **columns): return torch.ones(len(completions), 2)")
    assert checked_rewards(load_reward_function(f"{file}:f"), ["a"], ["b"]) == [[1.0, 1.0]]


# ---- disks and memory ----


def short(saved, tmp_path, *more):
    return (
        *("--model_name_or_path", saved, *FEW, "--per_device_train_batch_size", 2, "--max_steps", 3),
        *("--save_steps", 1, "--logging_steps", 1, "--output_dir", tmp_path / "out", *more),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "optimizer.pt"), "no space left on the disk: optimizer.pt"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "from", None, "to"), "the disk quota is used up: to"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/7"), "no space left on the disk"),
    ],
)
def test_a_disk_that_is_full_at_a_checkpoint(error, reason, ended, saved, tmp_path, monkeypatch):
    save = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 2:
            raise error
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        line = ended("sft", *short(saved, tmp_path))
    assert line == (
        f"{reason}; step 2 of 3; the same command with --resume_from_checkpoint auto continues from checkpoint-1 "
        f"in {tmp_path / 'out'}"
    )
    # What was written in part is gone, and what is said is so.
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    if reason.endswith("optimizer.pt"):
        metrics = sft.main(*sft.parse(list(map(str, short(saved, tmp_path, "--resume_from_checkpoint", "auto")))))
        assert metrics["eval_loss"] > 0


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_report(ended, saved, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "report.json"))

    monkeypatch.setattr(Report, "write", full)
    line = ended("sft", *short(saved, tmp_path, "--save_strategy", "no"))
    out = tmp_path / "out"
    assert line == f"no space left on the disk: {out}/report.json; the model is saved in {out}, its report is not"
    assert (out / "model.safetensors").is_file()


def test_folders_that_cannot_be_written_to(ended, saved, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for place, reason in (("file", "File exists"), ("file/inside", "Not a directory")):
        line = ended("sft", "--model_name_or_path", saved, *FEW, "--output_dir", tmp_path / place)
        assert line == f"--output_dir {tmp_path / place}: cannot be written to: {reason}"
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.open", read_only)
    line = ended("sft", "--model_name_or_path", saved, *FEW, "--output_dir", tmp_path / "out")
    assert line == f"--output_dir {tmp_path / 'out'}: cannot be written to: Read-only file system"


ON_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError(ON_GPU), " (tried to allocate 20.00 GiB)"),
        (RuntimeError(ON_CPU), " (tried to allocate 4000 bytes)"),
        (MemoryError(), ""),
    ],
)
def test_memory_that_is_full(error, size, ended, saved, tmp_path, monkeypatch):
    step = Trainer.training_step

    def large(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", large)
    line = ended("sft", *short(saved, tmp_path))
    assert line.startswith(f"out of memory{size}: try a smaller --per_device_train_batch_size with more ")
    assert "--gradient_checkpointing true, a shorter --max_length, --use_peft (also with --load_in_8bit); " in line
    assert line.endswith(f"--resume_from_checkpoint auto continues from checkpoint-1 in {tmp_path / 'out'}")


def test_memory_that_is_full_before_training(ended, saved, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise torch.OutOfMemoryError(ON_GPU)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    line = ended("sft", *short(saved, tmp_path))
    assert line.startswith("out of memory (tried to allocate 20.00 GiB): try ")
    assert line.endswith("; no checkpoint was saved: the same command starts anew")


def caused(error, cause):
    error.__cause__ = cause
    return error


NO_ROOM = [
    caused(RuntimeError("Failed to import trl.trainer.sft_trainer"), MemoryError()),
    ImportError("lib.so: failed to map segment from shared object"),
    caused(RuntimeError("Failed to import"), ImportError("lib.so: failed to map segment from shared object")),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=str)
def test_memory_that_does_not_hold_the_libraries(error, ended, saved, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr(command_line, "what_is_saved", load)
    assert ended("sft", *short(saved, tmp_path)).startswith("out of memory: try a smaller --per_device_train_batch")


def test_errors_of_the_program_keep_their_traceback(saved, tmp_path, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(Trainer, "training_step", wrong)
    monkeypatch.setattr(sys, "argv", ["sft", *map(str, short(saved, tmp_path))])
    with pytest.raises(RuntimeError, match="size of tensor a"):
        command_line.run(sft.main, sft.parse)
    for error in (KeyError("a"), FileNotFoundError(errno.ENOENT, "gone"), ValueError("out of range"), OSError("odd")):
        assert explained(error) is None


# ---- episodes ----


def test_episodes_fill_whole_rollouts_and_the_report_says_so(saved, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **columns): return [float(len(each)) for each in completions]")
    flags = ("--model_name_or_path", saved, "--reward_funcs", f"{file}:f", "--num_eval_prompts", 2)
    size = ("--per_device_train_batch_size", 4, "--num_mini_batches", 1, "--num_ppo_epochs", 1, "--response_length", 2)
    output = ("--total_episodes", 3, "--output_dir", tmp_path / "out", "--save_strategy", "no")
    script_args, training_args, model_args = rlhf.parse(list(map(str, (*flags, *size, *output))))
    # Without the world's gold score, which would be most of the test.
    (tmp_path / "prompts.txt").write_text("\n\n".join(f"red {number}" for number in range(9)))
    metrics = rlhf.main(replace(script_args, dataset_name=str(tmp_path / "prompts.txt")), training_args, model_args)
    assert "--total_episodes 3 is rounded up to 4: 1 rollout of 4 " in capsys.readouterr().out
    assert metrics["episodes"] == 4
    for wanted, said in ((4, ""), (5, "--total_episodes 5 is rounded up to 8: 2 rollouts of 4 ")):
        assert with_total_steps(changed(training_args, total_episodes=wanted)).max_steps == -(-wanted // 4)
        assert capsys.readouterr().out.startswith(said) and bool(said) == (wanted == 5)


# ---- rows ----


def test_rows_of_which_nothing_is_learned(refused, saved, tmp_path):
    path = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    path.write_text(
        "\n".join(json.dumps({"messages": [{**talk[0], "content": f"red {n}"}, talk[1]]}) for n in range(9))
    )
    flags = ("--model_name_or_path", saved, "--dataset_name", path)
    # Each prompt alone is longer, so every answer would be cut off.
    assert "nothing to learn is left" in refused("sft", *flags, "--max_length", 3)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(saved)
    assert "has no {% generation %} markers" in refused("sft", *flags, "--assistant_only_loss", "true")
