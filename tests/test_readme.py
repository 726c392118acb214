"""The README says what is so: its commands exist, its code runs, its tree is there, and it stays short."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """Fenced blocks of one language, in order; every second part between fences is a block."""
    fenced = re.split(r"^```", README, flags=re.MULTILINE)[1::2]
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


def test_it_is_short():
    assert len(README.split()) < 900


def test_make_targets_and_recipes_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert {"rlhf", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for path in re.findall(r"(?:recipes|docs)/\w+\.(?:py|md)", README):
        assert (ROOT / path).is_file(), path


def test_flags_exist():
    import pretrain
    import reward
    import rlhf
    import sft

    recipes = {"pretrain": pretrain, "sft": sft, "reward": reward, "rlhf": rlhf}
    commands = "\n".join(blocks("bash")).replace("\\\n", " ")
    launched = re.findall(r"accelerate launch recipes/(\w+)\.py(.*)", commands)
    assert launched
    for name, flags in launched:
        words = flags.split("#")[0].split()
        recipes[name].parse(words)


def test_the_tree_is_there():
    tree = next(block for block in blocks("") if block.startswith("hfllm/"))
    for line in tree.splitlines():
        if re.match(r"\w+/", line):
            assert (ROOT / line.split()[0]).is_dir(), line
        elif line.startswith("  "):
            for name in re.findall(r"^  ([\w./]+)|, ([\w]+\.py)", line):
                entry = name[0] or name[1]
                assert list((ROOT / "hfllm").glob(f"**/{entry.rstrip('/')}")), entry
    for name in re.findall(r"`((?:recipes|hfllm)/[\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name


def test_the_python_runs(make_model, tokenizer, tmp_path):
    from datasets import Dataset

    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    load, train = blocks("python")
    exec(load.replace("outputs/rlhf", str(tmp_path / "model")), {})
    small = "total_episodes=16, response_length=4, use_cpu=True, bf16=False, save_strategy='no', report_to='none'"
    train = train.replace('"my-model"', repr(str(tmp_path / "model"))).replace("total_episodes=10_000", small)
    train = train.replace('"outputs/ppo"', repr(str(tmp_path / "ppo")))
    names = {"prompts": Dataset.from_dict({"prompt": ["Say red.", "Go"] * 8})}
    exec(train, names)
    assert names["trainer"].state.global_step > 0


@pytest.mark.parametrize("stage", ["curate", "pretrain", "sft", "reward", "rlhf", "distill"])
def test_every_shipped_config_parses(stage):
    import importlib

    module = importlib.import_module(stage)
    for path in sorted((ROOT / "recipes" / "configs" / stage).glob("*.yaml")):
        parsed = module.parse(["--config", str(path)])
        values = yaml.safe_load(path.read_text())
        merged = {name: value for group in parsed for name, value in vars(group).items()}
        assert values.keys() <= merged.keys()
