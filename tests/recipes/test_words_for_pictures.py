"""Words that spell the token of a picture's place: such rows are left out and counted, and prompts named."""

import json

import pytest
import reward
import rlhf
import sft
from seeing_rows import halves, make_processor, write_rows

from hfllm.data.formats import unspelled
from hfllm.data.images.rows import ImageReading, conversation_batch, words_of_places
from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Subject
from hfllm.models.loading.saved import max_length_of
from hfllm.multimodal.processors import encode
from hfllm.stages.evaluate import build as evaluate
from hfllm.stages.reward import build as reward_module
from hfllm.stages.rlhf import build as rlhf_build
from hfllm.stages.rlhf.build import prompt_data, refuse_words
from hfllm.stages.sft import build as sft_build

# One is also how datasets mark a place.
TOKENS = ("<image>", "<|image|>")
COUNTED = "1 with words for a picture"


@pytest.fixture(params=TOKENS)
def processor(request):
    return make_processor(request.param)


def parsed(stage, seeing_folder, rows, output, **flags):
    given = {"model_name_or_path": seeing_folder / "model", "dataset_name": rows, "output_dir": output, **flags}
    return stage.parse([each for name, value in given.items() for each in (f"--{name}", str(value))])


def write(folder, rows, pictures=4, is_pair=False):
    """Write rows of text after some with pictures; the last row is the one that spells the token."""
    path = write_rows(folder, halves(4), is_pair)
    lines = path.read_text().splitlines()[:pictures] + list(map(json.dumps, rows))
    path.write_text("\n".join(lines))
    return path


def is_refused(processor, row, side):
    """Whether the processor cannot read a row, which is what such rows came to."""
    try:
        conversation_batch(processor, [[*row["prompt"], *row[side]]], [()])
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("pictures", [0, 4])
@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_rows_to_learn_from(processor, seeing_folder, tmp_path, capsys, pictures, side):
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("left", "right")]
    bad = {"prompt": "say", "completion": "side"} | {side: f"say {processor.image_token} bright"}
    path = write(tmp_path, [*rows, bad], pictures)
    script_args, args, _ = parsed(sft, seeing_folder, path, tmp_path / "out")
    train, held_out = sft_build.instruction_data(script_args, 0, args.seed, "m", processor)
    assert len(train) + len(held_out) == 2 + pictures
    assert f"{COUNTED} ({path}, line {3 + pictures})" in capsys.readouterr().out
    said = {"prompt": [{"role": "user", "content": bad["prompt"]}]}
    said["completion"] = [{"role": "assistant", "content": bad["completion"]}]
    assert is_refused(processor, said, "completion")
    script_args, args, _ = parsed(sft, seeing_folder, path, tmp_path / "out", bad_rows="refuse")
    with pytest.raises(InputError, match=f"line {3 + pictures}: the words spell ") as error:
        sft_build.instruction_data(script_args, 0, args.seed, "m", processor)
    assert processor.image_token in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pictures", [0, 4])
def test_comparisons(processor, seeing_folder, tmp_path, capsys, pictures):
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": "is"} for word in ("left", "right")]
    rows.append({"prompt": "say", "chosen": "side", "rejected": f"say {processor.image_token}"})
    path = write(tmp_path, rows, pictures, is_pair=True)
    script_args, args, _ = parsed(reward, seeing_folder, path, tmp_path / "out")
    reading = script_args.image_reading(words_of_places(processor))
    parts = reward_module.user_comparisons(script_args.row_sources, reading, script_args.augment, args.seed)
    assert sum(map(len, parts)) == 2 + pictures and COUNTED in capsys.readouterr().out


def test_questions_of_the_evaluation(seeing_folder, tmp_path, monkeypatch, capsys):
    """Asked of two models with different tokens: neither gets a question that it cannot read."""
    processors = {f"m{place}": make_processor(token) for place, token in enumerate(TOKENS)}
    monkeypatch.setattr("hfllm.stages.evaluate.build.processor_of", processors.__getitem__)
    path = write_rows(tmp_path, halves(4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["prompt"] = "<image> say <|image|>"
    # Of answers nothing is read.
    lines[2]["completion"] = "<|image|>"
    path.write_text("\n".join(map(json.dumps, lines)))
    questions = evaluate.own_questions(str(path), list(processors), ImageReading())
    assert [asked.answer for asked in questions] == [lines[place]["completion"] for place in (0, 2, 3)]
    assert f"{COUNTED} ({path}, line 2)" in capsys.readouterr().out
    for each in processors.values():
        conversation_batch(
            each, [asked.prompt for asked in questions], [[row["image"]] for row in halves(3)], "left", True
        )


@pytest.mark.parametrize("form", ["text", "conversation", "beside a picture"])
def test_prompts_are_named_or_left_out(processor, seeing_folder, tmp_path, capsys, form):
    (tmp_path / "my.py").write_text("def score(completions, **columns):\n    return [1.0] * len(completions)\n")
    said = f"say {processor.image_token}"
    # Beside a picture one of the marks of a dataset would be a place.
    bad = {"text": said, "conversation": [{"role": "user", "content": said}]}.get(form, f"<image> {said}")
    asked = [f"say {word}" for word in ("left", "right", "is")]
    rows = [{"prompt": [{"role": "user", "content": text}] if form == "conversation" else text} for text in asked]
    image = {"image": "0.png"} if form == "beside a picture" else {}
    if image and processor.image_token == "<image>":
        pytest.skip("these are two places, which is another complaint")
    path = write(tmp_path, [*rows, {"prompt": bad, **image}], pictures=0)
    flags = {"reward_funcs": f"{tmp_path / 'my.py'}:score", "response_length": 2, "filter_prompts": "true"}
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((seeing_folder / "model" / "config.json").read_text())
    script_args, args, model_args = parsed(rlhf, tmp_path, path, tmp_path / "out", **flags)
    rows = [row for part in prompt_data(script_args, args.seed, []) for row in part]
    with pytest.raises(InputError, match=r"line 4: the words spell .*--filter_prompts") as error:
        refuse_words(rows, processor)
    assert processor.image_token in str(error.value) and "\n" not in str(error.value)
    room = rlhf_build.Room(processor, args.response_length, max_length_of(rlhf_config(model_args)))
    kept = rlhf_build.fitting_prompts(rows, room, script_args.dataset_name)
    assert len(kept) == 3 and COUNTED in capsys.readouterr().out and not refuse_words(kept, processor)
    if form != "text":
        with pytest.raises(InputError, match="line 4: the words spell"):
            encode(rows, processor)


def rlhf_config(model_args):
    from hfllm.runs.models import load_config

    return load_config(model_args.model_name_or_path)


def test_a_tokenizer_of_text_has_no_such_token(processor):
    refuse_words([{"prompt": f"say {processor.image_token}"}], processor.tokenizer)


def test_other_suites_ask_with_a_space_in_it(processor, monkeypatch):
    monkeypatch.setattr(Subject, "__post_init__", lambda subject: None)
    subject = Subject("m", None, processor.tokenizer, uses_chat_template=True, processor=processor)
    said = f"say {processor.image_token} left"
    prompts = [said, [{"role": "user", "content": said}, {"role": "assistant", "content": said}]]
    for uses in (True, False):
        subject.uses_chat_template = uses
        for prompt in prompts:
            (pair,) = subject.pairs(prompt, [f" {said}"])
            number = processor.image_token_id
            assert number not in pair.context and number not in pair.continuation
    assert unspelled([processor.image_token], said) == said.replace("<", "< ") and unspelled([], said) == said
    text = Subject("m", None, processor.tokenizer, uses_chat_template=False)
    assert text.as_asked(said) == said
