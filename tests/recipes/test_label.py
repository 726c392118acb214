"""Labels by people: none is lost, all are read by `hfllm reward`, and no answer does anything to the page."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from hfllm.data.formats import to_preference, to_sft
from hfllm.errors import InputError
from hfllm.evaluation.html import shown_messages
from hfllm.evaluation.votes import BAD, FIRST, SECOND, SKIP, TIE, Pair, Vote, Votes, cohens_kappa, fleiss_kappa
from hfllm.stages.label import build
from hfllm.stages.label.flags import LabelArguments, check

HOSTILE = "<script>document.title='hacked'</script><img src=http://127.0.0.1:9/x.png onerror=document.title='hacked'>"


def test_kappas_are_published_ones():
    # Cohen's of 50 grant proposals: 20 yes of both, 5 and 10 of one, 15 no of both.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    # Fleiss's of 10 subjects, 14 raters and 5 categories: 0.210.
    counts = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    labels = [[str(kind) for kind, count in enumerate(row) for _ in range(count)] for row in counts]
    assert fleiss_kappa(labels) == pytest.approx(0.210, abs=5e-4)
    assert cohens_kappa(["a"], ["a"]) is None and fleiss_kappa([["a", "a"]]) is None
    assert cohens_kappa(["a", "b"], ["b", "a"]) == -1
    with pytest.raises(InputError, match="2 and 1 labels"):
        cohens_kappa(["a", "b"], ["a"])


def pairs(count=10):
    return [Pair(f"p{n}", f"Question {n}", [f"first {n}", f"second {n}"], ["one", "two"]) for n in range(count)]


def vote(votes, name, choice, **fields):
    # Rows are written at rests; here at each vote.
    votes._written = float("-inf")
    pair = votes.next_of(name)
    votes.add(Vote(pair.id, name, choice, votes.is_swapped(name, pair.id), 1.0, **fields))
    return pair


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_vote_is_on_the_disk_at_once_and_an_undone_one_is_asked_again(tmp_path):
    votes = Votes(tmp_path, pairs())
    first = vote(votes, "anna", FIRST)
    assert [each["choice"] for each in lines(tmp_path / "votes.jsonl")] == [FIRST]
    assert lines(tmp_path / "labels.jsonl")[0]["chosen"] == first.answers[0]
    second = vote(votes, "anna", TIE)
    assert second.id != first.id and votes.progress("anna") == (2, 10, 1.0)
    assert votes.undo("anna").id == second.id == votes.next_of("anna").id
    assert votes.undo("anna").id == first.id and votes.undo("anna") is None
    votes.write_rows()
    assert (tmp_path / "labels.jsonl").read_text() == "" and len(lines(tmp_path / "votes.jsonl")) == 4
    # What was undone stays undone in the next session.
    assert Votes(tmp_path, pairs()).votes == []


def test_a_line_cut_off_by_a_kill_is_no_vote(tmp_path):
    votes = Votes(tmp_path, pairs())
    vote(votes, "anna", FIRST)
    vote(votes, "anna", SECOND)
    path = tmp_path / "votes.jsonl"
    path.write_text(path.read_text()[:-9])
    again = Votes(tmp_path, pairs())
    assert again.progress("anna")[0] == 1
    vote(again, "anna", BAD)
    assert [each.choice for each in Votes(tmp_path, pairs()).votes] == [FIRST, BAD]
    # A letter that was cut in two is of a vote that was never counted.
    path.write_bytes(path.read_bytes() + '{"pair": "p1", "edited": "é'.encode()[:-1])
    assert len(Votes(tmp_path, pairs()).votes) == 2
    path.write_text('\n{"pair": "p1", "annotator": "a", "choice": "first", "seconds": "x"}\n')
    with pytest.raises(InputError, match=r"line 2: a value is of another kind"):
        Votes(tmp_path, pairs())
    path.write_text("{}\n")
    with pytest.raises(InputError, match=r"votes\.jsonl, line 1: .*expected a vote that hfllm label wrote"):
        Votes(tmp_path, pairs())


def test_a_disk_that_refuses_loses_no_vote_in_silence(tmp_path, monkeypatch):
    votes = Votes(tmp_path, pairs())

    def full(number):
        raise OSError(28, "No space left on device")

    sync = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device: the vote is not saved"):
        vote(votes, "anna", FIRST)
    assert votes.votes == [] and (tmp_path / "votes.jsonl").read_text() == ""
    # The next one is whole, and so is each line ending that Unicode has.
    monkeypatch.setattr(os, "fsync", sync)
    vote(votes, "anna", FIRST, edited="one\u2028two\x85three")
    assert [each.edited for each in Votes(tmp_path, pairs()).votes] == ["one\u2028two\x85three"]


def test_rows_are_what_most_prefer(tmp_path):
    votes = Votes(tmp_path, pairs(4), ["anna", "ben", "cleo"], overlap=1.0)
    order = [each.id for each in (votes.next_of("anna"),)]
    for name, choice in (("anna", FIRST), ("ben", SECOND), ("cleo", SECOND)):
        assert vote(votes, name, choice).id == order[0]
    for name, choice in (("anna", FIRST), ("ben", SECOND), ("cleo", TIE)):
        vote(votes, name, choice)
    for name in votes.annotators:
        vote(votes, name, SKIP)
    rows = lines(tmp_path / "labels.jsonl")
    # One each is no row, nor one beside as many ties; neither are skips.
    assert len(rows) == 1 and rows[0]["chosen"].startswith("second")
    converted = to_preference("a", rows[0])
    assert converted["chosen"][0]["content"] == rows[0]["chosen"]


def test_a_better_answer_is_a_row_for_reward_and_for_sft(tmp_path):
    votes = Votes(tmp_path, [Pair("p", [{"role": "user", "content": "Q"}], [TURN("a"), TURN("b")], ["x", "x"])])
    vote(votes, "anna", SECOND, edited="better")
    best, edited = lines(tmp_path / "labels.jsonl")
    assert (best["chosen"], best["rejected"]) == (TURN("b"), TURN("a"))
    assert (edited["chosen"], edited["rejected"]) == (TURN("better"), TURN("b"))
    (row,) = lines(tmp_path / "edits.jsonl")
    assert to_sft("a", row)["completion"] == TURN("better")


def TURN(text):
    return [{"role": "assistant", "content": text}]


def test_annotators_share_some_pairs_and_divide_the_others(tmp_path):
    votes = Votes(tmp_path, pairs(10), ["anna", "ben"], overlap=0.2, seed=3)
    anna, ben = (votes.pairs_of(name) for name in votes.annotators)
    assert anna[:2] == ben[:2] and len(anna) == len(ben) == 6 and {*anna} | {*ben} == {f"p{n}" for n in range(10)}
    assert {*anna[2:]}.isdisjoint(ben[2:])
    # The sides are shuffled, and the same after a reload.
    sides = [votes.is_swapped("anna", pair) for pair in votes.pairs]
    again = Votes(tmp_path, pairs(10), ["anna", "ben"], overlap=0.2, seed=3)
    assert sides == [again.is_swapped("anna", pair) for pair in votes.pairs] and 0 < sum(sides) < 10
    with pytest.raises(InputError, match="name 'eve': expected anna, ben"):
        votes.add(Vote("p1", "eve", FIRST))
    for choice in (FIRST, SECOND):
        vote(votes, "anna", choice)
        vote(votes, "ben", choice)
    assert votes.agreement() == ("cohens_kappa", 1.0, 2)
    # Somebody of an earlier session without names has those pairs that were voted on.
    votes._count(Vote("p1", "old", FIRST))
    assert votes.progress("old")[:2] == (1, 1) and build.report_of(votes).metrics["labels"] == 5


def test_the_report_says_who_is_preferred(tmp_path):
    votes = Votes(tmp_path, pairs(12))
    for _ in range(12):
        vote(votes, "anna", SECOND)
    found = build.report_of(votes)
    assert found.metrics["second_preferred"] == 1 and found.metrics["second_preferred_n"] == 12
    assert found.metrics["second_preferred_low"] == pytest.approx(12 / (12 + 1.96**2), abs=1e-3)
    assert found.metrics["rows"] == 12 and "12 labels by 1 annotator on 12 pairs: 12 rows" in found.summary
    assert found.promises[0].what == "answers of two preferred"
    # Whether people agree with a dataset's own labels is no claim.
    own = [Pair("p", "Q", ["a", "b"], ["chosen", "rejected"])]
    (tmp_path / "own").mkdir()
    votes = Votes(tmp_path / "own", own)
    vote(votes, "anna", FIRST)
    assert build.report_of(votes).promises == []


def test_every_text_is_escaped():
    shown = shown_messages([{"role": "user", "content": HOSTILE + " ${alert(1)} `{{x}}`"}])
    assert "<script" not in shown and "<img" not in shown and "${" not in shown and "`" not in shown
    call = {"function": {"name": "<b>", "arguments": {"a": "<i>"}}}
    folded = shown_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "<details>" in folded and "<b>" not in folded and "<i>" not in folded
    # An image is the row's own, never an address.
    assert 'src="data:image/png;base64,AA"' in shown_messages("a", ["data:image/png;base64,AA"])
    assert "<img" not in shown_messages("a", ["http://127.0.0.1:9/x.png"])


def test_pairs_are_those_of_the_rows(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("red.png")
    rows = [
        {"prompt": "Which?", "chosen": "red", "rejected": "blue", "images": ["red.png"]},
        {"prompt": "Hello", "chosen": "Hi", "rejected": "No"},
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = LabelArguments(dataset_name="pairs.jsonl", output_dir="out")
    read = build.read_rows(args)
    made = build.pairs_of(read)
    assert made[0].images[0].startswith("data:image/png;base64,") and not made[1].images
    assert made[1].answers[1][0]["content"] == "No" and made[1].sources == ["chosen", "rejected"]
    identity = build.stage_of(args).arguments
    Path("out").mkdir()
    build.save_pairs(Path("out"), made, identity)
    assert build.saved_pairs(Path("out"), identity) == made
    with pytest.raises(InputError, match="holds the pairs of other flags"):
        build.saved_pairs(Path("out"), {**identity, "num_prompts": 3})
    row = next(iter(Votes(Path("out"), made).rows()), None)
    assert row is None
    votes = Votes(Path("out"), made)
    for _ in made:
        vote(votes, "me", FIRST)
    assert any(row.get("images") for row in lines(Path("out/labels.jsonl")))


def test_impossible_flags_are_refused():
    with pytest.raises(InputError, match="--annotators '<b>'"):
        check(LabelArguments(annotators=["<b>"]))
    with pytest.raises(InputError, match="a name comes twice"):
        check(LabelArguments(annotators=["a", "a"]))
    with pytest.raises(InputError, match="--overlap 2"):
        check(LabelArguments(annotators=["a"], overlap=2.0))
    with pytest.raises(InputError, match=r"which model\? hfllm label FOLDER_OR_ID"):
        build.stage_of(LabelArguments())


# ---- the page in a browser ----


@pytest.mark.slow
def test_a_choice_counts_only_for_the_pair_that_is_seen(tmp_path):
    page_module = pytest.importorskip("hfllm.stages.label.page")
    votes = Votes(tmp_path, pairs(3), ["anna"])
    page = page_module.Page(votes)
    session, *_, seen = page._rename(page_module.Session(), "anna")
    session = replace(session, began=0.0)
    # Over a slow line the browser still shows the pair before, and keys are pressed again.
    page._voting(page_module.LEFT)(session, "another", "", "")
    assert votes.votes == []
    page._voting(page_module.LEFT)(session, seen, "", "")
    assert [each.pair for each in votes.votes] == [seen]


@pytest.fixture
def served(tmp_path):
    """Start `hfllm label` on rows with a hostile answer; yield its address, its folder and its process."""
    rows = [{"prompt": f"Question {n}", "chosen": f"good {n}", "rejected": f"{HOSTILE} {n}"} for n in range(12)]
    rows[0]["prompt"] = HOSTILE
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = []

    def start(*flags):
        recipe = Path(__file__).parents[2] / "recipes" / "label.py"
        command = [sys.executable, str(recipe), "--dataset_name", str(tmp_path / "pairs.jsonl")]
        command += ["--output_dir", str(tmp_path / "out"), "--port", "0", *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        started.append(process)
        line = next(line for line in process.stdout if "pairs at" in line)
        return line.partition(" at ")[2].split()[0].partition("/?")[0], process

    yield start, tmp_path / "out"
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def browser():
    """Yield a headless Chromium, the system's."""
    import shutil

    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, address, name, **sizes):
    """Open the page, and keep what it asks for and says."""
    page = browser.new_page(**sizes)
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(f"{address}/?name={name}")
    page.wait_for_selector("#answer-left .turn", timeout=30000)
    read(page)
    return page


def read(page, words=None):
    """Wait until the page shows these words of its progress, and then as long as a person reads at least."""
    if words is not None:
        page.wait_for_function("words => document.querySelector('#progress').innerText.includes(words)", arg=words)
    time.sleep(0.6)


@pytest.mark.slow
def test_people_label_in_a_browser(served, browser):
    start, folder = served
    address, process = start("--annotators", "anna", "ben", "--overlap", "0.5")
    votes = folder / "votes.jsonl"

    def count():
        return len(votes.read_text().splitlines()) if votes.exists() else 0

    # A click is in the file, and the side that was clicked is the one that counts.
    page = open_page(browser, address, "anna")
    left = page.inner_text("#answer-left .words")
    page.click("#vote-left")
    read(page, "1 of 9")
    assert count() == 1 and lines(folder / "labels.jsonl")[0]["chosen"][0]["content"] == left
    # By keyboard, and not while one writes.
    page.keyboard.press("2")
    read(page, "2 of 9")
    page.click("#edit button")
    page.fill("#text-right textarea", "2 better 1")
    page.press("#text-right textarea", "3")
    time.sleep(0.6)
    assert count() == 2
    # Another choice would lose it: it is said once.
    page.click("#vote-tie")
    page.wait_for_selector("text=You changed the right text")
    assert count() == 2
    page.click("#save-right")
    read(page, "3 of 9")
    assert count() == 3 and lines(folder / "edits.jsonl")[0]["completion"][0]["content"] == "2 better 13"
    page.keyboard.press("u")
    read(page, "2 of 9")
    assert count() == 4 and lines(votes)[-1]["is_undone"]
    # Reloaded: the same pair, with the same sides.
    before = page.inner_text("#prompt"), page.inner_text("#answer-left")
    page.reload()
    page.wait_for_selector("#answer-left .turn")
    read(page, "2 of 9")
    assert (page.inner_text("#prompt"), page.inner_text("#answer-left")) == before
    # Another annotator, in a narrow window: nothing is cut off.
    other = open_page(browser, address, "ben", viewport={"width": 360, "height": 740})
    assert other.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("left", "tie", "right", "both_bad", "skip", "undo"):
        box = other.locator(f"#vote-{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    for done in range(1, 10):
        other.keyboard.press("5")
        read(other, f"{done} of 9")
    assert count() == 13 and "All done" in other.inner_text("#prompt")
    # What answers say does nothing and fetches nothing.
    for each in (page, other):
        assert each.title() == "hfllm label" and not each.said
        assert all(url.startswith((address, "data:", "blob:")) for url in each.asked)
    # A killed server has lost nothing, and the same command resumes.
    process.send_signal(signal.SIGKILL)
    process.wait()
    address, process = start("--annotators", "anna", "ben", "--overlap", "0.5")
    assert "2 of 9" in open_page(browser, address, "anna").inner_text("#progress")
    request = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "next: hfllm reward" in said
    assert json.loads((folder / "report.json").read_text())["metrics"]["skipped"] == 9
