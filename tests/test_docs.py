"""The documentation's code runs, and the migration page knows every argument of TRL's last PPOConfig."""

import re
from dataclasses import fields
from pathlib import Path

import hfllm

DOCS = Path(__file__).parent.parent / "docs"
MIGRATION = (DOCS / "migration.md").read_text()
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
    table = (DOCS / "ppo.md").read_text().split("## Time")[0]
    for row in table.splitlines():
        for name in re.findall(r"`([a-z_]+)`", row.rpartition("| ")[0].rpartition("| ")[2]):
            others = {"reward", "loss", "k1", "k2", "k3", "full", "value_model", "completion_ids", "ptx_dataset"}
            assert name in known | others, name


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
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "generation.md").read_text(), re.DOTALL)
    names = {"model": make_model(), "tokenizer": tokenizer}
    exec("\n".join(blocks), names)
    assert len(names["output"].sequences) == len(names["tokens"]) == 2
