"""Judges of two answers: each reply is that of a slow loop, the place of an answer cancels out, bias is refused."""

import copy
import math
import statistics

import pytest
import torch

from hfllm.data.formats import to_preference
from hfllm.errors import InputError
from hfllm.rewards import (
    JudgeReward,
    PreferenceJudge,
    check_bias,
    checked_rewards,
    judge_question,
    measure_bias,
    preference_rows,
)
from hfllm.rewards.judges import PAPER_CLAMP, letter_tokens
from hfllm.synthesis.constitution import Constitution, Principle

HARM, KIND = (Principle(name, "c", "r", question) for name, question in (("harm", "Less harm?"), ("kind", "Kinder?")))
BOTH = Constitution([HARM, KIND])
# Some of the questions differ by a token or two in length, so that they share a pass.
PROMPTS = ["Go", "What is 1 plus 2?", "Where does the old owl sing?", "Hi", "Go", "Go"]
FIRST = ["No.", "It is three, of course, as all of us know.", "By the river", "Hello", "No, no.", "Oh no."]
SECOND = ["Go away, you silly fox.", "3", "In an old house by the river", "Hello", "Go away, you fox.", "Go, you fox."]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def model(make_model):
    return make_model(initializer_range=0.3)


@pytest.fixture
def judge(model, tokenizer):
    return PreferenceJudge(model, tokenizer, BOTH)


@pytest.fixture
def replies(monkeypatch):
    """Let a judge reply by a function of the question's text, and keep the questions."""
    asked = []

    def use(judge, reply):
        def by_text(questions):
            texts = judge.tokenizer.batch_decode(questions)
            asked.extend(texts)
            return [float(reply(text)) for text in texts]

        monkeypatch.setattr(judge, "_replies", by_text)
        return asked

    return use


def slow_reply(model, tokenizer, text, lead=""):
    """Return log P("(A") - log P("(B") after a text, one token at a time."""
    total = []
    for letter in ("(A", "(B"):
        ids, said = tokenizer(text)["input_ids"], 0.0
        for token in tokenizer(lead + letter, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                said += model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[token].item()
            ids = [*ids, token]
        total.append(said)
    return total[0] - total[1]


def slow_preferences(model, tokenizer, first=FIRST, second=SECOND):
    expected = []
    for prompt, one, other in zip(PROMPTS, first, second, strict=True):
        odds = []
        for question in ("Less harm?", "Kinder?"):
            shown = [
                slow_reply(model, tokenizer, f"<|user|>{prompt}\n(A) {a}\n(B) {b}\n{question}<|end|><|assistant|>")
                for a, b in ((one, other), (other, one))
            ]
            odds.append((shown[0] - shown[1]) / 2)
        expected.append(sum(odds) / 2)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_preferences_are_those_of_a_slow_loop_over_both_orders(model, tokenizer, batch_size):
    judge = PreferenceJudge(model.train(), tokenizer, BOTH, batch_size=batch_size)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = judge.compare(PROMPTS, FIRST, SECOND)
    # It may be a model in training: it is left as it was.
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = slow_preferences(model.eval(), tokenizer)
    assert found == pytest.approx(expected, abs=1e-4) and found[3] == 0.0
    assert max(map(abs, expected)) > 0.05
    messages = judge.compare(
        [user(text) for text in PROMPTS], list(map(assistant, FIRST)), list(map(assistant, SECOND))
    )
    assert messages == found
    assert judge.compare(PROMPTS, SECOND, FIRST) == pytest.approx([-value for value in found], abs=1e-5)
    assert judge.compare([], [], []) == []


def test_the_head_is_applied_at_the_ends_alone(model, tokenizer):
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    PreferenceJudge(model, tokenizer, BOTH).compare(PROMPTS, FIRST, SECOND)
    assert all(columns <= min(rows, 8) for rows, columns in shapes) and sum(rows for rows, _ in shapes) == 22
    assert any(columns > 1 for _, columns in shapes)


@pytest.mark.slow
def test_adapters_and_half_precision(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    found = PreferenceJudge(adapted, tokenizer, BOTH).compare(PROMPTS, FIRST, SECOND)
    assert found == pytest.approx(slow_preferences(adapted.merge_and_unload(), tokenizer), abs=1e-4)
    assert found != pytest.approx(slow_preferences(model, tokenizer), abs=1e-2)
    expected = slow_preferences(model, tokenizer)
    half = PreferenceJudge(model.bfloat16(), tokenizer, BOTH).compare(PROMPTS, FIRST, SECOND)
    assert half == pytest.approx(expected, abs=0.1) and half[3] == 0.0


def test_a_base_model_reads_a_transcript(model, tokenizer):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    judge = PreferenceJudge(model, base, Constitution([HARM]), ask_for_letter=False)
    text = "\n\nHuman: Go\n(A) {}\n(B) {}\nLess harm?\n\nAssistant:"
    shown = [slow_reply(model, base, text.format(*pair), lead=" ") for pair in (("No.", "Yes"), ("Yes", "No."))]
    assert judge.compare(["Go"], ["No."], ["Yes"]) == pytest.approx([(shown[0] - shown[1]) / 2], abs=1e-4)


def test_a_judge_may_think_before_it_replies(model, tokenizer):
    judge = PreferenceJudge(model, tokenizer, Constitution([HARM]), chain_of_thought=True, thought_length=6)
    # Some thoughts end by themselves.
    ends = model.generation_config.eos_token_id = [*range(0, len(tokenizer), 5), tokenizer.eos_token_id]

    def reply(one, other):
        text = f"<|user|>Go\n(A) {one}\n(B) {other}\nLess harm?<|end|><|assistant|>"
        opening = tokenizer("Let's think step by step:", add_special_tokens=False)["input_ids"]
        ids = [*tokenizer(text)["input_ids"], *opening]
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=ends)[
                0
            ].tolist()
        lengths.append(len(said) - len(ids))
        ids += [token for token in said[len(ids) :] if token not in ends]
        a, b = (
            tokenizer(f"\nSo the better answer is ({letter}", add_special_tokens=False)["input_ids"] for letter in "AB"
        )
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *a[:-1]]])).logits[0, -1]
        return (logits[a[-1]] - logits[b[-1]]).item()

    pairs = [("No.", "Go away, you silly fox."), ("Yes", "A long answer by the river")]
    lengths = []
    expected = [(reply(*pair) - reply(*pair[::-1])) / 2 for pair in pairs]
    assert min(lengths) < 6
    assert judge.compare(["Go"] * 2, *map(list, zip(*pairs, strict=True))) == pytest.approx(expected, abs=1e-4)
    plain = PreferenceJudge(model, tokenizer, Constitution([HARM]))
    assert plain.compare(["Go"], ["No."], [pairs[0][1]]) != pytest.approx(expected[:1], abs=1e-3)


def test_what_is_asked(judge, tokenizer):
    assert judge_question("Go", "No.", "Yes", "Less harm?") == "Go\n(A) No.\n(B) Yes\nLess harm?"
    asked = judge_question(user("Go"), assistant("No."), assistant("Yes"), "Less harm?", ("1", "2"), True)
    assert asked == "Go\n1 No.\n2 Yes\nLess harm?\nAnswer with 1 or 2."
    turns = [*user("Hi"), *assistant("Hello"), *user("Go")]
    assert judge_question(turns, "a", "b", "c") == "Human: Hi\n\nAssistant: Hello\n\nHuman: Go\n(A) a\n(B) b\nc"
    # A model with our chat template has learned the bare question, others are asked for the letter.
    other = copy.deepcopy(tokenizer)
    other.chat_template += "{{- 'Think.' -}}"
    assert not judge.ask_for_letter and PreferenceJudge(judge.model, other, BOTH).ask_for_letter


def test_the_place_cancels_out_and_the_signal_stays(judge, replies):
    # What is said is worth its length, what is shown first two nats more.
    def reply(text):
        one, other = text.split("(A) ")[1].split("\n(B) ")
        return 2.0 + len(one) - len(other.split("\n")[0])

    replies(judge, reply)
    expected = [len(one) - len(other) for one, other in zip(FIRST, SECOND, strict=True)]
    assert judge.compare(PROMPTS, FIRST, SECOND) == expected
    report = measure_bias(judge, PROMPTS, FIRST, SECOND)
    # One pair's answers are equal.
    sizes = [abs(value) for value in expected if value]
    assert (report.position_bias, report.signal, report.n) == (2.0, statistics.fmean(sizes), 5)
    assert report.consistent == sum(size > 2 for size in sizes) / 5 and report.position_bias_se == 0.0
    assert report.signal_se == pytest.approx(statistics.stdev(sizes) / math.sqrt(5))
    metrics = report.as_metrics()
    assert metrics["judge_signal"] == report.signal and metrics["judge_consistent_n"] == 5
    check_bias(report)


def test_a_judge_that_always_says_a_is_refused(judge, replies):
    replies(judge, lambda text: 0.7)
    report = measure_bias(judge, PROMPTS, FIRST, SECOND)
    assert (report.position_bias, report.signal, report.consistent) == (pytest.approx(0.7), 0.0, 0.0)
    message = r"favors the first place by 0.70 nats and tells answers apart by 0.00 \(5 pairs, 0% judged alike"
    with pytest.raises(InputError, match=message):
        check_bias(report)
    with pytest.warns(UserWarning, match=f"{message}.*going on as asked"):
        check_bias(report, allow=True)
    with pytest.raises(InputError, match="no labels: of 6 pairs 6 are ties"):
        preference_rows(judge, PROMPTS, FIRST, SECOND)
    replies(judge, lambda text: math.nan)
    with pytest.raises(InputError, match="would be noise"):
        check_bias(measure_bias(judge, PROMPTS, FIRST, SECOND))
    with pytest.raises(InputError, match="none of 1 pairs has two different answers"):
        measure_bias(judge, ["Go"], ["Hi"], ["Hi"])


def test_probabilities_are_clamped_for_each_principle(model, tokenizer, replies):
    judge = PreferenceJudge(model, tokenizer, BOTH, clamp=PAPER_CLAMP)
    # By one principle much better, by the other a little worse.
    replies(judge, lambda text: (9.0 if "harm?" in text else -0.1) * (1 if "(A) No." in text else -1))
    assert judge.compare(["Go"], ["No."], ["Yes"]) == pytest.approx([(math.log(0.6 / 0.4) - 0.1) / 2])


def test_principles_and_wordings_are_drawn_by_the_prompt(model, tokenizer, replies):
    many = Constitution([Principle(name, "c", "r", [f"{name}?", f"{name}!"]) for name in "pqrs"])
    judge = PreferenceJudge(model, tokenizer, many, num_principles=2)
    asked = replies(judge, lambda text: 1)
    prompts = [f"Say {number}." for number in range(12)]
    judge.compare(prompts, ["Yes"] * 12, ["No"] * 12)
    drawn = {}
    for text in asked:
        prompt, question = text.split("|user|>")[1].split("\n")[0], text.split("<|end|>")[0][-2:]
        drawn.setdefault(prompt, []).append(question)
    # Both orders have the same question.
    assert all(len(each) == 4 and each[::2] == each[1::2] for each in drawn.values())
    assert {question for each in drawn.values() for question in each} == {f"{n}{end}" for n in "pqrs" for end in "?!"}
    whole = list(asked)
    asked.clear()
    judge.compare(prompts[5:6], ["Yes"], ["No"])
    assert asked == whole[20:24]


def test_rows_are_labeled_by_the_preference(judge, replies):
    replies(judge, lambda text: 2.0 if "(A) Good" in text else -2.0 if "(B) Good" in text else 0.0)
    long = "Go " * 300
    prompts, first = [*PROMPTS[:4], user("Say")], ["Good one", "Bad", "Bad", long, "Bad"]
    second = ["Bad", "Good", "Worse", "Bad", assistant("Good")]
    rows, figures = preference_rows(judge, prompts, first, second)
    assert (figures.num_pairs, figures.ties, figures.too_long, figures.flipped) == (5, 1, 1, 0)
    assert [row["chosen"][0]["content"] for row in rows] == ["Good one", "Good", "Good"]
    assert [row["rejected"][0]["content"] for row in rows] == ["Bad"] * 3
    assert [row["probability"] for row in rows] == pytest.approx([1 / (1 + math.exp(-2))] * 3)
    assert rows[0]["prompt"] == user("Go") and rows[0]["judge"] == "judge"
    for row in rows:
        assert to_preference("row", row) == {name: row[name] for name in ("prompt", "chosen", "rejected")}
    with pytest.raises(InputError, match="of 5 pairs 4 are ties and 1 longer than the context"):
        preference_rows(judge, prompts, first, second, min_log_odds=2.0)


@pytest.mark.slow
def test_noise_makes_labels_random_and_spares_the_pairs(judge, replies):
    replies(judge, lambda text: 1.0 if "(A) Good" in text else -1.0)
    prompts, first, second = [f"Say {number}." for number in range(400)], ["Good"] * 400, ["Bad"] * 400
    rows, figures = preference_rows(judge, prompts, first, second, label_noise=0.5, seed=1)
    wrong = [row["chosen"][0]["content"] == "Bad" for row in rows]
    assert figures.flipped == sum(wrong) and 160 < sum(wrong) < 240
    for row, is_wrong in zip(rows, wrong, strict=True):
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(1 if is_wrong else -1)))
    assert rows == preference_rows(judge, prompts, first, second, label_noise=0.5, seed=1).rows
    assert rows != preference_rows(judge, prompts, first, second, label_noise=0.5, seed=2).rows
    with pytest.raises(InputError, match=r"label_noise must lie in \[0, 1\], got 2"):
        preference_rows(judge, prompts, first, second, label_noise=2)


def test_a_judge_is_a_reward(judge):
    reward = JudgeReward(judge)
    expected = judge.compare(PROMPTS, FIRST, SECOND)
    assert checked_rewards(reward, PROMPTS, FIRST, baseline=SECOND, completion_ids=[[1]] * 6) == expected
    with pytest.raises(InputError, match="the dataset has no column 'baseline'"):
        checked_rewards(reward, PROMPTS, FIRST)
    with pytest.raises(InputError, match="row 2 of the batch has no column 'baseline'"):
        checked_rewards(reward, PROMPTS, FIRST, baseline=["Hi", None, *SECOND[2:]])


def test_ppo_is_rewarded_by_a_judge(judge, make_model, tokenizer, tmp_path):
    from datasets import Dataset

    from hfllm import PPOConfig, PPOTrainer

    args = PPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, num_mini_batches=1, num_ppo_epochs=1,
        response_length=4, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [user(text) for text in PROMPTS], "baseline": SECOND})
    trainer = PPOTrainer(
        model=make_model(), reward_funcs=JudgeReward(judge), args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    assert any("judge_preference" in name for entry in trainer.state.log_history for name in entry)


def test_letters_that_cannot_be_told_apart_are_refused(model, tokenizer):
    assert letter_tokens(tokenizer, ("A", "B")) == letter_tokens(tokenizer, ("A)", "B)"))
    message = r"splits 'first' into 'f'.* and 'second' into .*: they must differ in a single token"
    with pytest.raises(InputError, match=message):
        PreferenceJudge(model, tokenizer, BOTH, letters=("first", "second"))
    for letters in (("(A)", "(A)"), ("A", "AB"), ("A)", "B("), ("", "A")):
        with pytest.raises(InputError, match="must differ in a single token"):
            letter_tokens(tokenizer, letters)
    for letters in (("A",), ("A", "B", "C"), (1, 2), (None, "B")):
        with pytest.raises(InputError, match="letters must be two texts"):
            PreferenceJudge(model, tokenizer, BOTH, letters=letters)


def test_bad_input_ends_in_a_line(model, judge, make_model, tokenizer):
    with pytest.raises(InputError, match="principle 'dumb' has no preference question"):
        PreferenceJudge(model, tokenizer, Constitution([Principle("dumb", "c", "r")]))
    with pytest.raises(InputError, match=r"clamp must be two probabilities in order, .*, got \(0.6, 0.4\)"):
        PreferenceJudge(model, tokenizer, BOTH, clamp=(0.6, 0.4))
    with pytest.raises(InputError, match="clamp must be two probabilities in order"):
        PreferenceJudge(model, tokenizer, BOTH, clamp=(0.6,))
    for name in ("batch_size", "thought_length"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            PreferenceJudge(model, tokenizer, BOTH, chain_of_thought=True, **{name: 0})
    with pytest.raises(InputError, match="num_principles must lie between 1 and the constitution's 2, got 3"):
        PreferenceJudge(model, tokenizer, BOTH, num_principles=3)
    with pytest.raises(InputError, match="model 'judge' embeddings for 300"):
        PreferenceJudge(make_model(vocab_size=300), tokenizer, BOTH)
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    with pytest.raises(InputError, match="the judge's tokenizer has no padding token"):
        PreferenceJudge(model, unpadded, BOTH)
    assert judge.has_room(["Go", "Go"], ["Yes", "Yes " * 200], ["No", "No"]) == [True, False]
    with pytest.raises(InputError, match=r"pair 2: the question takes .* tokens, and the judge's context has 256"):
        judge.compare(["Go", "Go"], ["Yes", "Yes " * 200], ["No", "No"])
