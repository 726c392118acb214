"""Answers from passages: prompts, citations, RAG-Sequence and RAG-Token against sums by hand."""

import math

import pytest
import torch

from hfllm.data.passages import with_passages
from hfllm.errors import InputError
from hfllm.generation.responses import Response, sample_with_ends
from hfllm.grounding.answers import (
    GroundedAnswer,
    answer_with_passages,
    marginal_log_probs,
    passage_weights,
    rag_sequence_answers,
    rag_token_answers,
    union_of,
)
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever, Found

pytest.importorskip("bm25s")
TEXTS = ["The owl is gray.", "The fox is red.", "The owl eats mice.", "A blue hat is here."]
QUESTIONS = ["What color is the owl?", "What color is the fox?", "Who wears a hat?", "Zebra?"]
LENGTH = 12


@pytest.fixture(scope="module")
def retriever():
    return BM25Retriever(Passages.from_texts(TEXTS))


def chat(question, *texts):
    return [{"role": "user", "content": with_passages(question, texts)}]


def greedy(model, tokenizer, prompts):
    said = sample_with_ends(model, tokenizer, prompts, LENGTH, do_sample=False)
    return [(response.text, response.has_ended) for (response,) in said]


def said(answers):
    return [(answer.text, answer.has_ended) for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_one_passage_is_plain_decoding_with_it(make_model, tokenizer, retriever, seed):
    model = make_model(seed)
    found = retriever.retrieve(QUESTIONS, 1)
    plain = greedy(
        model,
        tokenizer,
        [
            chat(question, *(each.passage.text for each in given))
            for question, given in zip(QUESTIONS, found, strict=True)
        ],
    )
    assert len(set(plain)) > 1
    for marginal in (None, "sequence", "token", "union"):
        answers = answer_with_passages(
            model, tokenizer, QUESTIONS, retriever, top_k=1, max_new_tokens=LENGTH, marginal=marginal
        )
        assert said(answers) == plain
        assert [answer.passages for answer in answers] == found and found[3] == []
    # A mixture of the same passage is that passage.
    prompts = [[chat(QUESTIONS[0], TEXTS[0])] * 3, [chat(QUESTIONS[1], TEXTS[1])] * 2]
    weights = [[0.2, 0.5, 0.3], [0.5, 0.5]]
    for decode in (rag_sequence_answers, rag_token_answers):
        for batch_size in (1, 4, 16):
            assert [tuple(each) for each in decode(model, tokenizer, prompts, weights, LENGTH, batch_size)] == plain[
                :2
            ]


def next_log_probs(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def by_hand(model, prompts, weights, answer):
    """p(y | x) by both formulas, token by token and passage by passage."""
    parts = [
        [math.exp(next_log_probs(model, [*prompt, *answer[:place]])[token]) for place, token in enumerate(answer)]
        for prompt in prompts
    ]
    sequence = sum(weight * math.prod(row) for weight, row in zip(weights, parts, strict=True))
    token = math.prod(
        sum(weight * row[place] for weight, row in zip(weights, parts, strict=True)) for place in range(len(answer))
    )
    return sequence, token


def test_probabilities_are_the_sums_over_the_passages(make_model, tokenizer):
    model = make_model(initializer_range=0.5)
    prompts = [chat(QUESTIONS[0], text) for text in TEXTS[:3]]
    ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    weights = passage_weights([3.0, 1.0, 2.5], 1.5)
    for text in ("gray", "It is gray, or so.", "x"):
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        sequence, token = by_hand(model, ids, weights, answer)
        for batch_size in (2, 16):
            found = marginal_log_probs(model, tokenizer, prompts, weights, answer, batch_size)
            assert found == pytest.approx((math.log(sequence), math.log(token)), rel=1e-5)
        assert len(answer) == 1 or abs(sequence / token - 1) > 1e-3
    # Over all answers of one token both are probabilities.
    every = torch.stack([next_log_probs(model, each) for each in ids]).exp()
    total = (torch.tensor(weights, dtype=torch.float64) @ every).sum()
    assert total.item() == pytest.approx(1)
    some = [math.exp(marginal_log_probs(model, tokenizer, prompts, weights, [token]).token) for token in range(9)]
    assert some == pytest.approx((torch.tensor(weights, dtype=torch.float64) @ every[:, :9]).tolist(), rel=1e-4)


@pytest.mark.slow
def test_the_chosen_answers_are_the_likeliest(make_model, tokenizer):
    model = make_model(initializer_range=0.3)
    questions = [chat("Who?", text) for text in TEXTS]
    ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in questions]
    weights = [0.1, 0.4, 0.3, 0.2]
    (token,) = rag_token_answers(model, tokenizer, [questions], [weights], LENGTH)
    tokens = []
    while len(tokens) < LENGTH and tokenizer.eos_token_id not in tokens:
        rows = torch.stack([next_log_probs(model, [*each, *tokens]) for each in ids])
        tokens.append(int((rows + torch.tensor(weights).double().log()[:, None]).logsumexp(0).argmax()))
    assert token.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert token.has_ended == (tokenizer.eos_token_id in tokens)
    candidates = []
    for each in ids:
        answer = []
        while len(answer) < LENGTH and tokenizer.eos_token_id not in answer:
            answer.append(int(next_log_probs(model, [*each, *answer]).argmax()))
        candidates.append(answer)
    best = max(candidates, key=lambda answer: by_hand(model, ids, weights, answer)[0])
    (sequence,) = rag_sequence_answers(model, tokenizer, [questions], [weights], LENGTH)
    assert len({tuple(each) for each in candidates}) > 1
    assert sequence.text == tokenizer.decode(best, skip_special_tokens=True)


def test_the_weights_of_passages_choose_among_the_answers(make_model, tokenizer):
    model = make_model(initializer_range=0.3)
    questions = [chat("Who?", text) for text in TEXTS]
    candidates = [rag_sequence_answers(model, tokenizer, [[each]], [[1.0]], LENGTH)[0].text for each in questions]
    assert len(set(candidates)) == len(TEXTS)
    chosen = []
    for place in range(len(TEXTS)):
        # A ten-thousandth for the others: what its own passage says is then likeliest.
        weights = [1 - 1e-4 * (len(TEXTS) - 1) if place == each else 1e-4 for each in range(len(TEXTS))]
        chosen += rag_sequence_answers(model, tokenizer, [questions], [weights], LENGTH)
    assert [each.text for each in chosen] == candidates


def test_weights_are_a_softmax():
    assert passage_weights([2.0, 1.0]) == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert passage_weights([2000.0, 0.0]) == [1.0, 0.0]
    assert passage_weights([0.5, 0.1], 0.1) == pytest.approx(passage_weights([5.0, 1.0]))
    with pytest.raises(InputError, match="scores of passages must be finite"):
        passage_weights([1.0, math.nan])
    with pytest.raises(InputError, match="temperature must be a number above 0, got 0"):
        passage_weights([1.0], 0)


def test_passages_stand_before_the_last_question_of_a_conversation(make_model, tokenizer, retriever):
    model = make_model()
    turns = [*chat("Hello."), {"role": "assistant", "content": "Hi."}, *chat(QUESTIONS[1])]
    before = [dict(turn) for turn in turns]
    (answer,) = answer_with_passages(model, tokenizer, [turns], retriever, top_k=2, max_new_tokens=LENGTH)
    assert turns == before and answer.question == QUESTIONS[1]
    shown = [*turns[:2], *chat(QUESTIONS[1], *(each.passage.text for each in answer.passages))]
    assert said([answer]) == greedy(model, tokenizer, [shown])
    sampled = [
        answer_with_passages(model, tokenizer, QUESTIONS, retriever, do_sample=True, seed=seed, max_new_tokens=LENGTH)
        for seed in (1, 1, 2)
    ]
    assert said(sampled[0]) == said(sampled[1]) != said(sampled[2])


def test_citations_are_read():
    found = [Found(place, Passages.from_texts(TEXTS)[place], 1.0) for place in (2, 0)]
    answer = GroundedAnswer("Q", "Mice [1], and gray [2]. [7] [1]", found, True)
    assert answer.cited == found and answer.wrong_citations == [7] and answer.answer == "Mice, and gray."
    alone = GroundedAnswer("Q", "Mice [1] [2].", found, True, marginal=True)
    assert alone.cited == [] and alone.wrong_citations == [2]


@pytest.mark.parametrize(
    ("answers", "union"),
    [
        (["It is red [1].", "The fox is blue [1].", "Red [1]."], "It is red [1, 3]. The fox is blue [2]."),
        # A sentence without a citation gets none, and numbers that no passage had are left out.
        (["I do not know that.", "It is red. It eats [1].", "Not given."], "It is red. It eats [2]."),
        (["No.", "It is red [1], says [7].", "Blue [1]"], "It is red [2], says. Blue [3]."),
        # Said from memory, where another is from its passage; and where none is.
        (["It is blue.", "It is red [1].", "It is red [2]."], "It is red [2]."),
        (["It is blue.", "The color of the fox is blue."], "It is blue."),
        (["I do not know.", "The passages do not say."], "I do not know."),
        # What is cited is no refusal, whatever its words.
        (["I do not know.", "Nothing is redder [1]."], "Nothing is redder [2]."),
        # Other words, in another order, or more of them are another answer.
        (["It is red [1].", "It is not red [1]."], "It is red [1]. It is not red [2]."),
        (["In 1990 [1].", "In 1990 and 1995 [1]."], "In 1990 [1]. In 1990 and 1995 [2]."),
        (["12/11 [1].", "11/12 [1].", "-5 [1]", "5 [1]"], "12/11 [1]. 11/12 [2]. -5 [3]. 5 [4]."),
        (["Ann beat Bob [1].", "Bob beat Ann [1]."], "Ann beat Bob [1]. Bob beat Ann [2]."),
        (["Er ist rot [1].", "Er ist nicht rot [1]."], "Er ist rot [1]. Er ist nicht rot [2]."),
        # The question's words tell nothing new, but not all answers of them are the same.
        (["The fox [1].", "Is the color [1].", "Color [1]."], "The fox [1]. Is the color [2, 3]."),
        # Nothing is said by marks.
        (["[1]", "... [1].", "It is red [1]"], "It is red [3]"),
        (["", " [1]"], ""),
        ([], ""),
    ],
)
def test_what_passages_say_one_by_one_is_said_together(answers, union):
    assert union_of("What color is the fox?", answers) == union


def test_the_union_is_of_greedy_answers_from_each_passage(make_model, tokenizer, retriever, monkeypatch):
    model = make_model(initializer_range=0.3)
    answers = answer_with_passages(
        model, tokenizer, QUESTIONS, retriever, 3, max_new_tokens=LENGTH, batch_size=3, marginal="union"
    )
    sizes = set()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        prompts = [chat(question, each.passage.text) for each in answer.passages] or [chat(question)]
        apart = greedy(model, tokenizer, prompts)
        sizes.add(len(apart))
        expected = union_of(question, [text for text, _ in apart]) if len(apart) > 1 else apart[0][0]
        assert (answer.text, answer.has_ended) == (expected, all(has_ended for _, has_ended in apart))
    assert sizes == {1, 3}
    # Citations are those of the passages in their order.
    said = iter(("It is red [1].", "I do not know.", "It is blue [1]."))
    fixed = lambda *_, **__: [[Response(next(said), True)] for _ in range(3)]  # noqa: E731
    monkeypatch.setattr("hfllm.grounding.answers.sample_with_ends", fixed)
    texts = BM25Retriever(Passages.from_texts(["A fox is red.", "A fox runs.", "A fox is blue."]))
    (answer,) = answer_with_passages(model, tokenizer, ["fox?"], texts, 3, marginal="union")
    assert answer.text == "It is red [1]. It is blue [3]." and answer.wrong_citations == []
    assert answer.cited == [answer.passages[0], answer.passages[2]]


def test_what_cannot_be_answered_is_refused(make_model, tokenizer, retriever):
    model = make_model()
    with pytest.warns(UserWarning, match=r"min_score=1000000000.0: none of 4 question.s. gets a passage; the best"):
        answers = answer_with_passages(model, tokenizer, QUESTIONS, retriever, min_score=1e9, max_new_tokens=LENGTH)
    assert said(answers) == greedy(model, tokenizer, [chat(question) for question in QUESTIONS])
    long = BM25Retriever(Passages.from_texts(["owl " * 200, "fox"], ["long.txt", "short.txt"]))
    for marginal in (None, "sequence", "token", "union"):
        with pytest.raises(
            InputError, match=r"question 2: its prompt .*context of 256 \(long.txt has \d+\): take a smaller"
        ):
            answer_with_passages(model, tokenizer, ["fox", "owl fox"], long, max_new_tokens=LENGTH, marginal=marginal)
    with pytest.raises(InputError, match=r"question 1: its prompt with 0 passage\(s\) has \d+ tokens, with max_new"):
        answer_with_passages(model, tokenizer, ["zebra"], retriever, max_new_tokens=256)
    with pytest.raises(InputError, match="marginal='both': expected sequence, token, union or None"):
        answer_with_passages(model, tokenizer, QUESTIONS, retriever, marginal="both")
    with pytest.raises(InputError, match="do_sample cannot be used with marginal"):
        answer_with_passages(model, tokenizer, QUESTIONS, retriever, marginal="token", do_sample=True)
    with pytest.raises(InputError, match="questions must be a list"):
        answer_with_passages(model, tokenizer, "owl?", retriever)
    assert answer_with_passages(model, tokenizer, [], retriever) == []
