"""Likelihoods of continuations against reading each text whole, by itself, with the model's own forward pass."""

import pytest
import torch
from families import FAMILIES

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Subject
from hfllm.generation.scoring import Pair, Scorer, common_length, encode_pair

SHARED = "What is the fox? The fox is red. What is the hen? The hen is brown.\n\n" * 3
CONTEXTS = [
    f"{SHARED}What is the {animal} of the owl, and where does it live?\nIt is" for animal in ("colour", "home")
]
CHOICES = [[" red.", " not a thing that I know about.", " in the old barn", " red"], [" a tree", " a pond", " x y z"]]


def plain(model, tokenizer, context, continuation):
    """One text, one row, no cache."""
    before, whole = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[place - 1, whole[place]]) for place in range(len(before), len(whole)))


def plain_of(model, read, whole, first):
    """As `plain`, of the tokens that a likelihood needs: the last one is not read."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([read]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[place - 1, whole[place]]) for place in range(first, len(whole)))


def expected(model, tokenizer):
    return [
        [plain(model, tokenizer, context, each) for each in choices]
        for context, choices in zip(CONTEXTS, CHOICES, strict=True)
    ]


def found(model, tokenizer, batch_size, shared=SHARED, **options):
    subject = Subject("x", model, tokenizer, batch_size=batch_size, **options)
    return [[each.logprob for each in row] for row in subject.choices(CONTEXTS, CHOICES, shared=shared)]


def assert_close(one, other, tolerance=1e-5):
    for row, others in zip(one, other, strict=True):
        assert row == pytest.approx(others, rel=1e-6, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_batch_size_gives_the_numbers_of_whole_texts(make_model, tokenizer, family):
    model = make_model(**FAMILIES[family])
    whole = expected(model, tokenizer)
    for batch_size in (1, 3, 8):
        assert_close(found(model, tokenizer, batch_size), whole)
    assert_close(found(model, tokenizer, 3, shared=""), whole)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [SHARED, ""])
@pytest.mark.parametrize("beyond", ["the examples", "the contexts", "the shortest"])
def test_texts_on_both_sides_of_the_limit_of_longrope_share_nothing(make_model, tokenizer, beyond, shared):
    """The limit lies behind the examples, behind a question's common tokens, and among its choices."""
    examples = len(tokenizer(SHARED)["input_ids"])
    wholes = [
        [tokenizer(context + each)["input_ids"][:-1] for each in choices]
        for context, choices in zip(CONTEXTS, CHOICES, strict=True)
    ]
    limit = {
        "the examples": examples + 2,
        "the contexts": common_length(wholes[0]),
        "the shortest": min(map(len, wholes[0])),
    }[beyond]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit, "factor": 4.0}
    model = make_model(
        rope_parameters={**rope, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
        max_position_embeddings=1024,
    )
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(10.0) if weights.dim() > 1 else None
    whole = [
        [
            plain_of(model, ids, tokenizer(context + each)["input_ids"], len(tokenizer(context)["input_ids"]))
            for ids, each in zip(rows, choices, strict=True)
        ]
        for rows, choices, context in zip(wholes, CHOICES, CONTEXTS, strict=True)
    ]
    for batch_size in (1, 8):
        assert_close(found(model, tokenizer, batch_size, shared), whole, 1e-4)


def native(name, vocab_size):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {
        "gpt2": {},
        "bloom": {},
        "mistral": {"sliding_window": 20, "intermediate_size": 48, "num_key_value_heads": 2},
        "mamba": {"state_size": 4},
    }[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **more)).eval()
    with torch.no_grad():
        # As they begin, all texts are about as likely.
        for weights in model.parameters():
            weights.mul_(3.0) if weights.dim() > 1 else None
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shares"), [("gpt2", True), ("bloom", True), ("mistral", True), ("mamba", False)])
def test_native_models_share_what_they_can(tokenizer, name, shares):
    model = native(name, len(tokenizer))
    whole = expected(model, tokenizer)
    for batch_size in (1, 8):
        assert_close(found(model, tokenizer, batch_size), whole, 3e-5)
    assert Scorer(model).can_share is shares


def test_an_adapter_counts(make_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = make_model()
    without = expected(model, tokenizer)
    torch.manual_seed(2)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    whole = expected(adapted.eval(), tokenizer)
    assert abs(whole[0][1] - without[0][1]) > 0.01
    assert_close(found(adapted, tokenizer, 3), whole)
    assert Scorer(adapted).can_share


def test_what_is_shared_is_read_once(make_model, tokenizer):
    model = make_model()
    subject = Subject("x", model, tokenizer)
    assert subject.scorer.can_share
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    subject.choices(CONTEXTS, CHOICES, shared=SHARED)
    tokens = [tokenizer(context)["input_ids"] for context in CONTEXTS]
    shared = len(tokenizer(SHARED)["input_ids"]) - 1
    assert common_length(tokens) >= shared
    # The examples, then of each question its own text, then of each choice one token of it and its own, padded.
    own = [len(each) - 1 - shared for each in tokens]
    assert read[0] == shared and read[1] == own[0] and read[3] == own[1] and len(read) == 5
    read.clear()
    subject.choices(CONTEXTS[:1], CHOICES[:1], shared=SHARED)
    assert read[0] == own[0], "the next call reads the examples again"


def test_other_examples_of_equal_length_are_read_again(make_model, tokenizer):
    """Two prefixes of as many tokens, asked one after the other by one scorer, and back."""
    model = make_model()
    sentences = ("The hen is brown.", "The owl is in the barn.", "The fox is red.")
    prefixes = [
        " ".join([*order, "So it is.\n\n"]) for order in (sentences, (sentences[1], sentences[0], sentences[2]))
    ]
    ids = [tokenizer(text)["input_ids"] for text in prefixes]
    assert len(ids[0]) == len(ids[1]) and ids[0] != ids[1]
    subject = Subject("x", model, tokenizer)
    assert subject.scorer.can_share
    whole = [[plain(model, tokenizer, text + "What is the fox?", " red")] for text in prefixes]
    assert abs(whole[0][0] - whole[1][0]) > 1e-3
    for text, expected_one in zip([*prefixes, prefixes[0]], [*whole, whole[0]], strict=True):
        (row,) = subject.choices([text + "What is the fox?"], [[" red"]], shared=text)
        assert [each.logprob for each in row] == pytest.approx(expected_one, abs=1e-5)


def test_the_cut_between_context_and_continuation_is_that_of_lm_eval(tokenizer):
    # From lm-eval 0.4.13's HFLM._encode_pair: white space moves, and the count of the context's tokens cuts the whole.
    for context, continuation in (("The fox is", " red"), ("The fox is ", "red"), ("The fo", "x"), ("The\n", "fox")):
        trimmed = context.rstrip()
        whole, before = tokenizer(context + continuation)["input_ids"], tokenizer(trimmed)["input_ids"]
        assert encode_pair(tokenizer, context, continuation) == Pair(before, whole[len(before) :])
    assert encode_pair(tokenizer, "", "red").context == [tokenizer.bos_token_id]
    with pytest.raises(InputError, match="adds no token"):
        encode_pair(tokenizer, "The fox", "")


def test_what_is_longer_than_the_context_has_no_numbers(make_model, tokenizer):
    model = make_model(max_position_embeddings=32)
    ids = list(range(3, 30))
    pairs = [Pair(ids, [5] * 6), Pair(ids, [5] * 5)]
    fits = Scorer(model).score([[pairs[0]], [pairs[1]], pairs[::-1], [pairs[0], pairs[0]]])
    # 27 + 6 tokens, the last of which is not read, are 32.
    assert [each is None for each in fits] == [False, False, False, False]
    assert list(Scorer(model).score([[Pair(ids, [5] * 7)], [pairs[1], Pair(ids, [5] * 7)]])) == [None, None]


def test_logits_that_are_no_numbers_name_the_item(make_model, tokenizer):
    model = make_model()
    model.lm_head.weight.data[7] = float("nan")
    subject = Subject("x", model, tokenizer)
    with pytest.raises(InputError, match=r"question 12: the model's logits are not numbers"):
        subject.choices(CONTEXTS, CHOICES, names=["question 12", "question 13"])
    with pytest.raises(InputError, match=r"x, prompt '.*': the model's logits are not numbers"):
        subject.answers(CONTEXTS, 4)


def test_greedy_is_what_the_model_would_write(make_model, tokenizer):
    model = make_model()
    subject = Subject("x", model, tokenizer)
    prompt = [{"role": "user", "content": "What is the fox?"}]
    text = subject.text_of(prompt)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, do_sample=False, max_new_tokens=5, eos_token_id=None)[0, ids.shape[1] :]
    pairs = [Pair(ids[0].tolist(), written.tolist()), Pair(ids[0].tolist(), [*written[:-1].tolist(), 3])]
    (scores,) = subject.scorer.score([pairs])
    assert [each.is_greedy for each in scores] == [True, int(written[-1]) == 3]


def test_a_chat_template_is_used_where_it_is_asked_for(make_model, tokenizer):
    model = make_model()
    plain_text, chat = (Subject("x", model, tokenizer, uses_chat_template=use) for use in (False, True))
    messages = [{"role": "user", "content": "What is the fox?"}]
    assert plain_text.text_of(messages) == "What is the fox?"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.text_of("What is the fox?") == chat.text_of(messages) == rendered
    begun = chat.text_of([*messages, {"role": "assistant", "content": "It is"}])
    assert begun == f"{rendered}It is"
    (pair,) = chat.pairs("What is the fox?", ["red"])
    assert pair.context == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # What is generated comes after the same tokens.
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert pair.context == ids
    answers = chat.answers(["What is the fox?", "word " * 300], 4)
    assert isinstance(answers[0], str) and answers[1] is None
