"""The documentation's code runs, its commands and files exist, and it knows every argument of TRL's last PPOConfig."""

import importlib.util
import re
import shlex
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

import hfllm
from hfllm.runs.recipes import load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A guide is read while the job is done.
MOST_LINES = 120
MIGRATION = (DOCS / "reference" / "migration.md").read_text()
# trl.experimental.ppo.PPOConfig of TRL 1.12.0, without what it inherits.
TRL_ARGUMENTS = (
    *("dataset_num_proc", "num_mini_batches", "total_episodes", "local_rollout_forward_batch_size"),
    *("num_sample_generations", "response_length", "stop_token", "stop_token_id", "temperature"),
    *("missing_eos_penalty", "sft_model_path", "world_size", "num_total_batches", "micro_batch_size"),
    *("local_batch_size", "batch_size", "local_mini_batch_size", "mini_batch_size", "push_to_hub"),
    *("reward_model_path", "model_adapter_name", "ref_adapter_name", "num_ppo_epochs", "whiten_rewards"),
    *(
        "kl_coef",
        "kl_estimator",
        "cliprange",
        "vf_coef",
        "cliprange_value",
        "gamma",
        "lam",
        "ds3_gather_for_generation",
    ),
)


def test_migration_names_every_argument():
    for name in TRL_ARGUMENTS:
        assert f"`{name}`" in MIGRATION, name


def test_what_ppo_md_names_exists():
    known = {field.name for field in fields(hfllm.PPOConfig)}
    others = {"reward", "loss", "k1", "k2", "k3", "full", "value_model", "completion_ids", "ptx_dataset", "calibrate"}
    others |= {"tools", "environment_factory", "rollout_func", "critic", "group", "both", "token", "sequence"}
    page = (DOCS / "guides" / "ppo.md").read_text().split("## Time")[0]
    table = [row for row in page.splitlines() if row.startswith("| ")]
    named = {name for row in table for name in re.findall(r"`([a-z_\d]+)`", row.strip("| ").rpartition(" | ")[2])}
    assert {"cliprange", "kl_target"} <= named <= known | others


def test_the_page_of_flags_is_that_of_their_declarations():
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text() == reference.page(), "run .ci/reference.py"


# Flags that go to accelerate or torchrun, each with a value.
LAUNCHERS = ("--config_file", "--num_processes", "--nproc_per_node", "--max_restarts")


def recipe_commands(text: str) -> set[tuple[str, str]]:
    """Every recipe and its flags that a page's shell blocks and table cells run."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s#.*", "", line) for line in blocks] + re.findall(r"\| `(hfllm [^`]+)` ", text)
    found = [re.search(r"(?:hfllm |recipes/)(\w+)(?:\.py)?(.*)", line) for line in lines]
    return {(match[1], match[2]) for match in found if match and "$(" not in match[2]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_parse(page):
    for name, flags in sorted(recipe_commands(page.read_text())):
        assert name in recipe_names(), name
        words = [word for word in shlex.split(flags) if word not in ("--standalone", "--help")]
        for flag in {*LAUNCHERS, "--config"} & {*words}:
            place = words.index(flag)
            # Settings that came with hfllm are read, files of the reader's are not there.
            if flag in LAUNCHERS or words[place + 1].endswith(".yaml"):
                del words[place : place + 2]
        parsed = load_recipe(name).parse(words)
        if name == "pretrain":
            from hfllm.stages.pretrain.flags import check

            check(*parsed)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_the_files_and_links_exist(page):
    text = page.read_text()
    paths = re.findall(r"`((?:hfllm|tests|recipes|benchmarks|accelerate_configs|ds_configs)/[\w./]*)`", text)
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_index_has_every_page():
    index = (DOCS / "index.md").read_text()
    assert not [page.name for page in PAGES if page.stem != "index" and f"({page.relative_to(DOCS)})" not in index]


def test_the_index_has_a_command_of_every_recipe():
    assert not {*recipe_names()} - {name for name, _ in recipe_commands((DOCS / "index.md").read_text())}


def test_guides_are_short():
    lines = {page.stem: len(page.read_text().splitlines()) for page in (DOCS / "guides").glob("*.md")}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


@pytest.mark.slow
def test_the_migrated_code_runs(make_model, tokenizer, tmp_path):
    from datasets import Dataset

    code = re.search(r"```python\n(.*?)```", MIGRATION, re.DOTALL).group(1)
    head = hfllm.HfllmForSequenceClassification
    code = code.replace("output_dir, ", 'output_dir, report_to="none", use_cpu=True, bf16=False, max_steps=4, ')
    names = {
        "output_dir": str(tmp_path),
        "policy": make_model(),
        "reward_model": make_model(seed=1, model_class=head, num_labels=1),
        "value_model": make_model(seed=2, model_class=head, num_labels=1),
        "prompts": Dataset.from_dict({"prompt": ["Say red.", "Go"] * 8}),
        "tokenizer": tokenizer,
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 4


def test_the_diff_leads_to_the_code():
    diff = re.search(r"```diff\n(.*?)```", MIGRATION, re.DOTALL).group(1)
    code = re.search(r"```python\n(.*?)```", MIGRATION, re.DOTALL).group(1)
    kept = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    assert [line for line in kept if line.strip()] == [line for line in code.splitlines() if line.strip()]
    changed = [line for line in diff.splitlines() if line.startswith(("+", "-"))]
    assert len(changed) <= 12


def test_the_decoding_code_runs(make_model, tokenizer):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guides" / "generation.md").read_text(), re.DOTALL)
    names = {"model": make_model(), "tokenizer": tokenizer}
    exec("\n".join(blocks), names)
    assert len(names["output"].sequences) == len(names["tokens"]) == 2


def test_the_page_on_long_texts_runs():
    """Its code on texts longer than trained, whose blocks build on each other."""
    text = (DOCS / "guides" / "context.md").read_text().partition("## Longer than trained")[2]
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["cache"].get_seq_length() == 163 and names["cache"].layers[0].keys.shape[-2] == 31
    assert names["with_memory"].shape == names["without"].shape == (1, 99)


@pytest.mark.slow
def test_the_page_on_models_that_see_runs():
    """From its beginning to its end, since later code takes the model of the first."""
    text, names = (DOCS / "reference" / "vision.md").read_text(), {}
    model, _, rest = text.partition("## The picture world")
    exec("\n".join(re.findall(r"```python\n(.*?)```", model, re.DOTALL)), names)
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert sum(not weight.requires_grad for weight in names["model"].parameters()) == 13
    assert type(names["other"]).__name__ == "Idefics3ForConditionalGeneration"
    exec("\n".join(re.findall(r"```python\n(.*?)```", rest, re.DOTALL)), names)
    assert names["columns"]["gold_accepted"] == [names["example"].questions[0].answer]
    assert names["trainer"].state.global_step == 1


def test_the_guide_on_models_that_see_runs(make_model, tokenizer, tmp_path, monkeypatch):
    """It joins a language model and a tower, and saves a model that loads."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("language_model")
    tokenizer.save_pretrained("language_model")
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained("tower")
    text = (DOCS / "guides" / "vision.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    model = AutoModelForImageTextToText.from_pretrained("seeing_model")
    processor = AutoProcessor.from_pretrained("seeing_model")
    assert type(model).__name__ == "HfllmForConditionalGeneration"
    assert processor.image_token_id == model.config.image_token_id


def test_the_constitution_page_runs(make_model, tokenizer, tmp_path, monkeypatch):
    from hfllm.synthesis.constitution import load_constitution

    text = (DOCS / "guides" / "constitution.md").read_text()
    monkeypatch.chdir(tmp_path)
    # The general constitution has long examples.
    model = make_model(max_position_embeddings=8192)
    names = {"model": model, "tokenizer": tokenizer, "prompts": ["Go", "What is 1 plus 2?", "Say red."]}
    with warnings.catch_warnings():
        # A random judge may be biased.
        warnings.simplefilter("ignore", UserWarning)
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1).replace("=64", "=4"), names)
    assert len(names["rows"]) == 3 and names["figures"].critiques == 6
    Path("mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    mine = load_constitution("mine.yaml")
    assert len(mine.principles[0].critique) == 2 and len(mine.examples[0]) == 6


@pytest.mark.slow
def test_the_reasoning_page_runs(make_model, tokenizer, tmp_path):
    from datasets import Dataset

    text = "".join((DOCS / folder / "reasoning.md").read_text() for folder in ("guides", "reference"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks).replace("max_completion_length=64", "max_completion_length=8, **SMALL")
    asked = [[{"role": "user", "content": f"What is {number} plus 1?"}] for number in range(4)]
    small = {"per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    names = {
        **{"SMALL": {**small, "save_strategy": "no"}, "output_dir": str(tmp_path), "policy": make_model()},
        **{"tokenizer": tokenizer, "prompts": asked[:2], "reward": lambda prompts, completions: [1.0] * 8},
        "questions": Dataset.from_dict({"prompt": asked, "answer": ["1", "#### 2", "3", "4"]}),
    }
    exec(code.replace("max_new_tokens=64", "max_new_tokens=8"), names)
    assert names["trainer"].state.global_step == 1 and len(names["by_majority"]) == len(names["by_reward"]) == 2
    ids = tokenizer("3 plus 4 is 7. 7 plus 5 is 13.<|end|>")["input_ids"]
    (numbers,) = names["steps"](["q"], ["-"], completion_ids=[ids])
    assert [number for number in numbers if number] == [0.1, -0.1]
    said = "<think>" + "word " * 52 + "</think>a b"
    assert names["shorter"](["q"] * 2, [said] * 2, limit=[3, 2]) == [1.0, 0.0]
    assert names["brief"](["q"], [said]) == [-0.02]
