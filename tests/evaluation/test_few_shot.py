"""Probes of base models: what is asked, how it is scored, and what a leap is."""

import pytest
import torch
from transformers import GenerationConfig

from hfllm.data.world.vocabulary import is_held_out
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.emergence import (
    CHAIN,
    FEW_SHOT,
    KINDS,
    METRICS,
    ZERO_SHOT,
    Emergence,
    Probe,
    ProbedRun,
    answer_scores,
    best_so_far,
    make_probes,
    mean_scores,
    run_probes,
    sharpest_step,
    thought_of,
)


def fixed_draw(world, family, **known):
    import random

    rng = random.Random(0)
    for _ in range(5000):
        task = world.draw_task(rng, family, held_out=None)
        if all(text in task.key for text in known.values()):
            return task
    raise AssertionError(known)


@pytest.fixture(scope="module")
def probes():
    return make_probes(World(0), count=6, shots=2, seed=1)


def test_questions_are_held_out_and_stand_as_documents_do(probes):
    zero = [probe for probe in probes if probe.kind == ZERO_SHOT]
    assert len(zero) == 6 * 6 and len({probe.prompt.split("asks:")[1].split("\n")[0] for probe in zero}) > 6
    for probe in zero:
        lines = probe.prompt.split("\n")
        assert " asks: " in lines[0] and lines[-1].endswith(" says:")
    counts = {kind: sum(probe.kind == kind for probe in probes) for kind in KINDS}
    assert counts == {ZERO_SHOT: 36, FEW_SHOT: 36, CHAIN: 24}
    assert make_probes(World(0), 6, 2, seed=1) == probes != make_probes(World(0), 6, 2, seed=2)


def test_solved_examples_are_others_of_the_family_with_true_answers(probes):
    by_kind = {}
    for probe in probes:
        by_kind.setdefault((probe.family, probe.kind), []).append(probe)
    for (_, kind), group in by_kind.items():
        for probe in group:
            assert probe.prompt.count(" asks: ") == probe.prompt.count(" says:") == (1 if kind == ZERO_SHOT else 3)
    for few, chain in zip(by_kind["addition", FEW_SHOT], by_kind["addition", CHAIN], strict=True):
        assert few.answer == chain.answer
        for line in [line for line in chain.prompt.split("\n") if " says: " in line]:
            sums = line.split(" says: ")[1].removesuffix(".").split(". ")
            for text in sums:
                left, right = text.removeprefix("The sum ").split(" is ")
                assert sum(map(int, left.split(" plus "))) == int(right)
            assert sums[-1].startswith("The sum")
            assert not is_held_out("addition " + sums[-1].removeprefix("The sum ").split(" is ")[0])


def test_thoughts_lead_to_the_answer():
    world = World(0)
    three = fixed_draw(world, "addition", three="plus", again=" plus 3 plus ")
    first, _, third = (int(word) for word in three.key.split()[1::2])
    assert (
        thought_of(three, world) == f"{first} plus 3 is {first + 3}. {first + 3} plus {third} is {first + 3 + third}."
    )
    fact = fixed_draw(world, "fact", about="owl home")
    assert world.facts["owl"]["colour"] in thought_of(fact, world) and "lives" not in thought_of(fact, world)
    listed = fixed_draw(world, "list")
    items = listed.input.split(", ")
    assert thought_of(listed, world) == f"The first item is {items[0]}. The last item is {items[-1]}."
    with pytest.raises(InputError, match="'harm' has no chain of thought"):
        thought_of(fixed_draw(world, "harm"), world)


@pytest.mark.slow
def test_too_many_questions_are_refused():
    with pytest.raises(InputError, match="different questions of the family 'fact', fewer than 310"):
        make_probes(World(0), 310, 1)


def test_scores_are_those_of_the_tokens_one_by_one(make_model, tokenizer):
    model = make_model()
    prompts = ["Mia asks: What is 1 plus 2?\nTom says:", "Go", "The colour of the fox"]
    answers = [" The sum 1 plus 2 is 3.", " red.", " is"]
    scores = answer_scores(model, tokenizer, prompts, answers, batch_tokens=64)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        likelihoods, hits = [], []
        for token in tokenizer(answer)["input_ids"]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            likelihoods.append(logits.log_softmax(-1)[token].item())
            hits.append(int(logits.argmax()) == token)
            ids.append(token)
        assert score["log_likelihood"] == pytest.approx(sum(likelihoods) / len(likelihoods), abs=1e-4)
        assert score["token_match"] == pytest.approx(sum(hits) / len(hits))
        assert score["exact_match"] == float(all(hits))
    with pytest.raises(InputError, match="answer 1 has no token"):
        answer_scores(model, tokenizer, ["a"], [""])


def test_exact_match_is_what_greedy_decoding_says(make_model, tokenizer):
    model, agreed = make_model(), 0
    for prompt in ("Say red.", "What is 1 plus 2?", "Go", "The colour of the fox is", "Mia has a"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        said = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :].tolist()
        answer = tokenizer.decode(said)
        if tokenizer(answer)["input_ids"] != said:
            continue  # a text that is broken into other tokens than were sampled
        agreed += 1
        right, wrong = answer_scores(model, tokenizer, [prompt] * 2, [answer, answer + " zebra"])
        assert right["exact_match"] == right["token_match"] == 1
        assert wrong["exact_match"] == 0 < wrong["token_match"] < 1
        assert right["log_likelihood"] > wrong["log_likelihood"]
    assert agreed


def test_a_chain_is_scored_after_what_the_model_thought(make_model, tokenizer):
    class Parrot(torch.nn.Module):
        """Says one sentence whatever it is asked, then the true answer."""

        def __init__(self):
            super().__init__()
            self.config, self.device, self.training = None, torch.device("cpu"), False
            self.script = tokenizer(" 1 plus 2 is 3. The sum 1 plus 2 is 3.")["input_ids"]
            self.generation_config = GenerationConfig()
            self.says = tokenizer("says:")["input_ids"][-1]

        def next_token(self, ids):
            spoken = ids[len(ids) - 1 - ids[::-1].index(self.says) + 1 :]
            return self.script[len(spoken)] if len(spoken) < len(self.script) else tokenizer.eos_token_id

        def forward(self, input_ids, use_cache=False):
            logits = torch.full((*input_ids.shape, len(tokenizer)), -10.0)
            for row, ids in enumerate(input_ids.tolist()):
                for place in range(len(ids)):
                    if self.says in ids[: place + 1]:
                        logits[row, place, self.next_token(ids[: place + 1])] = 10.0
            return type("Output", (), {"logits": logits})

        def generate(self, input_ids, max_new_tokens, **kwargs):
            ids = input_ids.tolist()
            for row in ids:
                for _ in range(max_new_tokens):
                    row.append(self.next_token(row))
            return torch.tensor(ids)

    prompt, answer = "Mia asks: What is 1 plus 2?\nTom says:", "The sum 1 plus 2 is 3."
    rows = run_probes(
        Parrot(),
        tokenizer,
        [
            Probe("addition", CHAIN, prompt, answer, thought="1 plus 2 is 3."),
            Probe("addition", ZERO_SHOT, prompt, answer),
        ],
    )
    assert [row["exact_match"] for row in rows] == [1.0, 0.0]
    assert rows[0]["log_likelihood"] > -1e-3 > rows[1]["log_likelihood"]


def test_running_all_probes_gives_all_rows(make_model, tokenizer, probes):
    model = make_model(max_position_embeddings=512)
    rows = run_probes(model, tokenizer, probes)
    assert [(row["family"], row["kind"]) for row in rows] == [(probe.family, probe.kind) for probe in probes]
    means = mean_scores(rows)
    assert set(means) == set(KINDS) and all(set(scores) == set(METRICS) for scores in means.values())
    zero = [row for row in rows if row["kind"] == ZERO_SHOT]
    assert means[ZERO_SHOT]["log_likelihood"] == pytest.approx(sum(row["log_likelihood"] for row in zero) / len(zero))


def test_a_smooth_rise_per_token_leaps_when_all_tokens_must_be_right():
    """Schaeffer et al. 2023, section 2: accuracy on L tokens is p^L, a leap where p itself rises evenly."""
    rows = []
    for step in range(1, 10):
        p = step / 10
        cells = [
            {"family": "addition", "kind": kind, "exact_match": p**10, "token_match": p, "log_likelihood": p - 1}
            for kind in KINDS
        ]
        rows.append(ProbedRun(f"run {step}", 10.0**step, 10.0 ** (2 * step), 3 - p, cells))
    found = Emergence(rows[::-1])
    metrics = found.metrics()
    assert metrics["zero_shot_token_match_sharpest_step"] == pytest.approx(1 / 8)
    assert metrics["zero_shot_exact_match_sharpest_step"] == pytest.approx((0.9**10 - 0.8**10) / (0.9**10 - 0.1**10))
    assert metrics["few_shot_exact_match"] == pytest.approx(0.9**10)
    tables, plots = found.tables(), found.plots()
    assert [row["run"] for row in tables["Zero-shot probes by family"]] == [f"run {step}" for step in range(1, 10)]
    assert set(plots) == {f"probe_{metric}_by_{stem}" for metric in METRICS for stem in ("prompt", "family")}


def test_the_sharpest_step():
    assert best_so_far([1, 3, 2, 5]) == [1, 3, 3, 5]
    assert sharpest_step([0, 0, 1, 1]) == 1 and sharpest_step([0, 1, 2, 3, 4]) == 0.25
    assert sharpest_step([2, 1, 0]) == 0 == sharpest_step([1]) == sharpest_step([1, 3, 1])
