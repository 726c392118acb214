"""What rewards get of a sampled response: the thoughts apart from the answer."""

import copy

import pytest
import torch
from transformers.utils import get_json_schema

from hfllm import PPOConfig, PPOTrainer
from hfllm.environments.tools import calculator
from hfllm.errors import InputError
from hfllm.trainers.ppo.prompts import check_prompts
from hfllm.trainers.ppo.rollout import completions_of

ASKED = [{"role": "user", "content": "Q"}]


def completion(tokenizer, said, prompt=ASKED, opened="<|user|>Q<|end|><|assistant|>"):
    """The completion of a response that was sampled as tokens."""
    ids = tokenizer(said)["input_ids"]
    (found,) = completions_of(tokenizer, [prompt], [tokenizer(opened)["input_ids"]], [ids])
    return found


def message(content, thoughts=None):
    return [{"role": "assistant", "content": content} | ({} if thoughts is None else {"reasoning_content": thoughts})]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("It is 6.<|end|>", message("It is 6.")),
        ("<think>2+4</think>It is 6.<|end|>", message("It is 6.", "2+4")),
        ("<think>2+4 is", message("", "2+4 is")),
        ("2+4</think>It is 6.", message("It is 6.", "2+4")),
        (" It <|user|>is 6. ", message(" It is 6. ")),
    ],
)
def test_thoughts_are_apart(tokenizer, said, expected):
    assert completion(tokenizer, said) == expected


def test_texts_keep_them(tokenizer):
    assert completion(tokenizer, "<think>2+4</think>6<|end|>", prompt="Q", opened="Q") == "<think>2+4</think>6"


def test_the_prompt_may_have_opened_a_thought(tokenizer):
    opened = "<|user|>Q<|end|><|assistant|><think>\n"
    assert completion(tokenizer, "2+4 is", opened=opened) == message("", "2+4 is")
    closed = f"{opened}</think>"
    assert completion(tokenizer, "It is 6.", opened=closed) == message("It is 6.")


def test_other_marks_are_read_as_the_tokenizer_says(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    fields = tokenizer.response_template["fields"]
    thought = {"open": "[THINK]", "close": "[/THINK]", "content": "text"}
    tokenizer.response_template = {
        **tokenizer.response_template,
        "fields": {"reasoning_content": thought, "content": fields["content"]},
    }
    assert completion(tokenizer, "[THINK]2+4[/THINK]6<|end|>") == message("6", "2+4")
    assert completion(tokenizer, "6 [TH<|end|>") == message("6 [TH")


def test_a_reward_gets_them_from_the_trainer(make_model, tokenizer, tmp_path, monkeypatch):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(each[0].get("reasoning_content", ""))) for each in completions]

    config = PPOConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=1, num_ppo_epochs=1, num_mini_batches=1, use_cpu=True
    )
    config.response_length, config.learning_rate, config.report_to = 16, 1e-4, "none"
    trainer = PPOTrainer(make_model(), [reward], config, [{"prompt": ASKED}] * 4, processing_class=tokenizer)
    sample = trainer.sample
    ids = torch.tensor(tokenizer("<think>hm</think>So<|end|>")["input_ids"])

    def thinking(rows):
        batch = sample(rows)
        length = len(ids)
        batch["response_ids"] = ids.repeat(len(rows), 1)
        batch["response_mask"] = torch.ones(len(rows), length, dtype=batch["response_mask"].dtype)
        batch["is_ended"] = torch.ones(len(rows), dtype=torch.bool)
        return batch

    batch = thinking([{"prompt": ASKED}] * 2)
    scores = trainer.score([{"prompt": ASKED}] * 2, batch)
    assert seen == [message("So", "hm")] * 2
    assert scores.total.tolist() == [2.0, 2.0]
    assert scores.completions[0]["completion"] == "<think>hm</think>So"


BEGUN = [*ASKED, {"role": "assistant", "content": "Sure, first"}]


def test_a_reward_gets_the_whole_of_an_answer_that_the_prompt_begins(make_model, tokenizer, tmp_path):
    """As from TRL's GRPOTrainer: the messages before it, and one message with the whole answer."""
    seen = []

    def reward(prompts, completions, completion_ids, completion_beginning, **columns):
        seen.append((list(prompts), list(completions), list(completion_beginning), completion_ids))
        return [float(len(each[0]["content"])) for each in completions]

    config = PPOConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, num_ppo_epochs=1, num_mini_batches=1, use_cpu=True
    )
    config.response_length, config.learning_rate, config.report_to = 4, 1e-4, "none"
    rows = [{"prompt": ASKED}, {"prompt": BEGUN}] * 2
    trainer = PPOTrainer(make_model(), [reward], config, rows, processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 2
    for prompts, completions, beginnings, ids in seen:
        assert prompts == [ASKED] * 2 and set(beginnings) == {"", "Sure, first"}
        for (message,), beginning, sampled in zip(completions, beginnings, ids, strict=True):
            assert message["content"] == beginning + tokenizer.decode(sampled, skip_special_tokens=True)
    # The policy reads the beginning, and nothing of it is among what it is trained on.
    batch = trainer.sample([{"prompt": BEGUN}] * 2)
    read = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()]
    assert tokenizer.decode(read) == "<|user|>Q<|end|><|assistant|>Sure, first"


def test_tools_refuse_an_answer_that_has_begun(make_model, tokenizer):
    schemas = [get_json_schema(calculator)]
    check_prompts([{"prompt": ASKED}], tokenizer, 4, None, schemas)
    with pytest.raises(InputError, match="tools: prompt 1 of the dataset ends with the assistant's message"):
        check_prompts([{"prompt": ASKED}, {"prompt": BEGUN}], tokenizer, 4, None, schemas)
