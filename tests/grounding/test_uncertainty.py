"""Measures of uncertainty, by hand and on a distribution that is known; meanings; ensembles."""

import math

import numpy as np
import pytest

from hfllm.errors import InputError
from hfllm.generation.scoring import ScoredAnswer
from hfllm.grounding.uncertainty import (
    CONFIDENCE,
    MEASURES,
    Answered,
    discrete_semantic_entropy,
    ensemble_disagreement,
    ensemble_mean,
    meanings_of,
    normalized,
    predictive_entropy,
    sampling_cost,
    self_consistency,
    semantic_entropy,
    uncertainties,
)


def said(text, *probabilities):
    return ScoredAnswer(text, tuple(math.log(each) for each in probabilities))


def row(given, *samples, prompt="What color is the fox?"):
    return Answered(prompt, given, samples)


RED, IS_RED, BLUE = said("red", 0.5), said("It is red.", 0.5, 0.4), said("blue", 0.1)


def test_the_measures_by_hand():
    # Meanings: red (.5 + .2), blue (.1); "red" was sampled twice.
    found = uncertainties([row(RED, RED, IS_RED, RED, BLUE)], [["r", "r", "r", "r", "b"]])
    logs = [math.log(each) for each in (0.5, 0.2, 0.5, 0.1)]
    assert {name: float(numbers[0]) for name, numbers in found.items()} == pytest.approx(
        {
            "sequence_probability": -math.log(0.5),
            "token_probability": -math.log(0.5),
            "predictive_entropy": -sum(logs) / 4,
            "normalized_entropy": -(math.log(0.5) * 2 + math.log(0.2) / 2 + math.log(0.1)) / 4,
            "semantic_entropy": -(7 / 8 * math.log(7 / 8) + 1 / 8 * math.log(1 / 8)),
            "discrete_semantic_entropy": -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)),
            "self_consistency": 1 / 4,
        }
    )
    assert list(found) == list(MEASURES)
    per_token = semantic_entropy([row(RED, RED, IS_RED, BLUE)], [["r", "r", "r", "b"]], normalized=True)
    masses = np.array([0.5 + math.sqrt(0.2), 0.1])
    shares = masses / masses.sum()
    assert per_token[0] == pytest.approx(-(shares * np.log(shares)).sum())


def test_confidences_are_probabilities():
    found = uncertainties([row(IS_RED, RED, IS_RED, BLUE)])
    confidence = {name: float(turn(found[name])[0]) for name, turn in CONFIDENCE.items() if name in found}
    assert confidence == pytest.approx(
        {"sequence_probability": 0.2, "token_probability": math.sqrt(0.2), "self_consistency": 1 / 3}
    )


def test_entropies_are_those_of_a_known_distribution():
    rng = np.random.default_rng(0)
    shares = {"red": 0.5, "Red!": 0.2, "blue": 0.2, "green": 0.1}
    texts = rng.choice(list(shares), 4000, p=list(shares.values()))
    rows = [row(said("red", 0.5), *(said(text, shares[text]) for text in texts))]
    entropy = -sum(each * math.log(each) for each in shares.values())
    of_meanings = -sum(each * math.log(each) for each in (0.7, 0.2, 0.1))
    assert predictive_entropy(rows)[0] == pytest.approx(entropy, abs=0.03)
    assert semantic_entropy(rows)[0] == pytest.approx(of_meanings, abs=1e-9)
    assert discrete_semantic_entropy(rows)[0] == pytest.approx(of_meanings, abs=0.03)
    assert self_consistency(rows)[0] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("measure", ["semantic_entropy", "discrete_semantic_entropy", "self_consistency"])
def test_equal_answers_are_sure_and_different_ones_are_not(measure):
    same, different = row(RED, *[RED] * 8), row(RED, *(said(f"x{number}", 0.01) for number in range(8)))
    sure, unsure = MEASURES[measure]([same, different], None)
    assert sure == 0 and math.copysign(1, sure) == 1
    assert unsure == pytest.approx(1 if measure == "self_consistency" else math.log(8))


def test_ties_stay_ties_in_any_order():
    rng = np.random.default_rng(0)
    samples = [said(text, share) for text, share in zip("abcdefg", rng.dirichlet([1] * 7), strict=True)]
    repeated = [*samples, *samples[:3], samples[0]]
    rows = [row(RED, *(repeated[place] for place in rng.permutation(11))) for _ in range(30)]
    assert len(set(discrete_semantic_entropy(rows))) == len(set(predictive_entropy(rows))) == 1


def test_improbable_answers_have_an_entropy_too():
    rows = [row(RED, ScoredAnswer("a", (-2000.0,)), ScoredAnswer("b", (-2000.0,)), ScoredAnswer("b", (-1e5,), (9,)))]
    assert semantic_entropy(rows)[0] == pytest.approx(math.log(2))


def test_equal_texts_of_other_tokens_are_other_sequences():
    one, other = ScoredAnswer("red", (-1.0,), (5,)), ScoredAnswer("red", (-1.0,), (6,))
    rows = [row(RED, one, one, other, ScoredAnswer("blue", (-1.0,), (7,)))]
    assert semantic_entropy(rows)[0] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))


def test_measures_of_samples_need_no_log_probabilities():
    rows = [row(ScoredAnswer("red", ()), ScoredAnswer("Red.", ()), ScoredAnswer("blue", ()))]
    assert discrete_semantic_entropy(rows)[0] == pytest.approx(math.log(2))
    assert self_consistency(rows)[0] == 0.5
    assert list(uncertainties([row(RED)])) == ["sequence_probability", "token_probability"]
    assert all(len(numbers) == 0 for numbers in uncertainties([]).values())


@pytest.mark.parametrize(
    ("texts", "equal"),
    [
        (("It is red.", "it is  RED"), True),
        (("It is red. [1]", "It is red."), True),
        (("The fox is red.", "A fox is red!"), True),
        (("-5", "5"), False),
        (("well-5", "well 5"), True),
        (("3.5", "35"), False),
        (("1,000 km", "1 000 km"), False),
        (("Straße", "STRASSE"), True),
        (("它是红色的。", "它是红色的"), True),
        (("", "red"), False),
        (("the", ""), False),
        (("!", "?"), False),
    ],
)
def test_normalized_words(texts, equal):
    assert (normalized(texts[0]) == normalized(texts[1])) is equal


def test_meanings_by_a_users_function():
    calls = []

    def same(one, other):
        calls.append((one, other))
        return one[0] == other[0]

    texts = ["cat", "car", "dog", "cat", "", " ", "door"]
    rows = [row(*(said(text, 0.5) for text in texts)), row(*(said(text, 0.5) for text in texts[::-1]))]
    assert meanings_of(rows, same) == [[0, 0, 1, 0, 2, 2, 1], [0, 1, 1, 2, 0, 2, 2]]
    # Each text once, against the first of each meaning; empty ones are never shown.
    assert calls[:3] == [("cat", "car"), ("cat", "dog"), ("cat", "door")]
    assert not [pair for pair in calls if not pair[0].strip() or not pair[1].strip()]


def test_meanings_by_an_entailment_model_read_the_prompt_and_both_directions():
    class Entailment:
        def in_both_directions(self, first, second):
            self.seen = list(zip(first, second, strict=True))
            return [sorted(one.split()[-1]) == sorted(other.split()[-1]) for one, other in self.seen]

    model = Entailment()
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    rows = [
        row(*(said(text, 0.5) for text in ["ab", "ba", "c", "ab", ""]), prompt=prompt),
        row(*(said(text, 0.5) for text in ["c", "ab"])),
    ]
    assert meanings_of(rows, model) == [[0, 0, 1, 0, 2], [0, 1]]
    assert model.seen[0] == ("Which? ab", "Which? ba")
    # Each pair of different texts of a row once.
    assert len(model.seen) == 3 + 1


def test_an_ensemble_by_hand():
    logprobs = np.log([[0.5, 0.2], [0.1, 0.2]])
    assert np.exp(-ensemble_mean(logprobs)) == pytest.approx([0.3, 0.2])
    assert ensemble_disagreement(logprobs) == pytest.approx([math.log(0.3) - math.log(0.05) / 2, 0], abs=1e-12)
    assert ensemble_disagreement([[-900.0], [-900.0]]).tolist() == [0]


def test_the_cost_of_samples_in_tokens():
    rows = [row(RED, RED, IS_RED), row(IS_RED, BLUE, BLUE)]
    assert sampling_cost(rows) == {"given_tokens": 1.5, "sampled_tokens": 2.5, "times_as_many": 4 / 1.5}


NAN = ScoredAnswer("red", (-0.1, math.nan))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            lambda: semantic_entropy([row(RED, RED, RED), row(RED, RED)]),
            "row 2 has 1 samples; an entropy needs at lea",
        ),
        (lambda: predictive_entropy([row(RED)]), "row 1 has 0 samples; an entropy needs at least 2"),
        (lambda: self_consistency([row(RED)]), "row 1 has 0 samples; self-consistency needs at least 1"),
        (lambda: predictive_entropy([row(RED, RED, NAN)]), "row 1: the log-probability of sample 2 is nan"),
        (lambda: uncertainties([row(NAN)]), "row 1: the log-probability of the given answer is nan"),
        (lambda: uncertainties([row(said("red"), RED, RED)]), "row 1: the given answer has no token"),
        (lambda: semantic_entropy([row(RED, RED, said(""))]), "row 1: sample 2 has no token"),
        (lambda: semantic_entropy([row(RED, RED, RED)], [["r", "r"]]), "row 1 has 2 meanings; expected 3"),
        (lambda: semantic_entropy([row(RED, RED, RED)], []), "meanings of 0 rows and 1 rows"),
        (lambda: ensemble_mean([[-1.0]]), "at least 2 members"),
        (lambda: ensemble_mean([[-1.0], [-1.0, -2.0]]), r"as many answers each, got \[1, 2\]"),
        (lambda: ensemble_disagreement([[-1.0, -1.0], [-1.0, math.nan]]), "answer 2 under member 2 is NaN"),
        (lambda: sampling_cost([]), "there are no answers"),
    ],
)
def test_bad_input_is_one_line(call, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_is_no_log_probability_or_label_is_named():
    def answered(*numbers, texts=("a", "a", "b")):
        given, *samples = (ScoredAnswer(text, (number,)) for text, number in zip(texts, numbers, strict=True))
        return [Answered("q", given, tuple(samples))]

    # A probability in place of its logarithm.
    with pytest.raises(InputError, match=r"row 1: a token of sample 2 has the log-probability 0\.7; expected"):
        uncertainties(answered(-1.0, -1.0, 0.7))
    assert uncertainties(answered(0.0, 1e-7, -1.0))["sequence_probability"].tolist() == [0.0]
    for label in (math.nan, ["red"]):
        with pytest.raises(InputError, match=r"row 1 has the meaning .*; expected labels that equal themselves"):
            uncertainties(answered(-1.0, -1.0, -1.0), [["red", "red", label]])
    # Log-probabilities of long answers, of which no exponential is left.
    entropy = uncertainties(answered(-1.0, -1e5, -1e5 - math.log(3)), [[0, 0, 1]])["semantic_entropy"][0]
    assert entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
