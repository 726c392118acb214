"""Figures of held-out rows are those of the rows: the same for any batch and any number of processes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_run import IDS, LENGTH, PAIRS, ROWS, SIZES, TEXTS, TOKENIZER, TRAINERS, common, metrics, model, tuned
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import TrainingArguments

import hfllm
from hfllm.data.packing import pack
from hfllm.trainers.mixins import EachRowOnce, TokenMeanEvaluation

SCRIPT = Path(__file__).parent / "eval_run.py"
ROOT = Path(__file__).parent.parent.parent
# What is computed of whole datasets; the load-balancing loss is a property of a batch.
EXACT = ("loss", "accuracy", "entropy", "margin", "reward")


def figures(measured):
    return {
        f"{trainer} {name}": value
        for trainer, found in measured.items()
        for name, value in found.items()
        if name.endswith(EXACT) and not name.endswith("aux_loss")
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process measures, row by row."""
    return dict(metrics(str(tmp_path_factory.mktemp("one")), 1))


def nats(scored, ids, labels):
    """Minus the log-likelihood of the labels of a row, and their number."""
    with torch.no_grad():
        logits = scored(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(labels[1:])
    return cross_entropy(logits, targets, reduction="sum").item(), int((targets != -100).sum())


def mean(scored, rows):
    sums = [sum(column) for column in zip(*(nats(scored, ids, labels) for ids, labels in rows), strict=True)]
    return sums[0] / sums[1]


@pytest.mark.slow
def test_losses_are_means_over_all_targets(one):
    plain = model()
    experts = model(num_local_experts=3, num_experts_per_tok=2)
    packed_rows = pack(TEXTS[:40], TOKENIZER, LENGTH)
    held_out = [*list(packed_rows)[: SIZES[-1] - 1], packed_rows[-1]][::-1]
    for size in SIZES:
        pieces = [
            piece.tolist()
            for row in held_out[:size]
            for piece in torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        ]
        expected = {
            **dict.fromkeys(("packed", "joined"), mean(plain, [(piece, piece) for piece in pieces])),
            "padded": mean(plain, [(ids, ids) for ids in IDS[:size]]),
            "tuned": mean(plain, [(row["input_ids"], row["labels"]) for row in ROWS[:size]]),
            "padding-free": mean(experts, [(row["input_ids"], row["labels"]) for row in ROWS[:size]]),
        }
        found = {name: one[name][f"eval_{size}_loss"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_reward_models_figures_are_means_over_pairs(one):
    scorer = model(hfllm.HfllmForSequenceClassification, num_labels=1)

    def reward(ids):
        with torch.no_grad():
            return scorer(input_ids=torch.tensor([ids])).logits.squeeze()

    for size in SIZES:
        pairs = [(reward(row["chosen_ids"]), reward(row["rejected_ids"]), row["margin"]) for row in PAIRS[:size]]
        losses = [
            -logsigmoid(chosen - rejected - margin) + 0.1 * (chosen + rejected).square()
            for chosen, rejected, margin in pairs
        ]
        assert one["rewarding"][f"eval_{size}_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    # TRL gives no name of a dataset to these; they are of the last.
    wins = [float(chosen > rejected) for chosen, rejected, _ in pairs]
    rewards = [value.item() for chosen, rejected, _ in pairs for value in (chosen, rejected)]
    assert 0 < sum(wins) < size
    expected = sum(wins) / size, min(rewards), max(rewards), sum(rewards) / len(rewards)
    found = [one["rewarding"][f"eval_{name}"] for name in ("accuracy", "min_reward", "max_reward", "mean_reward")]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 7])
def test_the_batch_changes_nothing(one, tmp_path, rows):
    assert figures(dict(metrics(str(tmp_path), rows))) == pytest.approx(figures(one), abs=1e-5)


def measured_by(printed):
    return json.loads(next(line for line in printed.splitlines() if line.startswith("EVAL "))[5:])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(processes, one, tmp_path):
    found = measured_by(processes.torchrun(SCRIPT, tmp_path, 2))
    assert found.keys() == TRAINERS.keys()
    assert figures(found) == pytest.approx(figures(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_two_processes_with_zero_measure_what_one_does(one, tmp_path):
    """ZeRO-3: with the other stages transformers evaluates only within a training."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
    command += [str(SCRIPT), str(tmp_path), "2", str(ROOT / "ds_configs" / "zero3.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = measured_by(result.stdout)
    assert found
    assert figures(found) == pytest.approx(figures({name: one[name] for name in found}), abs=1e-5)


def test_rows_that_only_fill_a_batch_are_found():
    """Of 5 rows two processes with 2 each are given one more; of 7 one; of 8 none; and other batches are full."""

    def new_rows(process, remainder, is_last=True):
        state = type("State", (), {"end_of_dataloader": is_last, "remainder": remainder})
        accelerator = type("Accelerator", (), {"num_processes": 2, "process_index": process, "gradient_state": state})
        return EachRowOnce._num_new_rows(type("Trainer", (), {"accelerator": accelerator}), 2)

    assert [[new_rows(process, remainder) for process in (0, 1)] for remainder in (1, 3, 0)] == [
        [1, 0],
        [2, 1],
        [2, 2],
    ]
    assert new_rows(1, 1, is_last=False) == 2


@pytest.mark.parametrize("asks", [False, True])
def test_balancing_experts_is_no_part_of_the_loss(tmp_path, asks):
    scored = model(num_local_experts=3, num_experts_per_tok=2, router_aux_loss_coef=5.0, output_router_logits=asks)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in IDS[:2]]
    trainer = TokenMeanEvaluation(
        model=scored,
        args=args,
        data_collator=lambda batch: {
            name: torch.stack([row[name][:3] for row in batch]) for name in ("input_ids", "labels")
        },
    )
    expected = mean(scored, [(ids[:3], ids[:3]) for ids in IDS[:2]])
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluating_leaves_training_as_it_was(tmp_path):
    """The weights, to the bit, that TRL's own trainer learns without evaluations."""
    from trl import SFTConfig, SFTTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    more = {"bf16": False, "activation_checkpointing": False, "max_steps": 3, "learning_rate": 1e-2}
    more |= {"save_strategy": "no", "per_device_train_batch_size": 2}
    ours = tuned(**more, eval_strategy="steps", eval_steps=1, num_local_experts=3, num_experts_per_tok=2)(args)
    rows = ours.train_dataset
    scored = model(num_local_experts=3, num_experts_per_tok=2)
    theirs = SFTTrainer(scored, SFTConfig(**common(args), **more), train_dataset=rows, processing_class=TOKENIZER)
    for name, trainer in (("ours", ours), ("theirs", theirs)):
        trainer.train()
        trainer.save_model(tmp_path / name)
    assert len([entry for entry in ours.state.log_history if "eval_5_loss" in entry]) == 3
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["family", "adapter", "llama", "autocast"])
def test_the_scores_of_targets_are_trls(tmp_path, side):
    """Loss, entropy, accuracy and gradients, where only targets are computed; in every family."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    ours = tuned()(TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True))
    trained = model()
    if side == "llama":
        trained = AutoModelForCausalLM.from_pretrained(hfllm.to_native(trained, tmp_path / "native", "llama"))
    arguments = {"args": ours.args, "train_dataset": ours.train_dataset, "processing_class": TOKENIZER}
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if side == "adapter" else None
    results = []
    for trainer in (type(ours), type(ours).__mro__[3]):
        torch.manual_seed(0)
        made = trainer(model=copy.deepcopy(trained), peft_config=adapter, **arguments)
        batch = made.data_collator([made.train_dataset[index] for index in range(4)])
        with torch.autocast("cpu", enabled=side == "autocast"):
            loss = made.compute_loss(made.model.train(), dict(batch))
        loss.backward()
        gradients = [each.grad for each in made.model.parameters() if each.grad is not None]
        logged = {name: made._metrics["train"][name] for name in ("entropy", "mean_token_accuracy", "num_tokens")}
        results.append((loss, gradients, logged))
    torch.testing.assert_close(
        *results, **({"atol": 5e-3, "rtol": 0.05} if side == "autocast" else {"atol": 1e-5, "rtol": 1e-4})
    )
