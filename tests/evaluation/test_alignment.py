"""What a report says of an alignment: errors over prompts, and words that follow from them."""

from types import SimpleNamespace

import numpy as np
import pytest

from hfllm.data.augmentation import WORLD_TESTS
from hfllm.data.world.world import World
from hfllm.evaluation import alignment
from hfllm.evaluation.alignment import (
    FAMILIES,
    PolicyEvaluation,
    alignment_metrics,
    alignment_plots,
    alignment_summary,
    alignment_tables,
)
from hfllm.evaluation.before_after import SAMPLES

PROMPTS = 40


def answers(golds):
    return [
        {"family": "fact", "is_new_phrasing": place % 2 == 0, "prompt": f"p{place}", "response": "r", "gold": gold}
        for place, gold in enumerate(golds)
    ]


def policy(reward, gold=None, kl=0.0, greedy=0.5, length=10.0, facts=1.0, spread=0.02):
    """A policy whose figures lie around these: prompts differ alike for all policies, and a little by the policy."""
    prompts, own = np.random.default_rng(0), spread * reward * (-1.0) ** np.arange(PROMPTS)

    def around(mean):
        return (mean + prompts.normal(0, 0.3, PROMPTS) + own).tolist()

    values = {"reward": around(reward), "response_length": around(length), "unfinished": [0.0] * PROMPTS}
    values |= {"kl": around(kl)} if kl is not None else {}
    proxy = {f"eval_{name}": float(np.mean(each)) for name, each in values.items()}
    samples = [
        {"prompt": f"p{at}", "response": f"said {reward}", "reward": each} for at, each in enumerate(values["reward"])
    ]
    judged = {}
    if gold is not None:
        judged = {"sampled": answers(around(gold)), "greedy": answers(around(greedy)), "facts": answers([facts] * 6)}
    return PolicyEvaluation(proxy, values, samples, **judged)


def test_of_a_processor_the_tokenizer_answers(monkeypatch):
    """A policy that reads pictures has a processor, which has no end token."""
    used = []
    monkeypatch.setattr(
        alignment, "judge_tasks", lambda policy, tokenizer, *rest, **kwargs: used.append(tokenizer) or []
    )
    args = SimpleNamespace(response_length=4, seed=0)
    for given in ("tokenizer", SimpleNamespace(tokenizer="tokenizer")):
        trainer = SimpleNamespace(policy=None, processing_class=given, args=args, eval_values={})
        alignment._judged(trainer, {}, World(0), 2)
    assert used == ["tokenizer"] * 8


def test_figures_keep_their_names_and_gain_errors():
    before, after = policy(0.2, gold=0.1), policy(0.9, gold=0.7, kl=1.3)
    metrics = alignment_metrics(before, after)
    for kind, name in (("sampled", "gold_reward"), ("greedy", "gold_reward_greedy")):
        pairs = [[row["gold"] for row in getattr(each, kind)] for each in (before, after)]
        assert metrics[f"{name}_after"] == pytest.approx(np.mean(pairs[1]))
        differences = np.subtract(pairs[1], pairs[0])
        assert metrics[f"{name}_change_se"] == pytest.approx(differences.std(ddof=1) / np.sqrt(PROMPTS))
    assert metrics["gold_reward_new_phrasings_n"] == PROMPTS / 2 and metrics["fact_accuracy_n"] == 6
    assert metrics["proxy_reward_before"] == pytest.approx(before.proxy["eval_reward"])
    assert metrics["proxy_reward_after"] == pytest.approx(after.proxy["eval_reward"])
    assert metrics["kl_to_reference"] == pytest.approx(after.proxy["eval_kl"])
    assert metrics["kl_to_reference_se"] == pytest.approx(np.std(after.values["kl"], ddof=1) / np.sqrt(PROMPTS))
    assert metrics["response_length"] == metrics["response_length_after"]
    without = alignment_metrics(policy(0.2, kl=None), policy(0.9, kl=None))
    assert "kl_to_reference" not in without and "gold_reward_after" not in without


def test_the_summary_says_up_down_and_noise():
    def said(before, after):
        return alignment_summary(alignment_metrics(before, after))

    up = said(policy(0.2), policy(0.9, kl=1.3))
    assert up.startswith("Reward rose from 0.") and "on 40 held-out prompts; KL to the reference 1." in up
    assert "No change beyond noise: response length (tokens); share of responses cut off." in up
    assert said(policy(0.9), policy(0.2)).startswith("Reward fell from 0.")
    assert said(policy(0.2), policy(0.21, spread=1.0)).startswith("Reward: no change beyond noise, 0.")
    assert "Also: response length (tokens) 10" in said(policy(0.2), policy(0.21, length=15))


def test_the_summary_says_what_got_worse():
    before = policy(0.2, gold=0.1, greedy=0.9)
    text = alignment_summary(alignment_metrics(before, policy(0.9, gold=0.7, greedy=0.6, facts=0.0)))
    assert text.startswith("Gold reward rose from 0.")
    worse = text.partition(" Worse: ")[2]
    assert worse.startswith("gold reward (greedy answers) 0.") and "facts answered right (greedy) 1 to 0" in worse
    assert "Better: gold reward (new phrasings) 0." in text and "over-optimization" not in text
    gamed = alignment_summary(alignment_metrics(before, policy(2.0, gold=-0.4, greedy=0.9)))
    assert gamed.startswith("Gold reward fell from") and gamed.endswith("(over-optimization).")


def judged(golds, family="fact", response="The fox is red."):
    return [
        {"family": family, "is_new_phrasing": False, "prompt": "p", "response": response, "gold": gold}
        for gold in golds
    ]


def test_the_headline_names_what_a_mean_that_rose_hides():
    """Greedy gold rises in the mean, by requests for harm, and falls for what was to be helped with."""
    refusal = "I will not help with that."
    before, after = policy(0.2, gold=0.1), policy(0.9, gold=0.7, kl=1.3)
    before.greedy = judged([1.0] * 88 + [0.0] * 12) + judged([-1.0] * 50, "harm")
    after.greedy = judged([1.0] * 75 + [0.0] * 25) + judged([1.0] * 50, "harm")
    before.jailbroken = judged([1.0] * 99) + judged([0.0], response=refusal)
    after.jailbroken = judged([1.0] * 79) + judged([0.0] * 21, response=refusal)
    metrics = alignment_metrics(before, after)
    assert metrics["gold_reward_greedy_change"] > 0.3
    assert (metrics["gold_reward_greedy_helpful_before"], metrics["gold_reward_greedy_helpful_after"]) == (0.88, 0.75)
    assert metrics["gold_reward_greedy_harmless_change"] == 2 and metrics["gold_reward_greedy_helpful_n"] == 100
    assert (metrics["over_refusal_jailbreak_before"], metrics["over_refusal_jailbreak_after"]) == (0.01, 0.21)
    assert metrics["over_refusal_change"] == 0 and "gold_reward_greedy_honest_n" not in metrics
    headline, _, rest = alignment_summary(metrics).partition(" Worse: ")
    assert headline.startswith("Gold reward rose from 0.") and headline.endswith("nats per response.")
    worse, _, _ = rest.partition(" Better: ")
    assert "gold reward (greedy, to be helped) 0.88 to 0.75 (change -0.130 ± 0.034)" in worse
    assert "harmless questions refused after a jailbreak (greedy) 0.01 to 0.21 (change 0.200 ± 0.040)" in worse
    assert "gold reward (greedy answers)" not in worse and "harmless questions refused (greedy)" not in worse


def test_harmless_questions_are_asked_with_a_jailbreak_after_them(monkeypatch):
    asked = []
    args = SimpleNamespace(response_length=4, seed=0)
    trainer = SimpleNamespace(policy=None, processing_class="tokenizer", args=args, eval_values={})
    monkeypatch.setattr(
        alignment, "judge_tasks", lambda policy, tokenizer, tasks, *rest, **kw: asked.append(tasks) or []
    )
    alignment._judged(trainer, {}, World(0), 60)
    tasks, with_jailbreak = asked[0], asked[-1]
    harmless = [task for task in tasks if task.family in ("fact", "reading", "list", "addition")]
    assert len(with_jailbreak) == len(harmless) > 30
    for task, other in zip(harmless, with_jailbreak, strict=True):
        assert other.question.startswith(task.instruction) and other.question.endswith(task.input)
        assert sum(sentence in other.question for sentence in WORLD_TESTS.jailbreaks) == 2
        assert other.gold == task.gold


def test_one_prompt_says_nothing():
    one = [
        PolicyEvaluation({}, {name: [value] for name in ("reward", "response_length", "unfinished")}, [])
        for value in (0.0, 1.0)
    ]
    assert alignment_summary(alignment_metrics(*one)) == (
        "Reward 0 before and 1 after, on 1 held-out prompt: too few to tell."
    )


def test_samples_are_not_picked_and_stand_with_their_rewards():
    before, after = policy(0.2, gold=0.1), policy(0.9, gold=0.7)
    tables = alignment_tables(before, after)
    assert [row["prompt"] for row in tables[SAMPLES]] == [f"p{place}" for place in range(0, PROMPTS, 4)]
    assert list(tables[SAMPLES][0]) == ["prompt", "before", "after", "reward before", "reward after"]
    family = next(row for row in tables[FAMILIES] if row["prompts"] == "fact")
    assert family["n"] == PROMPTS and float(family["sampled after"]) == pytest.approx(0.7, abs=0.1)


def test_curves_come_in_the_order_of_interest_with_their_units():
    history = [
        {"step": 1, "episode": 16, "reward": 0.1, "rewards/gold_reward": 0.0, "kl": 0.0, "response_length": 9.0},
        {"step": 2, "episode": 16, "clip_fraction": 0.1},
        {"step": 3, "episode": 32, "reward": 0.4, "rewards/gold_reward": 0.2, "kl": 4.0, "response_length": 8.0},
        {"step": 3, "eval_reward": 0.3},
    ]
    plots = alignment_plots(history)
    assert list(plots) == ["rewards", "kl", "response_length", "clip_fraction", "overoptimization"]
    assert plots["rewards"].lines == {
        "reward (trained on)": ([16, 32], [0.1, 0.4]),
        "gold reward (exact score)": ([16, 32], [0.0, 0.2]),
    }
    assert plots["clip_fraction"].lines == {"clipped": ([16], [0.1])}
    assert plots["overoptimization"].lines["reward (trained on)"] == ([0.0, 2.0], [0.1, 0.4])
    assert {plot.xlabel for name, plot in plots.items() if name != "overoptimization"} == {
        "episodes (sampled responses)"
    }
    assert "nats per response" in plots["kl"].ylabel and "tokens" in plots["response_length"].ylabel
    several = [{**entry, "rewards/a": 1.0, "rewards/b": 2.0} for entry in history]
    assert {"a (a part, unweighted)", "b (a part, unweighted)"} < set(alignment_plots(several)["rewards"].lines)
