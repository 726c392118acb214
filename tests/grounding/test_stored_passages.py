"""Passages: cut by tokens with overlap, saved, loaded and grown; what cannot be read is named."""

import copy
import json
import random
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest

from hfllm.data.passages import Passage
from hfllm.data.tokenizer import train_tokenizer
from hfllm.errors import InputError
from hfllm.grounding import passages as passages_module
from hfllm.grounding.passages import ABOUT, FILE, Chunker, Passages


def prose(seed, words=400):
    rng = random.Random(seed)
    spaces = (" ", " ", " ", "\n", "  \n\n")
    return "".join(
        rng.choice(spaces) + rng.choice(("owl", "eats", "mice,", "Fox-like", "badgers", "(x)")) for _ in range(words)
    )


def tokens_of(tokenizer, text):
    """How many tokens a passage has in a prompt."""
    return len(tokenizer(" " + " ".join(text.split()), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("max_tokens", "overlap"), [(30, 8), (13, 0), (50, 49)])
def test_passages_are_as_long_as_they_may_be_and_overlap(tokenizer, max_tokens, overlap):
    document = prose(max_tokens)
    chunks = list(Chunker(tokenizer, max_tokens, overlap).chunks(document))
    end = 0
    for number, (start, text) in enumerate(chunks):
        assert document[start : start + len(text)] == text == text.strip()
        assert tokens_of(tokenizer, text) <= max_tokens
        # No word is cut, and none is left out.
        assert start == 0 or document[start - 1].isspace()
        stop = start + len(text)
        assert stop == len(document) or document[stop].isspace()
        assert end < stop and not document[end:start].strip()
        if number and start < end:
            assert tokens_of(tokenizer, document[start:end]) <= overlap
        if stop < len(document):
            # Another word would be too much.
            words = text.split() + document[stop:].split()[:1]
            assert tokens_of(tokenizer, " ".join(words)) > max_tokens
        end = stop
    assert not document[end:].strip()
    if overlap == 8:
        shared = [tokens_of(tokenizer, document[b : a + len(t)]) for (a, t), (b, _) in pairwise(chunks)]
        assert max(shared) > 0


def test_a_document_that_is_read_in_parts_is_cut_as_at_once(tokenizer, monkeypatch):
    documents = [prose(seed, 900) for seed in range(3)] + ["x" * 5000 + " owl " * 300, "  \n ", ""]
    chunker = Chunker(tokenizer, 40, 10)
    whole = [list(chunker.chunks(document)) for document in documents]
    for size in (60, 500, 2000):
        monkeypatch.setattr(passages_module, "SEGMENT", size)
        assert [list(chunker.chunks(document)) for document in documents[:3]] == whole[:3]
    assert whole[4:] == [[], []]


def test_only_what_is_longer_than_a_passage_is_cut_within(tokenizer):
    document = "owl " + "0123456789" * 30 + " fox"
    chunks = list(Chunker(tokenizer, 16, 0).chunks(document))
    assert "".join(text for _, text in chunks).replace(" ", "") == document.replace(" ", "")
    assert all(tokens_of(tokenizer, text) <= 16 for _, text in chunks)
    assert [text for _, text in Chunker(None, 2, 1).chunks("one two three four")] == [
        "one two",
        "two three",
        "three four",
    ]


@pytest.mark.parametrize("numbers", [{"max_tokens": 0}, {"overlap": -1}, {"max_tokens": 5, "overlap": 5}])
def test_numbers_that_make_no_sense_are_refused(numbers):
    with pytest.raises(InputError, match=r"^(max_tokens|overlap)=-?\d+: "):
        Chunker(None, **numbers)


def test_they_are_read_from_files_folders_and_the_documentation(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "The owl is gray."}) + "\n" + json.dumps({"text": " "}) + "\n"
    )
    (tmp_path / "b.txt").write_text("The fox is red.\n\nThe toad is green, and it eats flies.\n")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["The bear is brown."]}), tmp_path / "c.parquet")
    passages = Passages.from_source(str(tmp_path), tokenizer, max_tokens=12, overlap=0)
    texts = ["The owl is gray.", "The fox is red.", "The toad is green,", "and it eats flies.", "The bear is brown."]
    found = [each.text for each in passages]
    assert " ".join(found) == " ".join(texts) and len(found) >= len(texts)
    assert passages[0] == Passage("The owl is gray.", f"{tmp_path / 'a.jsonl'}, line 1")
    assert passages[-1].source == f"{tmp_path / 'c.parquet'}, row 1"
    pydoc = Passages.from_source("pydoc", max_tokens=50, max_samples=3)
    assert pydoc[0].source.startswith("topics.") and pydoc[1].start > 0
    with pytest.raises(InputError, match="does not exist"):
        Passages.from_source(str(tmp_path / "none.jsonl"))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(InputError, match="has no text to make passages of"):
        Passages.from_source(str(tmp_path / "blank"))
    (tmp_path / "blank" / "a.jsonl").write_text('{"prompt": "Hello"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 1"):
        Passages.from_source(str(tmp_path / "blank"))


def test_saved_ones_are_the_same_and_grow(tmp_path, tokenizer):
    rows = [json.dumps({"text": prose(seed, 60)}) for seed in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    passages = Passages.from_source(str(tmp_path / "a.jsonl"), tokenizer, 20, 5)
    passages.save(tmp_path / "one")
    streamed = Passages.from_source(str(tmp_path / "a.jsonl"), tokenizer, 20, 5, folder=tmp_path / "two")
    loaded = Passages.load(tmp_path / "one", tokenizer)
    assert list(loaded) == list(passages) == list(streamed) and loaded.cut == passages.cut
    assert loaded.digest == passages.digest == streamed.digest
    assert loaded[3:5] == [passages[3], passages[-len(passages) + 4]] and next(loaded.texts(3)) == passages[3].text
    first = passages.digest
    passages.add([Passage("One more.", "me")])
    assert passages[-1].text == "One more." and passages.digest != first
    both = Passages([*loaded, Passage("One more.")])
    assert both.digest == passages.digest
    for number in range(150):
        both.add([Passage(f"Number {number}.", str(number))])
    assert both[-1] == Passage("Number 149.", "149") and both[-151].text == "One more."
    # The file that is mapped into memory may be written over.
    loaded.add(passages)
    loaded.save(tmp_path / "one")
    assert len(Passages.load(tmp_path / "one")) == len(loaded) == 2 * len(passages) - 1
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [FILE, ABOUT]


def test_another_tokenizer_is_named(tmp_path, tokenizer):
    other = train_tokenizer(["some other text, of the owl"], vocab_size=300)
    passages = Passages.from_texts(["The owl is gray."])
    passages.cut = Chunker(tokenizer, 20, 5).cut
    passages.save(tmp_path)
    with pytest.raises(
        InputError, match=rf"cut to 20 tokens of a tokenizer \({len(tokenizer)} tokens\).*{len(other)}"
    ):
        Passages.load(tmp_path, other)
    # Tokens that were added, such as those of thoughts, cut no text otherwise.
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<think>"])
    assert len(Passages.load(tmp_path, added)) == 1
    others = Passages.from_texts(["The fox is red."])
    others.cut = Chunker(other, 20, 5).cut
    with pytest.raises(InputError, match="cannot be added to passages cut to"):
        passages.add(others)


def test_texts_that_are_none_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="text 2 is ' '"):
        Passages.from_texts(["a", " "])
    with pytest.raises(InputError, match="1 texts and 2 sources"):
        Passages.from_texts(["a"], ["b", "c"])
    with pytest.raises(InputError, match=r"no saved passages: there is no passages\.arrow"):
        Passages.load(tmp_path)
    passages = Passages.from_texts(["The owl is gray."] * 3)
    passages.save(tmp_path)
    about, table = (tmp_path / ABOUT).read_text(), (tmp_path / FILE).read_bytes()
    strange = about.replace("null", '{"max_tokens": "x", "overlap": 1}')
    for wrong in ("[]", "{", about.replace("hfllm passages 1", "another"), strange):
        (tmp_path / ABOUT).write_text(wrong)
        with pytest.raises(InputError, match=rf"{ABOUT}: missing or damaged"):
            Passages.load(tmp_path)
    (tmp_path / ABOUT).write_text(about.replace("3", "4"))
    with pytest.raises(InputError, match=r"3 passages, and passages\.json says 4"):
        Passages.load(tmp_path)
    (tmp_path / ABOUT).write_text(about)
    (tmp_path / FILE).write_bytes(table[:-200])
    with pytest.raises(InputError, match=rf"{FILE}: damaged"):
        Passages.load(tmp_path)
    with pyarrow.ipc.new_file(str(tmp_path / FILE), pyarrow.schema([("text", pyarrow.string())])) as writer:
        writer.write_table(pyarrow.table({"text": ["a"]}))
    with pytest.raises(InputError, match="its columns are text"):
        Passages.load(tmp_path)
