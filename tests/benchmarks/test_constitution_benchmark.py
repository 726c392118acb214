"""benchmarks/constitution.py: its KL against an enumeration, its clock, and DPO within a budget."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
END, PAD, WORDS = 0, 1, 6
FIGURES = {"helpful_right": 0.5, "compliance_new_harms": 0.1, "compliance_new_phrasing": 0.3}


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import constitution_arms

    return constitution_arms


@pytest.fixture
def benchmark(monkeypatch, arms):
    # A recipe has this name, too.
    monkeypatch.delitem(sys.modules, "constitution", raising=False)
    import constitution

    yield constitution
    monkeypatch.delitem(sys.modules, "constitution")


def logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def enumerated_kl(model, reference, prompt):
    """KL of the distributions of whole responses of at most two tokens: the sum of p log(p / q) over all of them."""
    responses = [(END,), *((first, second) for first, second in itertools.product(range(1, WORDS), range(WORDS)))]
    total = 0.0
    for response in responses:
        both = [
            sum(
                logprobs(each, [*prompt, *response])[len(prompt) - 1 + place, token].item()
                for place, token in enumerate(response)
            )
            for each in (model, reference)
        ]
        total += math.exp(both[0]) * (both[0] - both[1])
    return total


@pytest.mark.slow
def test_the_kl_is_that_of_whole_responses(arms, make_model):
    sizes = {
        "vocab_size": WORDS,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": None,
        "initializer_range": 0.4,
    }
    model, reference = (make_model(seed, **sizes) for seed in (0, 1))
    # Of unlike lengths: the shorter one is padded on the left.
    prompts = ([2, 3], [4, 2, 5, 3, 2])
    exact = [enumerated_kl(model, reference, prompt) for prompt in prompts]
    found = torch.tensor(arms.kl_of_tokens(model, reference, prompts * 400, [END], PAD, 2, batch_size=400)).view(-1, 2)
    errors = found.std(0) / math.sqrt(len(found))
    assert min(exact) > 0.1 and (errors < 0.1 * found.mean(0)).all()
    assert ((found.mean(0) - torch.tensor(exact)).abs() < 4 * errors).all(), (found.mean(0), exact)
    assert max(map(abs, arms.kl_of_tokens(model, model, prompts, [END], PAD, 2))) < 1e-6


def test_time_in_recipes_is_told_from_sampling(arms, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(arms.time, "process_time", lambda: clock.now)

    def train(self):
        clock.now += 3

    def recipe(course, name):
        clock.now += 2  # loading
        arms.Trainer.train(None)
        clock.now += 4  # evaluation
        return {}

    def step():
        clock.now += 10
        course.run("sl")
        clock.now += 1

    monkeypatch.setattr(arms.Trainer, "train", train)
    monkeypatch.setattr(arms.ConstitutionCourse, "run", recipe)
    course = arms.TimedCourse({}, {}, None)
    assert arms._rest(course, step) == 11
    assert (course.whole, course.training) == ({"sl": 9}, {"sl": 3})
    assert arms.Trainer.train is train


def test_pairs_that_do_not_differ_are_left_out(arms, tmp_path):
    said = [[{"role": "assistant", "content": text}] for text in ("I will not.", "Sure.")]
    rows = [{"prompt": [], "chosen": said[0], "rejected": each, "turns": []} for each in said]
    (tmp_path / "revisions").mkdir()
    (tmp_path / "revisions" / "revisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert arms.pairs_of_revisions(tmp_path) == [{"prompt": [], "chosen": said[0], "rejected": said[1]}]


@pytest.mark.slow
def test_dpo_takes_the_steps_that_fit_and_learns_the_pairs(arms, saved, tmp_path):
    from trl import SFTConfig

    prompts = [[{"role": "user", "content": f"Say {word}."}] for word in ("one", "two", "three", "four")]
    refusal, help_ = ([{"role": "assistant", "content": text}] for text in ("I will not.", "Sure, first take it."))
    pairs = [{"prompt": prompt, "chosen": refusal, "rejected": help_} for prompt in prompts]
    like = SFTConfig(str(tmp_path), per_device_train_batch_size=2, warmup_steps=1, use_cpu=True, bf16=False)
    dpo = arms.DPO(saved, pairs, like)
    # The reference takes two thirds of a second for two batches; the clock does not stop this run.
    took = dpo.run(tmp_path / "dpo", 1e-3, 1e6 + 2 / 3 * 1e5, 1e5)
    assert (took["steps"], took["epochs"], took["learning_rate"]) == (10, 5, 1e-3)
    assert took["cpu_seconds"] > 0

    def margin(folder):
        said = arms.load(folder)
        texts = [
            said.tokenizer.apply_chat_template([*prompts[0], *answer], return_tensors="pt", return_dict=True)[
                "input_ids"
            ]
            for answer in (refusal, help_)
        ]
        with torch.no_grad():
            logs = [said.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum() for ids in texts]
        return (logs[0] - logs[1]).item()

    assert margin(tmp_path / "dpo") > margin(saved) + 1
    # A budget that is spent after the first step.
    assert dpo.run(tmp_path / "short", 1e-3, 1e-6, 1e-7)["steps"] == 1


def test_the_page_takes_means_over_runs(benchmark):
    def arm(value, **more):
        return {**{name: value for name in benchmark.FIGURES}, "rude_se": 0.03, "cpu_seconds": 10.0, **more}

    mean = benchmark.mean_arm([arm(0.2), arm(0.4)])
    assert mean["rude"] == pytest.approx(0.3) and mean["rude_se"] == pytest.approx(math.hypot(0.03, 0.03) / 2)
    assert benchmark.score_of(FIGURES) == pytest.approx(0.3)
    sweep = {"dpo_sl": [arm(0.2, learning_rate=0.1, steps=7, epochs=1.0)]}
    found = {
        "seed 1": {"helpful": arm(0.9)},
        "seed 2": {"helpful": arm(0.2), "dpo_sl": arm(0.2)},
        "seed 3": {"helpful": arm(0.4)},
    }
    text = benchmark.page(found, benchmark.settings_table(sweep, {"dpo_sl": 0.1}), ["- a note"])
    mean, _, second, third, _ = (part.splitlines() for part in text.split("## ")[1:])
    # Of arms that all runs have, without the run that the rates were chosen on.
    assert mean[0] == "Mean of seed 2, seed 3" and len(mean) == 6 and "0.300 ± 0.021" in mean[4]
    assert len([line for line in second if line.startswith("|")]) == 4 and "0.400 ± 0.030" in third[4]
    assert "| 0.1 " in text and "| yes " in text and text.endswith("- a note\n")


def test_rates_are_chosen_on_the_first_run_alone(benchmark, monkeypatch, tmp_path, capsys):
    best = {1: 0.2, 2: 0.3, 3: 0.3}
    asked: list[tuple[int, str, float]] = []

    class Fake:
        def __init__(self, args, run, folder, rl_like):
            self.seed, self.rl_like = int(run.name), rl_like
            self.ours = SimpleNamespace(no_rl="", same_weights=True, seed=self.seed)
            assert rl_like is None if self.seed == 1 else rl_like.seed == 1

        def of_ours(self):
            return {name: {**dict.fromkeys(benchmark.FIGURES, 0.0), "cpu_seconds": 1.0} for name in ("helpful", "sl")}

        def of_dpo(self, name, rate):
            asked.append((self.seed, name, rate))
            values = dict.fromkeys(benchmark.FIGURES, 0.0) | {"helpful_right": float(rate == best[self.seed])}
            return {**values, "cpu_seconds": 1.0, "learning_rate": rate, "steps": 1, "epochs": 1.0}

    monkeypatch.setattr(benchmark, "Comparison", Fake)
    monkeypatch.setattr(benchmark, "arguments_of", lambda run: SimpleNamespace(seed=int(run.name)))
    words = ["--runs", "1", "2", "3", "--peers", "dpo_sl", "dpo_rl", "--learning_rates", "0.1", "0.2", "0.3"]
    benchmark.main([*words, "--long_learning_rates", "0.5", "--output_dir", str(tmp_path)])
    later = [each for each in asked if each[0] > 1]
    assert later == [(seed, name, rate) for seed in (2, 3) for name, rate in (("dpo_sl", 0.2), ("dpo_rl", 0.5))]
    text = (tmp_path / "constitution.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n") and "## Mean of seed 2, seed 3" in text
    assert [line.split("|")[3].strip() for line in text.splitlines() if "| 0.2 " in line] == ["yes"]


def test_what_is_no_finished_run_is_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match=r"report.json: no such file; expected the output folder of a finished"):
        benchmark.main(["--runs", str(tmp_path)])
    report = {"stage": "constitution", "arguments": {"model_name_or_path": "own"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="on the embedded world, without a named model"):
        benchmark.main(["--runs", str(tmp_path)])
