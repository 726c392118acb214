"""Nothing of a user's data is lost in silence: it is used, or a receipt names it, or its row is refused."""

import json
from itertools import product

import pytest
from PIL import Image

from hfllm.data import labelled
from hfllm.data.conversations import Conversations
from hfllm.data.formats import Dropped, flaw_of_prompt, to_preference, to_prompt, to_sft, to_text
from hfllm.data.images.rows import to_picture_prompts
from hfllm.data.loading import RowSource, load_rows
from hfllm.data.packing import IGNORE
from hfllm.data.receipt import begin_receipt, receipts_of, unprinted_lines, whole_receipt
from hfllm.data.sources import load_source
from hfllm.data.tokenizer import set_built_in, train_tokenizer
from hfllm.errors import InputError
from hfllm.evaluation.suites.preferences import EQUAL, Preferences
from hfllm.grounding.passages import Passages
from hfllm.rewards.functions import checked_rewards, exact_match

MAPPERS = {"sft": to_sft, "preference": to_preference, "prompt": to_prompt, "text": to_text}
SECRET = "zebrafish"


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def rows_in(folder, rows, name="rows.jsonl"):
    return written(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def read(name, mapper=to_sft, bad_rows="drop"):
    """The converted rows of a dataset, and its receipt."""
    dropped = Dropped()
    flaw = {"flaw_of": flaw_of_prompt} if mapper is to_prompt else {"flaw_of": lambda row: None}
    rows = load_rows(RowSource(str(name), bad_rows=bad_rows), mapper, dropped, **flaw)
    (receipt,) = receipts_of({"dataset_name": str(name)})
    return rows, receipt


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **marks):
    return {"role": "assistant", "content": text, **marks}


# ---- marks of what is learned ----


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"train": "false"}, {"weight": "0"}]
)
def test_answers_marked_as_not_to_be_learned_are_not_learned(tmp_path, mark):
    tokenizer = train_tokenizer(["Hello there. zebrafish or horse, what is it?"] * 9, 300)
    set_built_in(tokenizer, "hfllm")
    messages = [user("Hello"), assistant("horse", **mark), user("What?"), assistant("there", weight=1)]
    (row,), receipt = read(rows_in(tmp_path, [{"messages": messages}]))
    assert not receipt.ignored
    ((labeled,),) = Conversations(tokenizer).label([row])
    learned = tokenizer.decode([token for token in labeled.labels if token != IGNORE])
    assert learned == "there<|end|>" and "horse" in tokenizer.decode(labeled.input_ids)
    # Without a mark both are.
    plain = [{key: value for key, value in message.items() if key in ("role", "content")} for message in messages]
    ((labeled,),) = Conversations(tokenizer).label([to_sft("a", {"messages": plain})])
    assert tokenizer.decode([token for token in labeled.labels if token != IGNORE]) == "horse<|end|>there<|end|>"


def test_rows_of_which_nothing_is_learned_are_dropped_and_counted(tmp_path):
    rows = [{"messages": [user("a"), assistant("b", train=False)]}, {"messages": [user("a"), assistant("c")]}]
    kept, receipt = read(rows_in(tmp_path, rows))
    assert len(kept) == 1 and receipt.as_dict()["dropped"] == {
        "whose answers are all marked as not to be learned": {"rows": 1, "first": "rows.jsonl, line 1"}
    }
    with pytest.raises(InputError, match="line 1: a row whose answers are all marked"):
        read(rows_in(tmp_path, rows), bad_rows="refuse")
    for mark in ({"weight": 0.5}, {"train": "maybe"}, {"weight": [1]}):
        with pytest.raises(InputError, match=r"line 1: (weight|train) of a message is .* expected 0 or 1"):
            read(rows_in(tmp_path, [{"messages": [user("a"), assistant("b", **mark)]}]))


def test_marks_are_refused_where_all_marked_parts_of_a_template_are_learned(tmp_path):
    tokenizer = train_tokenizer(["Hello there"] * 9, 300)
    set_built_in(tokenizer, "hfllm")
    messages = [user("Hello"), assistant("a", train=False), user("b"), assistant("c")]
    row = to_sft("rows.jsonl, line 1", {"messages": messages})
    with pytest.raises(InputError, match="--assistant_only_loss learns each answer"):
        list(Conversations(tokenizer, tokenizer.chat_template).label([row]))


# ---- columns that come before a prompt ----


ALPACA = {"instruction": "Say it.", "input": "", "output": "It."}
BEFORE = {"system": "You are kind.", "history": [["Hello", "Hi"], ["How?", "Well."]]}
EXPECTED = [
    {"role": "system", "content": "You are kind."},
    *(user("Hello"), assistant("Hi"), user("How?"), assistant("Well."), user("Say it.")),
]


@pytest.mark.parametrize(
    "mapper, row",
    [
        (to_sft, ALPACA),
        (to_sft, {"prompt": "Say it.", "response": "It."}),
        (to_preference, {"instruction": "Say it.", "chosen": "It.", "rejected": "No."}),
        (to_preference, {"prompt": "Say it.", "chosen": "It.", "rejected": "No."}),
        (to_prompt, {"prompt": "Say it."}),
        (to_prompt, {"instruction": "Say it."}),
    ],
)
def test_system_and_history_come_before_the_prompt(tmp_path, mapper, row):
    (converted,), receipt = read(rows_in(tmp_path, [{**row, **BEFORE}]), mapper)
    assert converted["prompt"] == EXPECTED and not receipt.ignored
    (plain,), _ = read(rows_in(tmp_path, [{**row, "system": "", "history": []}]), mapper)
    assert plain["prompt"] in ([user("Say it.")], "Say it.")


def test_a_history_of_another_form_is_named_and_not_read(tmp_path):
    for history in ("Hello", [["a"]], [{"q": 1}], [["a", None]], 3, {"a": "b"}):
        (row,), receipt = read(rows_in(tmp_path, [{**ALPACA, "history": history, "system": 3}]))
        assert row["prompt"] == [user("Say it.")] and receipt.ignored == {"history": 1, "system": 1}
    # As messages, and as a csv file has it.
    pairs = [["Hello", "Hi"], ["How?", "Well."]]
    for history in (EXPECTED[1:5], json.dumps(pairs)):
        (row,), receipt = read(rows_in(tmp_path, [{**ALPACA, "history": history}]))
        assert row["prompt"] == EXPECTED[1:] and not receipt.ignored
    (row,), _ = read(rows_in(tmp_path, [{"messages": [assistant("a")], "history": pairs}]), to_prompt)
    assert row["prompt"] == EXPECTED[1:5]


# ---- files ----


def test_a_folders_documents_are_read_and_the_others_named(tmp_path):
    written(tmp_path, "a.md", "# Fish\n\nA zebrafish swims.\n")
    written(tmp_path, "b.html", "<html><head><title>t</title></head><body><p>One</p><p>Two</p></body></html>")
    written(tmp_path, "c.txt", "One.\n\nTwo.\n")
    written(tmp_path, "notes.docx", "x")
    written(tmp_path, "LICENSE", "x")
    written(tmp_path, ".hidden", "")
    (tmp_path / "photo.png").write_bytes(b"x")
    rows, receipt = read(tmp_path, to_text)
    assert rows[0] == "# Fish\n\nA zebrafish swims." and rows[-2:] == ["One.", "Two."] and len(rows) == 4
    assert "One" in rows[1] and "Two" in rows[1] and "<p>" not in rows[1]
    assert receipt.as_dict()["files"] == {"a.md": 1, "b.html": 1, "c.txt": 2}
    assert receipt.skipped == {"LICENSE": "no ending", "notes.docx": ".docx ending"}
    assert "2 files not read: LICENSE (no ending), notes.docx (.docx ending)" in "\n".join(receipt.lines())


def test_documents_beside_rows_are_named_and_not_read(tmp_path):
    rows_in(tmp_path, [ALPACA])
    written(tmp_path, "README.md", "# A dataset")
    rows, receipt = read(tmp_path)
    written(tmp_path, "LICENSE.md", "# A license")
    assert len(rows) == 1
    assert receipt.skipped == dict.fromkeys(("LICENSE.md", "README.md"), "a document beside files of rows")
    # Without rows it is a text like others.
    (tmp_path / "rows.jsonl").unlink()
    assert len(read(tmp_path, to_text)[0]) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "prompt,response,response\na,b,c\n", "line 1: the column 'response' occurs twice"),
        ("a.csv", "prompt, response,response\na,b,c\n", "line 1: the column 'response' occurs twice"),
        ("a.tsv", "prompt\tprompt\na\tb\n", "line 1: the column 'prompt' occurs twice"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "line 1.*'prompt' occurs twice"),
        ("a.jsonl", '{"messages": [{"role": "user", "role": "system", "content": "c"}]}\n', "'role' occurs twice"),
        ("a.json", '[{"prompt": "a", "completion": "b", "prompt": "c"}]', "'prompt' occurs twice"),
        ("a.csv", 'id,text,label\n1,"open,a\n2,b,c\n3,"d",e\n', "line"),
    ],
)
def test_a_file_that_would_lose_something_is_refused(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        load_source(written(tmp_path, name, content))


def test_rows_over_lines_that_could_be_rows_are_counted(tmp_path):
    """A quote may have been left open, or a text has commas: the rows are read, and the receipt tells of them."""
    table = written(tmp_path, "a.csv", 'id,prompt,response\n1,"open,a\n2,b,c\n3,d",e\n7,"Dear John, hello\nAl",ok\n')
    rows, receipt = read(table)
    assert len(rows) == 2 and receipt.as_dict()["joined_lines"] == {"rows": 1, "first": "a.csv, row 1"}
    assert any("1 row over lines that could be rows (first: " in line for line in receipt.lines())


def test_files_without_a_row_are_named(tmp_path):
    rows_in(tmp_path, [ALPACA])
    written(tmp_path, "empty.jsonl", "")
    _, receipt = read(tmp_path)
    assert receipt.as_dict()["files"] == {"empty.jsonl": 0, "rows.jsonl": 1}
    assert "2 files (empty.jsonl: no row, rows.jsonl)" in next(receipt.lines())


def test_columns_without_a_name_have_a_number(tmp_path):
    rows, receipt = read(written(tmp_path, "a.csv", "prompt,completion,,\na,b,lost,\n"))
    assert len(rows) == 1 and receipt.ignored == {"(column 3)": 1}


def test_tables_with_semicolons_and_spaces_around_names_are_read(tmp_path):
    source = load_source(written(tmp_path, "a.csv", "prompt; completion \na, b;c\n"))
    assert source.rows == [{"prompt": "a, b", "completion": "c"}]
    # A text of several lines in a table, whose lines could not be rows.
    source = load_source(written(tmp_path, "b.csv", 'text,label\n"one\ntwo, three",x\n'))
    assert source.rows == [{"text": "one\ntwo, three", "label": "x"}]


# ---- rows that contradict themselves ----


@pytest.mark.parametrize("columns", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_a_chosen_answer_scored_below_the_rejected_one_is_dropped(tmp_path, columns):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    scores = [(1, 9), (9, 1), (5, 5), (None, 2), ("1", "9")]
    rows = [{**pair, **dict(zip(columns, each, strict=True))} for each in scores]
    kept, receipt = read(rows_in(tmp_path, rows), to_preference)
    assert len(kept) == 3 and receipt.dropped.reasons == {"with a rejected answer scored above the chosen one": 2}
    assert not receipt.ignored


def test_a_row_that_says_two_things_is_refused(tmp_path):
    row = {"instruction": "a", "output": "b", "messages": [user("a"), assistant(SECRET)]}
    with pytest.raises(InputError, match="line 1: instruction and output give another answer than messages"):
        read(rows_in(tmp_path, [row]))
    with pytest.raises(InputError, match="prompt and completion give another answer than prompt and response"):
        read(rows_in(tmp_path, [{"prompt": "a", "completion": "b", "response": "c"}]))


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [user("a"), assistant(" b")]},
        {"messages": [user("a")]},
        {"messages": []},
        {"messages": "text"},
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("c")]},
        {"response": ""},
        {"response": float("nan")},
        {"response": [{"user_id": 1, "value": "x", "status": "submitted"}]},
        {"prompt": "Below is an instruction. a"},
        {"inputs": "x", "targets": "y"},
    ],
)
def test_other_columns_than_a_rows_format_are_named(tmp_path, more):
    """Of a row with more than one format the first is read, unless they contradict each other."""
    (row,), receipt = read(rows_in(tmp_path, [{"instruction": "a", "output": "b", **more}]))
    assert (row["prompt"], row["completion"]) == ([user("a")], [assistant("b")])
    expected = {name for name, value in more.items() if value not in ("", None)}
    assert receipt.ignored.keys() == expected


def test_what_is_read_is_seen_row_by_row(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "lost", "messages": [user("a"), assistant("b")]}]
    _, receipt = read(rows_in(tmp_path, [*rows, {"messages": [user("a")], "id": 3}]))
    # Of a row that is left out nothing is said beside that.
    assert receipt.ignored == {"prompt": 1} and receipt.used == {"prompt", "completion", "messages"}


def test_columns_for_reward_functions_count_as_read(tmp_path):
    name = rows_in(tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": [user("a")], "answer": "b"}])
    _, receipt = read(name, to_picture_prompts(to_prompt))
    assert receipt.ignored == {} and receipt.used == {"prompt", "answer"}


def test_instructions_with_whole_conversations_to_compare(tmp_path):
    row = {"instruction": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    (converted,), receipt = read(rows_in(tmp_path, [row]), to_preference)
    assert converted == {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert receipt.ignored == {"instruction": 1}
    # Marks of what is learned make no difference between answers.
    pair = {"prompt": "a", "chosen": [assistant("b", train=False)], "rejected": [assistant("b")]}
    (converted,), _ = read(rows_in(tmp_path, [pair]), to_preference)
    assert converted["chosen"] == converted["rejected"]


def test_rows_with_images_have_a_receipt_too(tmp_path):
    from hfllm.data.images.rows import to_pictures

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    mapper = to_pictures(to_sft, tmp_path)
    row = {"image": "a.png", "messages": [user("a"), assistant("b")], "id": 3}
    _, receipt = read(rows_in(tmp_path, [row, row]), mapper)
    assert receipt.ignored == {"id": 2} and receipt.used == {"image", "messages"}


def test_classes_that_are_none(tmp_path):
    reader = labelled.reader_of(labelled.TEXT)
    names = ["x", "nan", float("nan"), None, "", "none"]
    kept, receipt = read(rows_in(tmp_path, [{"text": "a", "label": name} for name in names]), reader)
    assert [row["label"] for row in kept] == ["x", "none"] and receipt.dropped.count == 4
    measured = [reader("a", {"text": "a", "label": number / 8}) for number in range(30)]
    with pytest.raises(InputError, match=r"30 rows have 30 different labels, such as '0.0', numbers with fractions"):
        labelled.labels_of(labelled.TEXT, measured)
    # Half stars are classes, and so is what the user names.
    assert len(labelled.labels_of(labelled.TEXT, measured[::4])) == 8
    names = [row["label"] for row in measured]
    assert labelled.labels_of(labelled.TEXT, measured, names) == names
    rows = [reader("a", {"text": f"a {number}", "label": f"id-{number}"}) for number in range(60)]
    with pytest.raises(InputError, match="60 rows have 60 different labels, such as 'id-0': is it an id"):
        labelled.labels_of(labelled.TEXT, rows)
    assert len(labelled.labels_of(labelled.TEXT, [*rows, *rows])) == 60


def test_pairs_of_equal_answers_are_not_scored(tmp_path):
    path = rows_in(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    suite = Preferences([path])

    class Subject:
        label = "model"

    (record,) = suite.judge(Subject(), suite.items())
    assert record["skipped"] == EQUAL and not record["scores"]


def test_a_reward_without_its_column_names_it():
    with pytest.raises(InputError, match="'exact_match': the rows have no column 'answer', which it needs; columns"):
        checked_rewards(exact_match, ["a"], ["b"], other=[1])

    def broken(prompts, completions, **columns):
        raise TypeError("broken")

    with pytest.raises(InputError, match=r"failed with TypeError\('broken'\)"):
        checked_rewards(broken, ["a"], ["b"])


# ---- roles and formats of others ----


def test_roles_and_comparisons_of_openai_are_read(tmp_path):
    messages = [{"role": "developer", "content": "Be kind."}, user("a"), {"role": "bot", "content": "b"}]
    (row,), _ = read(rows_in(tmp_path, [{"messages": messages}]))
    assert [message["role"] for message in (*row["prompt"], *row["completion"])] == ["system", "user", "assistant"]
    pair = {
        "input": {"messages": [user("a")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant("b")],
        "non_preferred_output": [assistant("c")],
    }
    (row,), _ = read(rows_in(tmp_path, [pair]), to_preference)
    assert row == {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}


def test_unknown_columns_come_with_their_likely_names(tmp_path):
    with pytest.raises(InputError, match="--column_mapping OURS=THEIRS, here prompt=Question completion=Answer"):
        read(rows_in(tmp_path, [{"Question": "a", "Answer": "b", "id": 3}]))


# ---- the receipt ----


def test_a_receipt_counts_and_names(tmp_path):
    rows = [
        {"messages": [{**user("a"), "timestamp": 3}, assistant("b", rating=5)], "id": 1, "note": None},
        {"messages": [user("a"), {**assistant("b"), "timestamp": 4}], "id": 2, "source": "web"},
        {"messages": [user("a")], "id": 3},
    ]
    name = rows_in(tmp_path, rows)
    _, receipt = read(name)
    expected = {"id": 2, "source": 1, "messages[].timestamp": 2, "messages[].rating": 1}
    assert receipt.ignored == expected and receipt.duplicates == 1 and receipt.rows == 3
    assert receipt.as_dict() == {
        "dataset": name,
        "files": {"rows.jsonl": 3},
        "skipped_files": {},
        "rows": 3,
        "dropped": {"without an answer": {"rows": 1, "first": "rows.jsonl, line 3"}},
        "duplicates": 1,
        "columns": ["messages"],
        "ignored": expected,
    }
    assert unprinted_lines({"dataset_name": name}) == [
        f"{name}: 3 rows in 1 file (rows.jsonl), 1 of them like an earlier one",
        f"{name}: 1 of 3 rows dropped: 1 without an answer ({name}, line 3)",
        f"{name}: columns read: messages; "
        "ignored: messages[].timestamp (2), messages[].rating (1), id (2), source (1)",
    ]
    assert not unprinted_lines({"dataset_name": name}) and not unprinted_lines({"dataset_name": "other.jsonl"})
    assert whole_receipt({"dataset_name": name})["datasets"] == [receipt.as_dict()]
    assert whole_receipt({"dataset_mixture": [f"{name}:0.5"]})["datasets"] and whole_receipt({"seed": 3}) == {}
    # Read again, it is counted once.
    assert len(receipts_of({"dataset_name": name})) == 1 and begin_receipt(name).rows == 0


# Each form of a row, and where a word may stand in it: it is read, named, or its row refused or dropped.
FORMS = {
    "sft": [
        ALPACA,
        {"instruction": "a", "response": "b", "context": "c"},
        {"prompt": "a", "completion": "b"},
        {"messages": [user("a"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"inputs": "a", "targets": "b"},
    ],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "response_a": "b", "response_b": "c", "preference": "a"},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"instruction": "a", "response1": "b", "response2": "c", "label": 1},
    ],
    "prompt": [{"prompt": "a"}, {"messages": [user("a")]}, {"text": "a"}],
    "text": [{"text": "a"}, {"content": "a"}],
}
ODD_COLUMNS = ["system", "history", "input", "weight", "id", "metadata", "tools", "text", "messages", "score", "label"]
ODD_KEYS = ["weight", "train", "name", "timestamp", "reasoning_content", "refusal", "tool_calls"]


def odd_rows():
    """Rows with one column, or one key of their last message, more than they need, whose value is a word."""
    for stage, row in ((stage, row) for stage, rows in FORMS.items() for row in rows):
        for column in ODD_COLUMNS:
            if column not in row:
                yield stage, {**row, column: SECRET}, column
        for column, key in product(("messages", "conversations"), ODD_KEYS):
            if column in row and stage in ("sft", "prompt"):
                *before, last = row[column]
                yield stage, {**row, column: [*before, {**last, key: SECRET}]}, f"{column}[].{key}"


def test_no_word_of_an_odd_row_is_lost_in_silence(tmp_path):
    """The word is in what is learned, or its column is named, or the row is refused or dropped with a reason."""
    cases = list(odd_rows())
    assert len(cases) > 150
    lost = []
    for number, (stage, row, where) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = rows_in(folder, [row])
        try:
            rows, receipt = read(name, MAPPERS[stage])
        except InputError:
            continue
        is_told = where in receipt.ignored or receipt.dropped.count or SECRET in str(rows)
        if not is_told:
            lost.append((stage, row, where))
    assert lost == []


def test_passages_and_files_of_a_suite_have_a_receipt_too(tmp_path):
    passages, pairs = tmp_path / "passages.jsonl", tmp_path / "pairs.jsonl"
    passages.write_text('{"text": "The fox is red.", "page": 3}\n{"text": "The owl is grey."}\n')
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "source": "me"}\n' * 2)
    Passages.from_source(str(passages))
    list(Preferences([str(pairs)]).items())
    by_name = {receipt.dataset: receipt for receipt in receipts_of({"one": [str(pairs)], "other": str(passages)})}
    assert by_name[str(passages)].rows == 2 and by_name[str(passages)].ignored == {"page": 1}
    assert by_name[str(pairs)].ignored == {"source": 2}
    assert by_name[str(pairs)].used == {"prompt", "chosen", "rejected"}
