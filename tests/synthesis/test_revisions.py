"""Answers that a model criticizes and revises itself: what is asked and kept, what is resumed, what is refused."""

import copy
import json
from functools import partial

import pytest
import torch

from hfllm.data.tokenizer import plain_chat_template
from hfllm.errors import InputError
from hfllm.generation import responses
from hfllm.generation.responses import Response
from hfllm.synthesis import revisions as revisions_module
from hfllm.synthesis.constitution import Constitution, Principle, finds_fault, load_constitution
from hfllm.synthesis.revisions import ROWS_FILE, STATE_FILE, critique_and_revise

HARM, KIND = Principle("harm", "Harm?", "No harm!"), Principle("kind", ["Rude?", "Is it rude?"], "Be kind!")
BOTH = Constitution([HARM, KIND])
PROMPTS = [
    "What is 1 plus 2?",
    "Go",
    "Where does the old owl sing?",
    "Say red.",
    "Hi",
    "Is the fox red?",
    "No",
    "Why?",
]


def turns(*said):
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(said)]


@pytest.fixture
def script(monkeypatch):
    """Replace sampling: `script.say(conversation)` answers, and `script.asked` lists what was asked in each call."""

    class Script:
        asked, calls, say = [], [], staticmethod(lambda prompt: "")

        def sample(self, model, tokenizer, prompts, max_new_tokens, *_, **settings):
            self.asked.append(prompts)
            self.calls.append((model, settings))
            said = map(self.say, prompts)
            return [[each if isinstance(each, Response) else Response(each, True)] for each in said]

    script = Script()
    script.asked, script.calls = [], []
    monkeypatch.setattr(responses, "sample_with_ends", script.sample)
    return script


@pytest.fixture
def revise(make_model, tokenizer):
    """`critique_and_revise` by a tiny model, with defaults."""

    def revise(prompts=PROMPTS, constitution=BOTH, num_revisions=1, seed=0, **settings):
        settings = {"response_length": 4, "batch_size": 2, "tokenizer": tokenizer} | settings
        # Making one draws random numbers.
        model, tokens = settings.pop("model", None) or make_model(), settings.pop("tokenizer")
        return critique_and_revise(model, tokens, prompts, constitution, num_revisions, seed, **settings)

    return revise


def test_every_turn_is_asked_for_and_kept(script, revise):
    says = {
        ("Go",): " Bad. ",
        ("Go", "Bad.", "Harm?"): "It is harm.",
        ("Go", "Bad.", "Harm?", "It is harm.", "No harm!"): " Good.\n",
        ("Go", "Good.", "Harm?"): "",
        ("Go", "Good.", "Harm?", "", "No harm!"): "Good. ",
    }
    script.say = lambda prompt: says[tuple(message["content"] for message in prompt)]
    (row,), figures = revise(["Go"], Constitution([HARM]), num_revisions=2)
    asked = {"principle": "harm", "critique_request": "Harm?", "revision_request": "No harm!"}
    assert row == {
        "prompt": turns("Go"),
        "messages": turns("Go", "Good."),
        "completion": turns("Go", "Good.")[1:],
        "chosen": turns("Go", "Good.")[1:],
        "rejected": turns("Go", "Bad.")[1:],
        "turns": [
            asked | {"answer": "Bad.", "critique": "It is harm.", "is_flagged": True, "revision": "Good."},
            asked | {"answer": "Good.", "critique": "", "is_flagged": False, "revision": "Good."},
        ],
    }
    assert figures == revisions_module.RevisionFigures(
        num_prompts=1, critiques=2, empty_critiques=1, flagged=1, revisions=2, echoes=1
    )


def test_answers_are_kept_where_nothing_is_found_or_said(script, revise):
    def say(prompt):
        question, last = prompt[0]["content"], prompt[-1]["content"]
        if last == "Harm?":
            return {"Go": "There is no harm in it.", "Hi": "It is harm."}.get(question, "Harm.")
        if last == "No harm!":
            return "" if question == "Why?" else Response("Kind", False)
        return "Rude"

    script.say = say
    rows, figures = revise(["Go", "Hi", "Why?"], Constitution([HARM]), revise_only_flagged=True)
    assert [row["chosen"][0]["content"] for row in rows] == ["Rude", "Kind", "Rude"]
    assert [row["turns"][0]["revision_request"] for row in rows] == ["", "No harm!", "No harm!"]
    counts = {"critiques": 3, "flagged": 2, "revisions": 2, "empty_revisions": 1, "cut_off": 1}
    assert figures == revisions_module.RevisionFigures(num_prompts=3, **counts)
    # Everything is revised otherwise; and what counts as a find can be said.
    rows, _ = revise(["Go"], Constitution([HARM]))
    assert rows[0]["chosen"][0]["content"] == "Kind" and not rows[0]["turns"][0]["is_flagged"]
    rows, figures = revise(["Go", "Hi"], Constitution([HARM]), revise_only_flagged=True, is_flagged=lambda text: True)
    assert figures.flagged == figures.revisions == 2


@pytest.mark.parametrize(
    ("critique", "expected"),
    [
        *((text, True) for text in ("The answer helps to cook the fox. That is harm.", "It says: Go. That is rude.")),
        *((text, True) for text in ("No one should do this.", "No doubt it is harmful.", "It is not only rude.")),
        *((text, True) for text in ("Note that this is dangerous.", "Yes, it isn’t kind.", "Nowhere is it safe.")),
        *((text, False) for text in ("", "No.", "none", "Nothing is wrong here.", "The answer does no harm.")),
        *((text, False) for text in ("The answer is not rude.", "It is harmless.", "I see no problems with it.")),
        *((text, False) for text in ("It does not contain any illegal content.", "The answer is not at all rude.")),
    ],
)
def test_whether_a_critique_finds_anything_is_read_from_its_words(critique, expected):
    assert finds_fault(critique) == expected


def test_principles_and_wordings_depend_on_seed_place_and_round_alone(script, revise):
    def drawn(prompts=PROMPTS, **settings):
        rows, _ = revise(prompts, num_revisions=3, **settings)
        return [[(turn["principle"], turn["critique_request"]) for turn in row["turns"]] for row in rows]

    script.say = lambda prompt: "Yes"
    whole = drawn()
    assert drawn(PROMPTS[:3]) == whole[:3] and drawn(batch_size=7) == whole != drawn(seed=1)
    assert {turn for row in whole for turn in row} == {("harm", "Harm?"), ("kind", "Rude?"), ("kind", "Is it rude?")}


@pytest.mark.slow
def test_greedy_turns_are_those_of_a_slow_loop(revise, make_model, tokenizer):
    model, critic = make_model(), make_model(seed=1)
    rows, _ = revise(num_revisions=2, do_sample=False, model=model, critic=critic, batch_size=3)

    def say(speaker, messages):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = speaker.generate(**ids, do_sample=False, max_new_tokens=4, eos_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    assert [row["prompt"] for row in rows] == [turns(prompt) for prompt in PROMPTS]
    changes = 0
    for row in rows:
        answer = say(model, row["prompt"])
        assert row["rejected"] == turns("", answer)[1:]
        for turn in row["turns"]:
            assert turn["answer"] == answer
            so_far = [*row["prompt"], *turns("", answer, turn["critique_request"])[1:]]
            assert turn["critique"] == say(critic, so_far)
            so_far += turns("", turn["critique"], turn["revision_request"])[1:]
            assert turn["revision"] == say(critic, so_far)
            changes += turn["revision"] != answer
            answer = turn["revision"] or answer
        assert row["messages"] == [*row["prompt"], *row["chosen"]] and row["chosen"] == turns("", answer)[1:]
    assert changes > len(PROMPTS)


def test_prompts_of_like_length_are_sampled_together(script, revise, tokenizer):
    script.say = lambda prompt: "Yes"
    revise(batch_size=8)
    for asked in script.asked:
        lengths = [len(tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"]) for prompt in asked]
        assert lengths == sorted(lengths) and len(set(lengths)) > 1


def test_examples_stand_between_what_the_system_says_and_the_prompt(script, revise):
    script.say = lambda prompt: "Yes"
    examples = [turns("One", "Two"), turns("Three", "Four")]
    system = [{"role": "system", "content": "Speak."}]
    revise([[*system, *turns("Go")]], Constitution([HARM], examples), use_examples=True)
    answered, criticized, revised = (asked[0] for asked in script.asked)
    assert answered == [*system, *turns("Go")]
    assert criticized == [*system, *examples[0], *examples[1], *turns("Go", "Yes", "Harm?")]
    assert revised == [*criticized, *turns("", "Yes", "No harm!")[1:]]
    # A tokenizer with a chat template of its own is taken for that of a model which needs none.
    revise([[*system, *turns("Go")]], Constitution([HARM], examples))
    assert script.asked[4][0] == [*system, *turns("Go", "Yes", "Harm?")]


def test_a_base_model_reads_transcripts_and_stops_at_the_next_turn(script, revise, tokenizer):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    script.say = lambda prompt: " Yes"
    rows, _ = revise(["Go"], Constitution([HARM], [turns("One", "Two")]), tokenizer=base)
    shown = "\n\nHuman: One\n\nAssistant: Two"
    assert [asked[0] for asked in script.asked] == [
        "\n\nHuman: Go\n\nAssistant:",
        f"{shown}\n\nHuman: Go\n\nAssistant: Yes\n\nHuman: Harm?\n\nAssistant:",
        f"{shown}\n\nHuman: Go\n\nAssistant: Yes\n\nHuman: Harm?\n\nAssistant: Yes\n\nHuman: No harm!\n\nAssistant:",
    ]
    assert all(settings["stop_strings"] == ("\n\nHuman:",) for _, settings in script.calls)
    assert rows[0]["messages"] == turns("Go", "Yes")
    base.chat_template = plain_chat_template()
    revise(["Go"], Constitution([HARM], [turns("One", "Two")]), tokenizer=base)
    assert script.asked[-2][0] == turns("One", "Two", "Go", "Yes", "Harm?")
    text = base.apply_chat_template(turns("Go", "Yes", "Harm?"), tokenize=False)
    assert script.calls[-1][1]["stop_strings"] == ("\nUser:\n",) and text.count("\nUser:\n") == 1


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_chunk_gives_the_same_bits(revise, make_model, monkeypatch, tmp_path):
    monkeypatch.setattr(revisions_module, "BATCHES_PER_CHUNK", 1)
    prompts, revise = [*PROMPTS, *PROMPTS[:3]], partial(revise, model=make_model())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    whole = revise(prompts, num_revisions=2, save_to=tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert whole == revise(prompts, num_revisions=2) and whole.rows != revise(prompts, num_revisions=2, seed=1).rows
    written = (tmp_path / "whole" / ROWS_FILE).read_bytes()
    assert [json.loads(line) for line in written.splitlines()] == whole.rows
    append = revisions_module.RevisionFile.append
    for kill in range(6):
        folder, chunks = tmp_path / f"killed{kill}", []

        def stop(file, *chunk, folder=folder, chunks=chunks, kill=kill):
            if len(chunks) == kill:
                # Half of a chunk's rows have been written, the last of them not to its end.
                with (folder / ROWS_FILE).open("a") as stream:
                    stream.write('{"prompt": []}\n{"prom')
                raise KeyboardInterrupt
            chunks.append(chunk)
            append(file, *chunk)

        monkeypatch.setattr(revisions_module.RevisionFile, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            revise(prompts, num_revisions=2, save_to=folder)
        assert len(chunks) == kill
        again = []
        monkeypatch.setattr(
            revisions_module.RevisionFile,
            "append",
            lambda file, *chunk, again=again: (again.append(chunk), append(file, *chunk)),
        )
        assert revise(prompts, num_revisions=2, save_to=folder) == whole
        assert len(again) == 6 - kill and (folder / ROWS_FILE).read_bytes() == written


def test_a_file_that_lost_its_end_is_continued_after_the_last_whole_chunk(revise, monkeypatch, tmp_path):
    monkeypatch.setattr(revisions_module, "BATCHES_PER_CHUNK", 1)
    whole = revise(save_to=tmp_path)
    written = (tmp_path / ROWS_FILE).read_bytes()
    (tmp_path / ROWS_FILE).write_bytes(written[:-5])
    assert revise(save_to=tmp_path) == whole and (tmp_path / ROWS_FILE).read_bytes() == written


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seed": 1}, "seed=0, this run has seed=1"),
        ({"prompts": PROMPTS[:5]}, "other prompts"),
        ({"constitution": Constitution([HARM])}, "another constitution"),
        ({"critic": "other"}, "other weights of the critic"),
        ({"model": "other"}, "other weights of the model"),
        ({"response_length": 5}, "response_length=4, this run has response_length=5"),
        ({"is_flagged": str.isupper}, "is_flagged='finds_fault', this run has is_flagged='str.isupper'"),
    ],
)
def test_another_runs_file_is_refused_by_the_first_difference(revise, make_model, tmp_path, other, difference):
    revise(save_to=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = {name: make_model(seed=7) if value == "other" else value for name, value in other.items()}
    with pytest.raises(InputError, match=f"{ROWS_FILE} holds revisions made with {difference}: choose"):
        revise(save_to=tmp_path, **other)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_which_nothing_is_known_are_not_touched(revise, tmp_path):
    (tmp_path / ROWS_FILE).write_text("mine")
    with pytest.raises(InputError, match=r"revisions.jsonl would be overwritten, and no revisions.state"):
        revise(save_to=tmp_path)
    assert (tmp_path / ROWS_FILE).read_text() == "mine"
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(InputError, match=r"revisions.state: damaged"):
        revise(save_to=tmp_path)


def test_prompts_whose_conversation_is_too_long_are_left_out(script, revise, make_model, tokenizer, capsys):
    script.say = lambda prompt: "Yes"
    long, harm = turns("Go", ".", "Harm?", ".", "No harm!"), Constitution([HARM])
    needed = len(tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=True)["input_ids"]) + 12
    model = make_model(max_position_embeddings=needed)
    rows, figures = revise(["Go", "Go Go Go Go", "Go"], harm, model=model)
    assert [row["prompt"] for row in rows] == [turns("Go")] * 2 and figures.dropped == 1 and figures.num_prompts == 3
    assert "constitution: 1 of 3 prompts are left out" in capsys.readouterr().out
    with pytest.raises(InputError, match=rf"no prompt has room .* of {needed} \(model\) and .* takes {needed + 3}$"):
        revise(["Go"], harm, model=model, response_length=5)
    # Sampled text may take more tokens than were sampled: nothing reaches the model that leaves no room for a reply.
    words = ("z " * count for count in range(1, 99))
    filling = next(
        text
        for text in words
        if len(
            tokenizer.apply_chat_template(turns("Go", text.strip(), "Harm?"), add_generation_prompt=True)["input_ids"]
        )
        > needed - 4
    )
    script.say = lambda prompt: filling
    rows, figures = revise(["Go", "Go"], harm, model=model)
    assert rows == [] and figures.dropped == 2 and figures.critiques == 0


def test_bad_input_ends_in_a_line(script, revise, make_model, tokenizer, tmp_path):
    script.say = lambda prompt: "" if prompt[-1]["content"] == "Harm?" else "Yes"
    with pytest.raises(InputError, match="the critic said nothing: all 8 critiques are empty"):
        revise(constitution=Constitution([HARM]), save_to=tmp_path)
    with pytest.raises(InputError, match="no prompts"):
        revise([])
    with pytest.raises(InputError, match="prompt 2 ends with the assistant"):
        revise(["Go", turns("Go", "No")])
    with pytest.raises(InputError, match="num_revisions must be at least 1, got 0"):
        revise(num_revisions=0)
    with pytest.raises(InputError, match="the critic has embeddings for 500 tokens and the model for"):
        revise(critic=make_model(vocab_size=500))
    with pytest.raises(
        InputError, match=r"the tokenizer has .* tokens and model 'HfllmForCausalLM' embeddings for 300"
    ):
        revise(critic=make_model(vocab_size=300), critic_tokenizer=tokenizer)
    with pytest.raises(InputError, match="critic_tokenizer is not the model's"):
        revise(critic_tokenizer=_other_tokenizer(len(tokenizer)))


def _other_tokenizer(size):
    from hfllm.data.tokenizer import train_tokenizer

    return train_tokenizer(["other words for another tokenizer"] * 9, vocab_size=size, model_max_length=256)


def test_a_critic_reads_with_its_own_tokenizer(script, revise, make_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    other = _other_tokenizer(len(tokenizer))
    make_model(seed=1).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    critic = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not the model's: give it as critic_tokenizer"):
        revise(critic=critic)
    script.say = lambda prompt: "Yes"
    revise(critic=critic, critic_tokenizer=other)
    assert [model is critic for model, _ in script.calls[:3]] == [False, True, True]


@pytest.mark.slow
def test_trl_takes_the_rows(revise, make_model, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows, _ = revise(constitution=load_constitution("world"), num_revisions=2, response_length=8)
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 1}
    for trainer, config, others in ((SFTTrainer, SFTConfig, {}), (DPOTrainer, DPOConfig, {"ref_model": make_model()})):
        model = make_model()
        before = model.model.layers[0].mlp.down_proj.weight.clone()
        args = config(str(tmp_path), save_strategy="no", learning_rate=1e-3, disable_tqdm=True, **settings)
        data = Dataset.from_list(rows)
        trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **others).train()
        assert not torch.equal(before, model.model.layers[0].mlp.down_proj.weight), trainer


def test_first_answers_are_sampled_at_one_whatever_the_temperature(script, revise):
    script.say = lambda prompt: "Bad."
    revise(["Go"], num_revisions=2, temperature=0.25)
    assert [settings["temperature"] for _, settings in script.calls] == [1.0, 0.25, 0.25, 0.25, 0.25]
    with pytest.raises(InputError, match="temperature must be above 0, got 0"):
        revise(["Go"], temperature=0)
