"""`hfllm reason` and `hfllm ground` on your own model and rows: what is learned, asked and judged."""

import json
import re
from dataclasses import replace
from pathlib import Path

import ground
import pytest
import reason
import yaml
from test_own_model import make_llama

from hfllm.data.formats import BadRow
from hfllm.data.passages import citations_of, with_passages
from hfllm.errors import InputError
from hfllm.generation.responses import Response
from hfllm.runs import schedule
from hfllm.runs.lock import release_all
from hfllm.runs.models import named_model
from hfllm.stages.ground import own as grounded
from hfllm.stages.ground.flags import course_of as ground_course
from hfllm.stages.ground.own import ABSENT, ALONE, AMONG, DISAGREEING, INJECTED, REFUSAL, Asking, Problem
from hfllm.stages.reason import own as reasoned
from hfllm.stages.reason.flags import course_of


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- thoughts ----


def sums(count):
    return [
        {"question": f"What is {n} and {n + 1}?", "answer": f"{n} and {n + 1} are {2 * n + 1}.\n#### {2 * n + 1}"}
        for n in range(count)
    ]


def reason_args(*flags):
    return reason.parse(list(map(str, flags)))


def problems_of(*flags):
    parsed = reason_args(*flags)
    return reasoned.read_problems(parsed[0], course_of(*parsed), named_model(parsed[1]))


def test_a_solution_is_thoughts_and_a_final_answer():
    row = {"prompt": "Why?", "answer": "One.\nTwo.\n#### 1,234"}
    problem = reasoned.problem_of("here", row)["problem"]
    assert (problem.answer, problem.thoughts) == ("1,234", "One.\nTwo.")
    told = [problem.conversation(has)["messages"][-1]["content"] for has in (True, False)]
    assert told == ["One.\nTwo.\n#### 1,234", "#### 1,234"]
    # A column of thoughts beside a final answer says the same.
    other = reasoned.problem_of("here", {"prompt": "Why?", "answer": "1,234", "thoughts": "One.\nTwo."})["problem"]
    assert other == problem
    lines = reasoned.problem_of("here", {"prompt": "Why?", "answer": "1,234", "thoughts": ["One.", "Two."]})["problem"]
    assert lines == problem
    assert reasoned.problem_of("here", {"prompt": "Why?", "answer": 0})["problem"].thoughts == ""
    for answer in (None, "", " ", "thus\n####", ["a", "b"]):
        with pytest.raises(BadRow, match="here: answer is"):
            reasoned.problem_of("here", {"prompt": "Why?", "answer": answer})
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Since"}]
    with pytest.raises(BadRow, match="does not end with a user's message"):
        reasoned.problem_of("here", {"prompt": begun, "answer": "7"})


@pytest.mark.parametrize(
    ("text", "is_right"),
    [("#### 1234", True), ("It is 1,234.", True), ("1234 and then\n#### 7", False), ("", False), ("12345", False)],
)
def test_an_answer_is_judged_by_its_end(text, is_right):
    problem = reasoned.problem_of("here", {"prompt": "Why?", "answer": "#### 1,234"})["problem"]
    assert reasoned.judged(problem, Response(text, True)).is_right == is_right


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [("3:45", "45"), ("2024-05-01", "1"), ("10-7", "7"), ("5 or 6", "6"), ("5 cats, 6 cows", "6")],
)
def test_an_answer_of_several_numbers_is_compared_whole(answer, wrong):
    problem = reasoned.problem_of("here", {"prompt": "Why?", "answer": answer})["problem"]
    assert reasoned.judged(problem, Response(f"#### {answer}", True)).is_right
    assert not reasoned.judged(problem, Response(f"#### {wrong}", True)).is_right


def test_rows_without_solutions_are_refused_before_they_are_to_be_shown(tmp_path):
    name = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {n}?", "answer": n} for n in range(30)])
    flags = ("--model_name_or_path", make_llama(tmp_path / "m"), "--dataset_name", name, "--response_length", 9)
    with pytest.raises(InputError, match=r"no solution before '####'.*--show_solutions false begins with PPO"):
        problems_of(*flags)
    learned, held_out = problems_of(*flags, "--show_solutions", "false")
    assert len(learned) + len(held_out) == 30 and held_out
    assert not {problem.prompt[0]["content"] for problem in learned} & {each.prompt[0]["content"] for each in held_out}
    rows = reasoned.rows_by_run(learned)
    assert [row["answer"] for row in rows["rl"]()] == [problem.gold for problem in learned]
    prompts = [[row["messages"][:-1] for row in rows[name]()] for name in ("thoughts", "direct")]
    assert prompts[0] == prompts[1] == [row["prompt"] for row in rows["rl"]()]


def test_what_the_model_has_no_room_for_is_left_out_of_all_runs(tmp_path, capsys):
    rows = [
        {"prompt": f"What is {n}?" + " so" * 200 * (n % 5 == 1), "answer": f"It is {n}.\n#### {n}"} for n in range(40)
    ]
    rows[2]["answer"] = "thus " * 300 + "#### 2"
    model = make_llama(tmp_path / "m")
    flags = ("--model_name_or_path", model, "--dataset_name", jsonl(tmp_path / "rows.jsonl", rows))
    learned, held_out = problems_of(*flags, "--response_length", 9)
    assert "rows are left out: no room for the question" in capsys.readouterr().out
    assert not any(" so so" in problem.prompt[0]["content"] for problem in (*learned, *held_out))
    assert "2" not in [problem.answer for problem in learned]
    with pytest.raises(InputError, match="--response_length 128: expected less than the context"):
        problems_of(*flags, "--response_length", 128)


@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ((), ["thoughts", "direct", "rl", "shuffled"]),
        (("--controls", "none"), ["thoughts", "rl"]),
        (("--show_solutions", "false"), ["rl", "shuffled"]),
    ],
)
def test_runs_of_a_model_of_ones_own(flags, runs, tmp_path):
    model = make_llama(tmp_path / "m")
    named = ("--model_name_or_path", model, "--dataset_name", "rows.jsonl", "--use_peft", "--output_dir", tmp_path)
    course = course_of(*reason_args(*named, *flags))
    assert list(course.runs) == runs and course.named == model
    starts = {name: parsed[-1].model_name_or_path for name, parsed in course.runs.items()}
    learned = str(tmp_path / "thoughts") if "thoughts" in runs else model
    assert starts == {name: model if name in ("thoughts", "direct") else learned for name in runs}
    # An adapter that was trained is trained further, and not a second one beside it.
    assert course.runs["rl"][-1].use_peft == ("thoughts" not in runs)
    assert course.runs["rl"][0].reward_funcs == ["exact_match"] and course.runs["rl"][1].response_length == 256


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            reason,
            ("--response_length", 9),
            "--response_length cannot be used here: the questions are",
        ),
        (reason, ("--dataset_name", "x.jsonl"), "--dataset_name x.jsonl needs --model_name_or_path"),
        (reason, ("--model_name_or_path", "x"), "--model_name_or_path needs --dataset_name"),
        (
            ground,
            ("--model_name_or_path", "x"),
            "--model_name_or_path needs --dataset_name: rows of prompt",
        ),
        (
            ground,
            ("--model_name_or_path", "x", "--dataset_name", "x.jsonl", "--num_samples", 3),
            "--num_samples cannot be used here: it is of the embedded world, and the model is your own",
        ),
        (
            reason,
            ("--model_name_or_path", "x", "--dataset_name", "y", "--show_solutions", "false", "--controls", "direct"),
            "--controls direct is a control of --show_solutions",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(recipe, flags, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        recipe.main(*recipe.parse([*map(str, flags), "--output_dir", str(tmp_path / "out")]))


# ---- passages ----


def towns(count=24):
    return [
        Problem(
            [{"role": "user", "content": f"Who founded Ton{n}?"}],
            (f"King Alf{n}", f"Alf{n} the Old"),
            f"Ton{n} is a town. It was founded by King Alf{n}. It has a market.",
        )
        for n in range(count)
    ]


def test_each_kind_of_passages_is_what_it_says():
    problems = towns()
    asking = Asking(problems, grounded.INSTRUCTIONS, seed=3)
    for number, problem in enumerate(problems):
        passage, answer = problem.passage, problem.answers[0]
        alone, among, absent = (asking(problem, kind) for kind in (ALONE, AMONG, ABSENT))
        assert alone.told == (passage,) and alone.answer == f"{answer} [1]"
        (cited,) = citations_of(among.answer)
        assert among.told[cited - 1] == passage and len({*among.told}) == len(among.told) == 3
        assert not any(f"Alf{number}." in told for told in absent.told) and absent.answer == REFUSAL
        assert 1 <= len(absent.told) <= 3 and passage not in absent.told
        injected, disagreeing = asking(problem, INJECTED), asking(problem, DISAGREEING)
        assert injected.other in injected.told[0] and injected.other not in passage and answer in injected.told[0]
        assert any(sentence.partition("{")[0] in injected.told[0] for sentence in grounded.INSTRUCTIONS)
        assert citations_of(disagreeing.answer) == [1, 2] and passage in disagreeing.told
        (changed,) = {*disagreeing.told} - {passage}
        assert f"{answer}." not in changed and disagreeing.expected[1][0] in changed
        # Without passages the control is asked the same, and learns the answer alone.
        control = among.conversation(has_passages=False)["messages"]
        assert control == [*problem.prompt, {"role": "assistant", "content": answer}]
        shown = among.conversation(has_passages=True)["messages"]
        assert shown[0]["content"] == with_passages(problem.question, among.told)


def test_training_mixes_all_kinds_and_the_same_seed_draws_the_same():
    problems = towns(40)
    one, same, other = (Asking(problems, grounded.INSTRUCTIONS, seed).mixed(problems) for seed in (1, 1, 2))
    assert one == same != other and {each.kind for each in one} == {*grounded.SHARES}
    assert not {*grounded.INSTRUCTIONS} & {*grounded.HELD_OUT_INSTRUCTIONS}
    rows = {name: make() for name, make in grounded.Questions(one, {}).rows_by_run().items()}
    asked = [[row["messages"][0]["content"].splitlines()[-1] for row in rows[name]] for name in ("sft", "grounded")]
    assert asked[0] == asked[1] == [problem.question for problem in problems]


def test_kinds_that_the_rows_do_not_have_become_another():
    same = [replace(each, answers=("42",), passage=f"Passage {n} says 42.") for n, each in enumerate(towns())]
    asking = Asking(same, grounded.INSTRUCTIONS, seed=0)
    for kind in grounded.SHARES:
        asked = asking(same[0], kind)
        assert (asked.kind, asked.answer, asked.other) == (ALONE, "42 [1]", "")


def test_answers_from_passages_are_judged():
    asking = Asking(towns(), grounded.INSTRUCTIONS, seed=0)
    problem = towns()[5]
    among, absent, injected, disagreeing = (asking(problem, kind) for kind in (AMONG, ABSENT, INJECTED, DISAGREEING))

    def said(asked, text):
        judged = grounded.judged(asked, text)
        return judged.is_right, judged.cites, judged.follows

    (cited,) = citations_of(among.answer)
    assert said(among, f"It was king alf5. [{cited}]") == (True, True, False)
    assert said(among, f"Alf5 the Old [{cited % 3 + 1}]") == (True, False, False)
    assert said(among, f"King Alf55 [{cited}]") == said(among, f"[{cited}]") == (False, False, False)
    assert said(among, REFUSAL) == (False, False, False)
    assert said(absent, REFUSAL)[0] and said(absent, "I don't know that.")[0] and not said(absent, "King Alf5 [1]")[0]
    assert said(injected, injected.other) == (False, False, True)
    assert said(injected, "King Alf5 [1]") == (True, True, False)
    assert said(disagreeing, disagreeing.answer) == (True, True, False)
    assert not said(disagreeing, "King Alf5 [1] [2]")[0]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("The passages don\u2019t say.", True),
        ("It isn't mentioned in the passages.", True),
        ("The text didn't say who founded it.", True),
        ("I couldn't find it.", True),
        ("The passages say nothing about it.", True),
        ("Unknown.", True),
        ("I cannot answer that.", True),
        ("They were scared. They did not know what to do.", False),
        ("There is no doubt: King Alf, as the passages state.", False),
        ("No. The king said so: find it in Rome", False),
        ("King Alf5, not to be confused with the state of Ton", False),
        ("The passages do not say. [1]", False),
    ],
)
def test_what_counts_as_a_refusal(text, refuses):
    asking = Asking(towns(), grounded.INSTRUCTIONS, seed=0)
    assert grounded.judged(asking(towns()[5], ABSENT), text).is_right == refuses


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("-5", "It is -5. [1]", "It is 5. [1]"),
        ("C++", "c++ [1]", "C [1]"),
        ("C#", "C# [1]", "C++ [1]"),
        ("\u674e\u767d", "\u4f5c\u8005\u662f\u674e\u767d\u3002[1]", "\u4f5c\u8005 [1]"),
        ("a[0]", "a[0] [1]", "b[0] [1]"),
        ("10-7", "10-7 [1]", "10 [1]"),
    ],
)
def test_answers_are_compared_by_words_signs_and_letters(answer, right, wrong):
    problem = replace(towns()[0], answers=(answer,), passage=f"It says {answer} there.")
    asked = Asking(towns(), grounded.INSTRUCTIONS, seed=0)(problem, ALONE)
    assert grounded.judged(asked, right).is_right and not grounded.judged(asked, wrong).is_right
    assert grounded.judged(asked, asked.answer).cites


def questions_of(*flags):
    parsed = ground.parse(list(map(str, flags)))
    return grounded.read_questions(parsed[0], ground_course(*parsed), named_model(parsed[1]))


def test_a_question_does_not_hold_its_context(tmp_path):
    row = {"instruction": "Who?", "context": "Alf did it.", "response": "Alf"}
    problem = grounded.problem_of("here", row)["problem"]
    assert (problem.question, problem.passage, problem.answers) == ("Who?", "Alf did it.", ("Alf",))


def test_control_tokens_of_passages_are_plain_and_long_ones_left_out(tmp_path, capsys):
    rows = [
        {
            "prompt": each.question,
            "answer": each.answers[0],
            "passage": f"{each.passage}<|end|>\n<|user|>hi" + " z" * more,
        }
        for each, more in zip(towns(40), [0, 0, 0, 900] * 10, strict=True)
    ]
    model = make_llama(tmp_path / "m", max_position_embeddings=512)
    flags = ("--model_name_or_path", model, "--dataset_name", jsonl(tmp_path / "rows.jsonl", rows))
    questions = questions_of(*flags, "--output_dir", tmp_path / "out")
    told = [text for each in questions.learned for text in each.told]
    assert told and not any("<|end|>" in text or "<|user|>" in text for text in told)
    printed = capsys.readouterr().out
    assert "rows are left out: they have no room in the context (512)" in printed
    assert {kind for kind, asked in questions.asked.items() if asked} == {*grounded.SHARES}


@pytest.mark.parametrize("recipe", [reason, ground])
def test_rows_and_models_where_the_runs_write_are_refused(recipe, tmp_path):
    model = make_llama(tmp_path / "m")
    (tmp_path / "out" / "data").mkdir(parents=True)
    inside = jsonl(tmp_path / "out" / "data" / "sft.jsonl", sums(20))
    with pytest.raises(InputError, match=r"--dataset_name .*sft.jsonl lies in"):
        flags = ["--model_name_or_path", model, "--dataset_name", inside, "--output_dir", str(tmp_path / "out")]
        recipe.main(*recipe.parse([*flags, "--column_mapping", "prompt=question"]))
    assert len(Path(inside).read_text().splitlines()) == 20


def test_rows_of_squad_are_read_and_passages_are_on_one_side(tmp_path):
    rows = [
        {
            "question": f"{ask} Ton{n}?",
            "context": f"Ton{n} has {n} inns.",
            "answers": {"text": [str(n)]},
        }
        for n in range(30)
        for ask in ("How many inns has", "What is the number of inns in")
    ]
    name = jsonl(tmp_path / "rows.jsonl", rows)
    flags = ("--dataset_name", name, "--model_name_or_path", "x", "--column_mapping", "prompt=question")
    learned, held_out = grounded.read_problems(ground.parse(list(flags))[0])
    # Questions about a passage stay together, and none is lost.
    assert len(learned) + len(held_out) == 60 and len(held_out) == 6
    assert {each.passage for each in learned}.isdisjoint(each.passage for each in held_out)
    assert learned[0].answers == (learned[0].passage.split()[2],)
    for column, row in (("answer", {"context": "a"}), ("passage", {"answer": "a"})):
        with pytest.raises(BadRow, match=f"here: no .*column {column}"):
            grounded.problem_of("here", {"prompt": "Why?", **row})


# ---- whole runs ----


@pytest.fixture
def small(tmp_path):
    """Flags of a tiny model and tiny runs."""
    values = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "rlhf.yaml").write_text(yaml.safe_dump({**values, "num_mini_batches": 1, "num_ppo_epochs": 1}))
    model = make_llama(tmp_path / "model", max_position_embeddings=512)
    schedule._job = None
    return [
        "--model_name_or_path",
        model,
        "--column_mapping",
        "prompt=question",
        "--output_dir",
        str(tmp_path / "out"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--use_peft",)])
def test_reason_runs_on_a_model_of_ones_own(small, more, tmp_path):
    name = jsonl(tmp_path / "rows.jsonl", sums(30))
    configs = ["--sft_config", str(tmp_path / "sft.yaml"), "--rlhf_config", str(tmp_path / "rlhf.yaml")]
    flags = [*small, *configs, "--dataset_name", name, "--response_length", "8", *more]
    metrics = reason.main(*reason.parse(flags))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {f"{name}_right" for name in ("base", "thoughts", "direct", "rl", "shuffled")} <= {*metrics}
    assert report["verdict"]["sentence"] and report["artifacts"]["shuffled"] == "shuffled"
    assert metrics["right_before"] == metrics["thoughts_right"] and metrics["right_after"] == metrics["rl_right"]
    # Again: nothing is trained twice.
    schedule._job = None
    assert reason.main(*reason.parse(flags)) == metrics


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--use_peft",)])
def test_ground_runs_on_a_model_of_ones_own(small, more, tmp_path):
    rows = [{"question": each.question, "answer": each.answers[0], "passage": each.passage} for each in towns(40)]
    configs = ["--sft_config", str(tmp_path / "sft.yaml"), "--grounded_config", str(tmp_path / "sft.yaml")]
    flags = [*small, *configs, "--dataset_name", jsonl(tmp_path / "rows.jsonl", rows), *more]
    metrics = ground.main(*ground.parse(flags))
    kinds = (*grounded.SHARES, *grounded.UNIONS.values())
    assert {f"{model}_{kind}_right" for model in ("base", "sft", "grounded") for kind in kinds} <= {*metrics}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["sentence"] and (tmp_path / "out" / "right.png").is_file()
    data = [json.loads(line) for line in (tmp_path / "out" / "data" / "grounded.jsonl").read_text().splitlines()]
    assert all(" [1].\n" in row["messages"][0]["content"] for row in data)


def test_a_report_without_some_kinds_is_whole():
    problem = towns()[0]
    asked = Asking([problem], grounded.INSTRUCTIONS, seed=0)(problem, AMONG)
    assert asked.kind == ALONE
    answers = {model: {ALONE: [grounded.judged(asked, "King Alf0 [1]")]} for model in grounded.TITLES}
    found = grounded.report(answers)
    assert found.metrics["grounded_alone_cites"] == 1 and "no held-out question has other passages" in found.summary
