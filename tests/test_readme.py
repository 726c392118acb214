"""The README says what is so: its commands exist, its code runs, its tree is there, and it stays short."""

import re
from pathlib import Path

import pytest
import yaml

from hfllm.runs.recipes import load_recipe, recipe_names

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
    assert targets == ["rlhf", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for path in re.findall(r"(?:recipes|docs)/[\w/]+\.(?:py|md|png)", README):
        assert (ROOT / path).is_file() or "NAME" in path, path
    for name in set(re.findall(r"`hfllm (\w+)", README)) - {"NAME"}:
        assert (ROOT / "recipes" / f"{name}.py").is_file(), name


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


@pytest.mark.slow
def test_the_python_runs(make_model, tokenizer, tmp_path, monkeypatch):
    """As it stands, but for the names of what would be downloaded, and a small budget."""
    import datasets

    import hfllm

    heads = {"policy": hfllm.HfllmForCausalLM, "reward": hfllm.HfllmForSequenceClassification}
    for name, kind in heads.items():
        make_model(model_class=kind, **({"num_labels": 1} if name == "reward" else {})).save_pretrained(
            tmp_path / name
        )
        tokenizer.save_pretrained(tmp_path / name)
    train, load = blocks("python")
    assert len([line for line in train.splitlines() if line.strip()]) == 5
    small = f"PPOConfig({str(tmp_path / 'ppo')!r}, total_episodes=16, response_length=4, use_cpu=True, bf16=False, "
    small += "save_strategy='no', report_to='none')"
    for written, ours in (
        (r'PPOConfig\("ppo"\)', small),
        (r'"Qwen/[^"]+"', repr(str(tmp_path / "policy"))),
        (r'"Skywork/[^"]+"', repr(str(tmp_path / "reward"))),
    ):
        train, count = re.subn(written, lambda _, ours=ours: ours, train)
        assert count == 1, written
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Say red.", "Go") * 8]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    names = {}
    exec(train, names)
    assert names["trainer"].state.global_step > 0
    exec(load.replace("outputs/rlhf", str(tmp_path / "policy")), {})


CONFIGS = ROOT / "recipes" / "configs"
# Whose flags a file of settings holds, where neither its own name nor its folder's is that recipe's.
OTHERS = {
    ("constitution", "helpful"): "sft",
    ("constitution", "sl"): "sft",
    ("constitution", "rl"): "rlhf",
    ("reason", "mixed"): "sft",
    ("ground", "grounded"): "sft",
    ("extend", "base"): "pretrain",
    ("speculative", "draft"): "distill",
}


@pytest.mark.parametrize("stage", sorted(path.name for path in CONFIGS.iterdir()))
def test_every_shipped_config_parses(stage):
    for path in sorted((CONFIGS / stage).glob("*.yaml")):
        named = path.stem if path.stem in recipe_names() else stage
        parsed = load_recipe(OTHERS.get((stage, path.stem), named)).parse(["--config", str(path)])
        values = yaml.safe_load(path.read_text())
        merged = {name: value for group in parsed for name, value in vars(group).items()}
        assert values.keys() <= merged.keys()
