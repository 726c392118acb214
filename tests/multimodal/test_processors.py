"""A processor writes as many image tokens as the tower gives vectors, loads again, and must fit."""

import copy

import numpy
import pytest
import torch
import transformers
from PIL import Image
from seeing import TOWERS

import hfllm
from hfllm.data.tokenizer import BUILT_IN, plain_chat_template, set_built_in
from hfllm.errors import InputError
from hfllm.multimodal.processors import IMAGE_TOKEN, check_processor, output_size


@pytest.fixture
def tokens(tokenizer):
    return copy.deepcopy(tokenizer)


def picture(seed=0, size=(50, 40), mode="RGB"):
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).convert(mode)


def asked(*pictures):
    parts = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


READ = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.mark.parametrize("tower", TOWERS)
def test_it_fits_its_tower_and_loads_again(make_model, tokens, tmp_path, tower):
    config = TOWERS[tower]()
    processor = hfllm.vision_processor(tokens, config)
    model = hfllm.with_vision(make_model(), config, image_token_id=processor.image_token_id)
    inputs = processor.apply_chat_template([asked(picture(), picture(1, (7, 300), "CMYK"))], **READ)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * 16
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    text = tokens.decode(inputs["input_ids"][0]).replace(IMAGE_TOKEN, "")
    assert text == "<|user|>What is it?<|end|><|assistant|>"
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    check_processor(processor, config)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor).__name__.endswith("Pil")
    repeated = again.apply_chat_template([asked(picture(), picture(1, (7, 300), "CMYK"))], **READ)
    assert all(torch.equal(inputs[name], repeated[name]) for name in inputs)


@pytest.mark.parametrize("name", BUILT_IN)
def test_our_templates_learn_pictures_and_keep_the_rest(tokens, name):
    if missing := [each for each in BUILT_IN[name].needs if each not in tokens.get_vocab()]:
        tokens.add_tokens(missing, special_tokens=True)
    set_built_in(tokens, name)
    processor = hfllm.vision_processor(tokens, TOWERS["siglip"]())
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert processor.apply_chat_template(turns, tokenize=False) == tokens.apply_chat_template(turns, tokenize=False)
    both = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert f"a{IMAGE_TOKEN}b" in processor.apply_chat_template([{"role": "user", "content": both}], tokenize=False)
    for part in ({"type": "video"}, {"type": "text"}, "a", {"text": "a"}):
        with pytest.raises(Exception, match="must be"):
            processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)


def test_the_image_token_is_added_once(tokens):
    before = len(tokens)
    first = hfllm.vision_processor(tokens, TOWERS["siglip"]())
    second = hfllm.vision_processor(tokens, TOWERS["clip"]())
    assert first.image_token_id == second.image_token_id == before and len(tokens) == before + 1
    assert tokens.decode([before], skip_special_tokens=True) == ""
    tokens.chat_template = plain_chat_template()
    hfllm.vision_processor(tokens, TOWERS["clip"]())


def test_more_or_fewer_pictures_than_places_are_refused(tokens):
    processor = hfllm.vision_processor(tokens, TOWERS["siglip"]())
    text = f"{IMAGE_TOKEN}a"
    for pictures in ([], [picture(), picture(1)]):
        with pytest.raises(ValueError, match="image") as error:
            processor(text=[text], images=pictures or None)
        assert "\n" not in str(error.value)


def test_a_processor_that_does_not_fit_is_refused(tokens):
    tower = TOWERS["siglip"]()
    larger = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    with pytest.raises(InputError, match=r"48x48 pixels and the vision tower takes 32x32"):
        hfllm.vision_processor(tokens, tower, image_processor=larger)
    processor = hfllm.vision_processor(tokens, tower)
    for change, message in (
        ({"patch_size": 4}, "patch_size=4 and the vision tower 8"),
        ({"num_additional_image_tokens": 1}, "num_additional_image_tokens=1 and the vision tower 0"),
    ):
        wrong = copy.copy(processor)
        vars(wrong).update(change)
        with pytest.raises(InputError, match=message):
            check_processor(wrong, tower)
    with pytest.raises(InputError, match="'t5' has no image_size and patch_size"):
        hfllm.vision_processor(tokens, transformers.T5Config())
    tokens.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(InputError, match="give chat_template="):
        hfllm.vision_processor(tokens, tower)
    assert output_size(transformers.CLIPImageProcessorPil()) == (224, 224)
