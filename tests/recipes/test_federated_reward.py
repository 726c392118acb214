"""Reward models in a federation: the step on all pairs, by pairs; pair accuracy; what files of comparisons refuse."""

import json

import federated
import pytest
import torch
from test_federated_recipe import NAMES, WORDS, digest, flags, nothing_held, run, table_text  # noqa: F401

from hfllm.errors import InputError
from hfllm.federation.rounds import weighted_average
from hfllm.federation.updates import Update, changes

SIDES = ("chosen", "rejected")
PAIRS = {"learner": "reward", "max_length": 64}


def pair(word):
    said = [{"role": "assistant", "content": text} for text in (f"{word} and {word}", "no")]
    return {"prompt": [{"role": "user", "content": f"Say {word}."}], "chosen": said[:1], "rejected": said[1:]}


@pytest.fixture
def pairs(flags, tmp_path):  # noqa: F811
    """The words of a tiny run on files of comparisons."""

    def make(**more):
        words = flags(**{**PAIRS, **more})
        for name, each in zip(NAMES, WORDS, strict=True):
            text = "".join(json.dumps(pair(word)) + "\n" for word in each)
            (tmp_path / f"{name}.jsonl").write_text(text)
        return words

    return make


def loaded(words):
    from hfllm.stages.federated.build import load_local, organisations_of

    args = federated.parse(list(map(str, words)))
    return load_local(*args, organisations_of(args[0], args[1].seed))


def test_one_step_weighted_by_pairs_is_the_step_on_all_of_them(pairs):
    rate = 0.3
    plain = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    local = loaded(pairs(**plain, per_device_train_batch_size=2))
    learner = local.learner
    learner.model.double()
    begun = learner.weights()
    organisations = {each.name: [*each.rows, *each.held_out] for each in local.organisations}
    assert sorted(map(len, organisations.values())) == [2, 4, 5]
    updates = []
    for name, rows in organisations.items():
        # Parts of two pairs, of which the last has one.
        learned = learner.learn(rows, begun, 0, 1, "seed", batch_size=len(rows))
        assert learned.num_tokens == learned.num_rows == len(rows)
        updates.append(Update(name, changes(learned.weights, begun), learned.num_tokens, learned.num_rows, "base"))
    found = weighted_average(updates)
    learner.set_weights(begun)
    learner.model.zero_grad()
    every, total = [row for rows in organisations.values() for row in rows], 0.0
    for row in every:
        chosen, rejected = (
            learner.model(torch.tensor([row[side]])).logits.squeeze() for side in ("chosen_ids", "rejected_ids")
        )
        total = total + torch.log1p(torch.exp(rejected - chosen))
    (total / len(every)).backward()
    step = {name: -rate * value.grad for name, value in learner.trained.items()}
    assert max(value.abs().max() for value in step.values()) > 1e-3
    assert max((found[name] - step[name]).abs().max() for name in step) < 1e-7
    # Each organisation alike is another step.
    alike = weighted_average(Update(each.organisation, each.tensors, 1, 1, "base") for each in updates)
    assert max((alike[name] - step[name]).abs().max() for name in step) > 1e-5


def test_pairs_are_tokens_as_trl_makes_them(pairs):
    from datasets import Dataset

    local = loaded(pairs())
    trainer, rows = local.learner.trainer, [pair(word) for word in WORDS[0]]
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), local.tokenizer, trainer.args, "train")
    ours = [*local.organisations[0].rows, *local.organisations[0].held_out]

    def ids(rows):
        return sorted((each["chosen_ids"], each["rejected_ids"]) for each in rows)

    assert ids(ours) == ids(theirs)


@pytest.mark.slow
def test_rounds_on_comparisons_leave_a_reward_model_and_its_accuracy(pairs, tmp_path):
    from transformers import AutoModelForSequenceClassification

    words = pairs(average="lora_frozen_a", lora_r=4, rounds=2, controls="local", row_clip_norm=0.5)
    metrics = run(words)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    right = []
    for each in loaded(words).organisations:
        # Where rows are private, the hash of each decides, and one of three organisations holds out none.
        if not each.held_out:
            continue
        scores = [[model(torch.tensor([row[f"{side}_ids"]])).logits.item() for row in each.held_out] for side in SIDES]
        right += [sum(one > other for one, other in zip(*scores, strict=True)) / len(each.held_out)]
    assert metrics["pair_accuracy_federated"] == pytest.approx(sum(right) / len(right))
    assert 0 <= metrics["pair_accuracy_local_best"] <= 1 and metrics["held_out_loss_federated"] > 0
    text = table_text(tmp_path / "out")
    assert "Accuracy on held-out pairs by organisation" in text and "nats per pair" in text and "chat" not in text


@pytest.mark.slow
@pytest.mark.turn(7)
def test_several_processes_come_to_the_same_reward_model(pairs, tmp_path):
    run(pairs(rounds=2, output_dir=tmp_path / "one"))
    run(pairs(rounds=2, output_dir=tmp_path / "several", processes=2))
    assert digest(tmp_path / "one") == digest(tmp_path / "several")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss_on": "last"}, "--loss_on"),
        ({"max_length": 3}, "no pair of shop fits into --max_length 3 tokens"),
        ({"learner": "ppo"}, "invalid choice: 'ppo'"),
    ],
)
def test_bad_flags_of_comparisons_are_refused_in_a_line(pairs, capsys, more, message):
    with pytest.raises((InputError, SystemExit)) as error:
        run(pairs(**more))
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_the_world_has_no_comparisons(tmp_path):
    with pytest.raises(InputError, match="--learner"):
        run(["--learner", "reward", "--output_dir", tmp_path / "out"])
