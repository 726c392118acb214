"""The trained tokenizer: lossless, with a template that marks what the assistant says and ends its turn."""

import copy
import json

import pytest
import regex
from jinja2 import TemplateError
from transformers import AutoTokenizer

from hfllm.data.tokenizer import plain_chat_template, tokenize_prompts, train_tokenizer
from hfllm.errors import InputError

CHAT = [
    {"role": "user", "content": "What colour is the fox?"},
    {"role": "assistant", "content": "The fox is red."},
]


@pytest.mark.parametrize("text", ["The fox is red.", "naïve 漢字 🙂\t\n  two  spaces", "<|end|", "0123"])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_ends_a_turn_with_the_end_token(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|user|>What colour is the fox?<|end|><|assistant|>The fox is red.<|end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize("template", [None, plain_chat_template()])
def test_generation_markers_cover_the_answer_and_its_end_token(tokenizer, template):
    encoded = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "The fox is red.<|end|>"


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", [None, plain_chat_template()], ids=["ours", "plain"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_content_as_a_list_of_parts_is_the_content_as_a_string(tokenizer, template, add_generation_prompt):
    chat = [{"role": "system", "content": "Be kind."}, *CHAT, {"role": "user", "content": ""}]
    lists = [{**message, "content": parts(message["content"])} for message in chat]
    lists[1]["content"] = parts("What colour", " is", " the fox?")
    lists[3]["content"] = []
    options = {
        **{"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True},
        "add_generation_prompt": add_generation_prompt,
    }
    expected = tokenizer.apply_chat_template(chat, **options)
    assert sum(expected["assistant_masks"]) > 0
    assert tokenizer.apply_chat_template(lists, **options) == expected


@pytest.mark.parametrize("template", [None, plain_chat_template()], ids=["ours", "plain"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*parts("See: "), {"type": "image", "url": "fox.png"}], "this model reads text alone: .*'image'"),
        ([{"type": "text"}], "this model reads text alone"),
        (["fox"], "this model reads text alone.*fox"),
        ({"type": "text", "text": "fox"}, "content must be a string or a list"),
        (None, "a message has no content"),
        (3, "content must be a string or a list.*3"),
    ],
)
def test_content_that_is_not_text_is_refused(tokenizer, template, role, content, message):
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template([{"role": role, "content": content}], chat_template=template, tokenize=False)


def test_it_splits_text_as_the_tokenizer_of_gpt2_does(tokenizer):
    """llama.cpp's pre-tokenizer `gpt-2` is the right one for it if nothing else changes text or adds tokens."""
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert backend["normalizer"] is None and not backend["model"]["ignore_merges"]
    assert tokenizer("")["input_ids"] == []
    text = "We've  2 foxes,\t(naïve 漢字 १२ 🙂)!!\r\n \n  don't DON'T ½e\u0301 \u3000x "
    pieces = [text[start:end] for _, (start, end) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == regex.findall(published, text)


def test_it_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CHAT)["input_ids"] == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<|pad|>", "<|endoftext|>", "<|end|>")
    assert loaded.model_max_length == 256


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        train_tokenizer(["text"], vocab_size=100)


@pytest.mark.parametrize("run", ["x", "\n"])
def test_no_merge_is_learned_across_a_cut_of_a_word_without_end(run):
    tokenizer = train_tokenizer(["the fox " * 20, run * 20_000], 300)
    assert max(map(len, tokenizer.get_vocab())) <= 1000
    assert tokenizer.decode(tokenizer(run * 20_000)["input_ids"]) == run * 20_000


def test_special_tokens_in_the_texts_cost_no_merges_and_are_read_as_tokens():
    texts = ["Mia says plum fig pear. Tom says hat."] * 20
    marked = [f"<|user|>{text}<|end|><|assistant|>{text}<|end|>" for text in texts]
    chats = train_tokenizer(marked, 300)
    assert "user" not in "".join(token for token in chats.get_vocab() if "<|" not in token)
    assert chats.convert_ids_to_tokens(chats(marked[0])["input_ids"])[0] == "<|user|>"


def test_prompts_with_tools_have_the_tokens_that_each_has_alone(tokenizer):
    """Whether neighbors show one list of tools, equal ones, JSON text, others or none."""
    red, blue = ([{"type": "function", "function": {"name": name, "description": ""}}] for name in ("red", "blue"))
    shown = [red, red, copy.deepcopy(red), json.dumps(red), None, None, blue, red, [], blue[0:1]]
    prompts = [[{"role": "user", "content": f"{number} owls"}] for number in range(len(shown))]
    alone = [tokenize_prompts([prompt], tokenizer, [each])[0] for prompt, each in zip(prompts, shown, strict=True)]
    assert tokenize_prompts(prompts, tokenizer, shown) == alone
    texts = [tokenizer.decode(ids) for ids in alone]
    assert ["red" in text for text in texts] == [True] * 4 + [False] * 3 + [True] + [False] * 2
    assert ["blue" in text for text in texts] == [False] * 6 + [True] + [False] * 2 + [True]


def test_an_answer_that_has_begun_stays_open(tokenizer):
    begun = [CHAT[0], {"role": "assistant", "content": "The fox"}]
    closed, open_, again = tokenize_prompts([CHAT[:1], begun, CHAT[:1]], tokenizer)
    assert tokenizer.decode(open_) == "<|user|>What colour is the fox?<|end|><|assistant|>The fox"
    assert closed == again == tokenize_prompts([CHAT[:1]], tokenizer)[0]
    assert open_[: len(closed)] == closed


def test_a_template_that_leaves_answers_out_cannot_continue_them(tokenizer):
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match=r"cannot leave the assistant's turn open.*'Sure, first'.*--augment 0"):
        tokenize_prompts([[*CHAT[:1], {"role": "assistant", "content": "Sure, first"}]], deaf)
