"""Reward models: each sequence is scored as it would be alone, whatever lies beside it in a pass."""

import copy
import json

import pytest
import torch

import hfllm
from hfllm.data.tokenizer import train_tokenizer
from hfllm.errors import InputError
from hfllm.models.loading.saved import scores_tokens
from hfllm.rewards.models import RewardModel, TokenRewardModel

WORDS = "the fox is red and the owl sings in an old house by the river"


@pytest.fixture
def scorer(make_model):
    """A scorer, and the tokens of each of its passes: rows without their padding."""
    model, passes = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1), []

    def record(module, args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        passes.append([ids[mask > 0].tolist() for ids, mask in pairs])

    model.register_forward_pre_hook(record, with_kwargs=True)
    return model, passes


def score_alone(model, ids):
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_passes_hold_rows_of_like_length_and_scores_come_in_their_order(scorer, tokenizer, batch_size, padding_side):
    (model, passes), tokenizer = scorer, copy.deepcopy(tokenizer)
    tokenizer.padding_side = padding_side
    prompts = ["Go", "What is 1 plus 2?"] * 8
    completions = [WORDS[:cut] for cut in (60, 2, 3, 50, 31, 1, 4, 59, 30, 20, 5, 61, 44, 25, 6, 58)]
    scores = RewardModel(model, tokenizer, batch_size)(prompts, completions)
    texts = [tokenizer(prompt + text)["input_ids"] for prompt, text in zip(prompts, completions, strict=True)]
    # The end token is in each text that TRL's RewardTrainer learns from.
    texts = [[*ids, tokenizer.eos_token_id] for ids in texts]
    expected = []
    for ids in sorted(texts, key=len, reverse=True):
        if expected and len(expected[-1]) < batch_size and len(expected[-1][0]) - len(ids) < 8:
            expected[-1].append(ids)
        else:
            expected.append([ids])
    assert [list(map(len, rows)) for rows in passes] == [list(map(len, rows)) for rows in expected]
    assert sorted(ids for rows in passes for ids in rows) == sorted(texts)
    assert 1 < len(passes) < 16 or batch_size == 1
    assert scores == pytest.approx([score_alone(model, ids) for ids in texts], abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 8


def test_a_reward_model_reads_text_with_its_own_tokenizer_at_the_last_real_token(make_model):
    other = train_tokenizer(["some other words"] * 9, vocab_size=300)
    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    reward = RewardModel(model, other, batch_size=2)
    prompts = [[{"role": "user", "content": text}] for text in ("What is 1 plus 2?", "Hi", "Where is the red fox?")]
    answers = [[{"role": "assistant", "content": text}] for text in ("Three.", "A much longer answer, friend.", "No")]
    together = reward(prompts, answers)
    for prompt, answer, score in zip(prompts, answers, together, strict=True):
        ids = other.apply_chat_template(prompt + answer, tokenize=True, return_dict=True, return_tensors="pt")
        hidden = model.model(ids["input_ids"]).last_hidden_state[0, -1]
        assert model.score(hidden).item() == pytest.approx(score, abs=1e-5)


def test_a_reward_model_is_frozen(scorer, tokenizer):
    model = RewardModel(scorer[0].train(), tokenizer).model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_models_that_give_no_score_are_refused(make_model, tokenizer):
    two = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=2)
    with pytest.raises(InputError, match="the reward model has 2 labels; expected a model trained with num_labels=1"):
        RewardModel(two, tokenizer)
    untrained = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    untrained.has_new_head = True
    with pytest.raises(InputError, match="has no head for scores"):
        RewardModel(untrained, tokenizer)
    untrained.has_new_head, unpadded = False, copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    with pytest.raises(InputError, match="the reward model's tokenizer has no padding token"):
        RewardModel(untrained, unpadded)


@pytest.mark.parametrize(("conversational", "beginning"), [(False, ""), (True, ""), (True, "Sure, 1")])
def test_each_token_that_was_sampled_has_its_own_reward(make_model, tokenizer, conversational, beginning):
    model = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=1)
    prompts = ["Go", "What is 1 plus 2?", "Where does the old owl sing?"]
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        opened = [f"<|user|>{prompt[0]['content']}<|end|><|assistant|>{beginning}" for prompt in prompts]
        before = tokenizer(opened)["input_ids"]
    # Not what the text of a completion would be split into.
    sampled = [[9, 300, 17, 44, 45], [50], [200] * 20]
    columns = {"completion_ids": sampled, **({"completion_beginning": [beginning] * 3} if beginning else {})}
    rewards = TokenRewardModel(model, tokenizer, batch_size=2)(prompts, ["unread"] * 3, **columns)
    assert list(map(len, rewards)) == [5, 1, 20]
    for prompt, completion, found in zip(before, sampled, rewards, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) :, 0]
        torch.testing.assert_close(torch.tensor(found), alone, atol=1e-5, rtol=1e-5)


def test_which_models_score_tokens(make_model):
    kinds = hfllm.HfllmForTokenClassification, hfllm.HfllmForSequenceClassification
    assert [scores_tokens(make_model(model_class=kind, num_labels=1)) for kind in kinds] == [True, False]


def test_the_tools_of_a_conversation_are_read_with_it(scorer, tokenizer):
    (model, passes), tokenizer = scorer, copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    tool = {"name": "add", "description": "Add two numbers.", "parameters": {}}
    prompts = [[{"role": "user", "content": "What is 1 plus 2?"}]] * 3
    completions = [[{"role": "assistant", "content": "3"}]] * 3
    scores = RewardModel(model, tokenizer)(prompts, completions, tools=[[tool], None, json.dumps([tool])])
    with_tools, without = (
        tokenizer.apply_chat_template(prompts[0] + completions[0], tools=tools, return_dict=False)
        for tools in ([{"type": "function", "function": tool}], None)
    )
    assert sorted(ids for each in passes for ids in each) == sorted([with_tools, with_tools, without])
    assert scores == pytest.approx([score_alone(model, ids) for ids in (with_tools, without, with_tools)], abs=1e-5)
