"""Mixed prompts: the beginning of one and the end of another, and nothing else."""

from hfllm.synthesis.answers import mix_prompts

TEXTS = [" ".join(f"{letter}{place}" for place in range(6)) for letter in "abcdefgh"]


def prefixes_and_suffixes(mixed, own):
    """Whether words are a beginning of `own` followed by an end of one of the texts."""
    words, first = mixed.split(" "), own.split(" ")
    return any(
        words[:cut] == first[:cut] and any(text.split(" ")[6 - len(words) + cut :] == words[cut:] for text in TEXTS)
        for cut in range(max(0, len(words) - 6), min(6, len(words)) + 1)
    )


def test_prompts_are_a_beginning_and_an_end():
    rows = [{"prompt": text, "completion": "No", "source": 1} for text in TEXTS] * 50
    mixed = mix_prompts(rows, 1.0, seed=3)
    assert all(prefixes_and_suffixes(row["prompt"], old["prompt"]) for row, old in zip(mixed, rows, strict=True))
    assert all({**row, "prompt": 0} == {**old, "prompt": 0} for row, old in zip(mixed, rows, strict=True))
    # Some join two, some are an end alone, and some a beginning.
    words = [row["prompt"].split(" ") for row in mixed]
    assert {len({word[0] for word in some}) for some in words} == {1, 2}
    assert any(some[0][1] != "0" for some in words) and any(some[-1][1] != "5" for some in words)
    lengths = {len(row["prompt"].split(" ")) for row in mixed}
    assert lengths == set(range(1, 13))


def test_a_share_of_them_is_mixed_and_the_seed_decides_which():
    rows = [{"prompt": text} for text in TEXTS] * 250
    first, again, other = (mix_prompts(rows, 0.3, seed) for seed in (1, 1, 2))
    assert first == again != other
    changed = sum(row != old for row, old in zip(first, rows, strict=True))
    assert 0.25 < changed / len(rows) < 0.33
    assert mix_prompts(rows, 0.0, 1) == rows


def test_of_messages_the_last_one_changes_and_texts_stay():
    system = {"role": "system", "content": "Be kind."}
    rows = [{"prompt": [system, {"role": "user", "content": text}]} for text in TEXTS] + [{"text": "The fox."}]
    mixed = mix_prompts(rows, 1.0, seed=0)
    assert mixed[-1] == {"text": "The fox."}
    assert all(row["prompt"][0] == system and row["prompt"][1]["role"] == "user" for row in mixed[:-1])
    assert [row["prompt"][1]["content"] for row in mixed[:-1]] != TEXTS
    assert rows[0]["prompt"][1]["content"] == TEXTS[0]


def test_nothing_becomes_an_empty_prompt():
    rows = [{"prompt": "Go"}, {"prompt": "No"}] * 100
    assert all(row["prompt"].strip() for row in mix_prompts(rows, 1.0, seed=0))
    assert mix_prompts([{"text": "a"}], 1.0, seed=0) == [{"text": "a"}]
