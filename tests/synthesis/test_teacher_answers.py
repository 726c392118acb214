"""Answers of a teacher: whose they are, where they end, and which are left out."""

import pytest

from hfllm.errors import InputError
from hfllm.generation import responses
from hfllm.synthesis.answers import write_answers


def test_the_teachers_answers_take_the_place_of_the_datas(tokenizer, make_model):
    rows = [{"prompt": [{"role": "user", "content": "Go"}], "completion": [{"role": "assistant", "content": "No"}]}]
    rows += [{"text": "The fox."}]
    settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(rows[0]["prompt"], **settings)
    model = make_model()
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :].tolist()
    # What ends an answer may be known to the model's generation config alone.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[-1]]
    written = write_answers(model, tokenizer, rows, 5, do_sample=False, seed=0)
    said = tokenizer.decode(ids[: ids.index(ids[-1]) + 1], skip_special_tokens=True)
    assert written == [{**rows[0], "completion": [{"role": "assistant", "content": said}]}, rows[1]]
    model.generation_config.eos_token_id = list(range(len(tokenizer)))[::3]
    first, again, other = (write_answers(model, tokenizer, rows, 20, True, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_answers_that_are_cut_off_are_left_out(tokenizer, make_model, monkeypatch, capsys):
    rows = [{"prompt": word, "completion": "No"} for word in "abc"]
    model = make_model()
    answers = [["Yes"], [], ["Perhaps"]]
    monkeypatch.setattr(responses, "sample_responses", lambda *_, only_ended, **__: answers)
    written = write_answers(model, tokenizer, rows, 4, do_sample=True, seed=0)
    assert written == [{"prompt": "a", "completion": "Yes"}, {"prompt": "c", "completion": "Perhaps"}]
    assert "1 of 3 answers of the teacher are left out: longer than 4" in capsys.readouterr().out
    answers = [[], [], []]
    with pytest.raises(InputError, match="none of the teacher's answers ends within --response_length 4"):
        write_answers(model, tokenizer, rows, 4, do_sample=True, seed=0)


def test_prompts_that_leave_no_room_are_left_out(tokenizer, make_model, capsys):
    rows = [{"prompt": "a " * count, "completion": "No"} for count in (50, 5, 40)]
    shortest, longest = (len(tokenizer(rows[index]["prompt"])["input_ids"]) for index in (1, 2))
    model = make_model(max_position_embeddings=longest + 4)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    written = write_answers(model, tokenizer, rows, 4, do_sample=True, seed=0)
    assert [row["prompt"] for row in written] == [rows[1]["prompt"], rows[2]["prompt"]]
    assert f"1 of 3 prompts are left out: longer than {longest} tokens" in capsys.readouterr().out
    left = longest + 4 - shortest
    message = f"no prompt has room for --response_length {longest + 4} in .*: the shortest leaves {left}$"
    with pytest.raises(InputError, match=message):
        write_answers(model, tokenizer, rows, longest + 4, do_sample=True, seed=0)


def test_a_teacher_sees_the_tools_and_its_student_too(tokenizer, make_model, monkeypatch):
    asked, tool = [], {"type": "function", "function": {"name": "add", "description": "Add two numbers."}}

    def sample_responses(*args, tools, **settings):
        asked.extend(tools)
        return [["3"] for _ in tools]

    monkeypatch.setattr(responses, "sample_responses", sample_responses)
    rows = [{"prompt": [{"role": "user", "content": "Go"}], "tools": tools} for tools in ([tool], None)]
    written = write_answers(make_model(), tokenizer, rows, 4, do_sample=True, seed=0)
    assert asked == [[tool], None]
    assert [row.get("tools") for row in written] == [[tool], None]
