"""The trained tokenizer: lossless, with a template that marks what the assistant says and ends its turn."""

import pytest
from transformers import AutoTokenizer

from hfllm.data.tokenizer import plain_chat_template, train_tokenizer

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
