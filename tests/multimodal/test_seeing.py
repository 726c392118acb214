"""A decoder with a vision tower computes what its parts compute, and is a stock model to the usual tools."""

import copy

import pytest
import torch
import transformers
from seeing import HEADS, IMAGE, PATCHES, TEXTS, TOWERS, prompts, seeing
from transformers import StaticCache

import hfllm
from hfllm.errors import InputError
from hfllm.models.conversion.convert import vision_config_to_native
from hfllm.multimodal.composed import idle_media_parameters

EVERY = {**TEXTS, **HEADS}


def embedded(model, inputs):
    """The decoder's input, by hand: tower, projector, and their vectors in the places of image tokens."""
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    projector = model.model.multi_modal_projector
    vectors = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(tower)))
    states = model.get_input_embeddings()(inputs["input_ids"]).clone()
    states[inputs["input_ids"] == IMAGE] = vectors.flatten(0, 1)
    return states


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_text_alone_and_losses_are_those_of_the_text_model(make_model, name):
    text = make_model(**EVERY[name])
    model, inputs = seeing(text), prompts()
    ids = inputs["input_ids"].where(inputs["input_ids"] != IMAGE, 7)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, text(ids).logits)
    labels = inputs["input_ids"].where(inputs["input_ids"] != IMAGE, -100)
    model.train(), text.train()
    options = {"labels": labels, "num_items_in_batch": torch.tensor(9), "label_smoothing": 0.1}
    for more in (options, {**options, "loss_chunk_size": 0}, {"labels": labels}):
        ours = model(**inputs, **more)
        alone = text(inputs_embeds=embedded(model, inputs), **more)
        assert torch.equal(ours.loss, alone.loss)
        assert (ours.logits is None) == (alone.logits is None)
        if model.config.text_config.num_local_experts:
            assert torch.equal(ours.aux_loss, alone.aux_loss) and ours.aux_loss > 0
            # It is in the loss.
            assert ours.loss.item() != model.eval()(**inputs, **more).loss.item()
            model.train()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXTS, "scaled"])
def test_caches_padding_and_pictures_in_a_row_change_nothing(make_model, name):
    model = seeing(make_model(**EVERY[name]))
    for images in (0, 1, 2):
        inputs = prompts(images=images)
        fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        new = model.generate(**inputs, **fixed)[:, -5:]
        assert torch.equal(new, model.generate(**inputs, **fixed, use_cache=False)[:, -5:])
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(new, model.generate(**inputs, **fixed, **static)[:, -5:])
        pad = torch.full((2, 4), model.config.text_config.pad_token_id)
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(inputs["input_ids"])], 1)
        padded = {**inputs, "input_ids": torch.cat([pad, inputs["input_ids"]], 1), "attention_mask": mask}
        assert torch.equal(new, model.generate(**padded, **fixed)[:, -5:])


def test_rows_are_their_own(make_model):
    """A row with two pictures, one with none and one with one give what each gives alone."""
    model, inputs = seeing(make_model()), prompts(batch=3, images=2)
    ids = inputs["input_ids"].clone()
    ids[1, ids[1] == IMAGE] = 9
    ids[2, 2 : 2 + PATCHES] = 9
    pixels = inputs["pixel_values"][:3]
    with torch.no_grad():
        together = model(ids, pixel_values=pixels).logits
        for row, part in enumerate((pixels[:2], None, pixels[2:])):
            torch.testing.assert_close(together[row : row + 1], model(ids[row : row + 1], pixel_values=part).logits)
        # Seen: other pictures give other logits after them, and the same before.
        other = model(ids, pixel_values=pixels.flip(0)).logits
    assert torch.equal(other[:, :2], together[:, :2]) and torch.equal(other[1], together[1])
    assert (other[0, -1] - together[0, -1]).abs().max() > 1e-3


def test_beams_keep_the_pictures_of_their_row(make_model):
    model, inputs = seeing(make_model()), prompts(batch=3, images=2)
    ids = inputs["input_ids"].clone()
    ids[1, ids[1] == IMAGE] = 9
    pixels, fixed = inputs["pixel_values"][:4], {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    together = model.generate(ids, pixel_values=pixels, **fixed)
    for row, part in enumerate((pixels[:2], None, pixels[2:])):
        assert torch.equal(together[row], model.generate(ids[row : row + 1], pixel_values=part, **fixed)[0])


def test_it_drafts_for_itself_with_the_pictures(make_model):
    """A draft that is the model itself is right in all its tokens, if it has seen the same."""
    model, inputs = seeing(make_model()), prompts(batch=1)
    fixed = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected, passes = model.generate(**inputs, **fixed), []
    same = copy.deepcopy(model)
    settings = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    same.generation_config.update(num_assistant_tokens=5, **settings)
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(model.generate(**inputs, assistant_model=same, **fixed), expected)
    assert len(passes) == 2


def test_factors_that_change_read_the_pictures_again(make_model):
    """The text is 24 tokens long; at 27 all are rotated otherwise."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 26, "factor": 4.0}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    model, inputs = seeing(make_model(rope_parameters=rope)), prompts()
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    got = model.generate(**inputs, **fixed)
    assert torch.equal(got, model.generate(**inputs, use_cache=False, **fixed))
    assert inputs["input_ids"].shape[1] + 2 == rope["original_max_position_embeddings"]
    with pytest.raises(InputError, match="rope_type='longrope'"):
        vision_config_to_native(model.config)


@pytest.mark.parametrize("tower", TOWERS)
def test_what_cannot_learn_is_named_and_all_else_learns(make_model, tower):
    model = seeing(make_model(), tower)
    idle = set(idle_media_parameters(model))
    inputs = prompts()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    unmoved = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    # The bias of keys moves all scores of a query alike: its gradient is 0, or what rounding leaves of it.
    assert idle == {name for name in unmoved if "key" not in name and "k_proj" not in name}
    assert len(idle) == {"siglip": 13, "clip": 2, "vit": 4, "dinov2": 3}[tower]
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_trained_tower_is_copied_and_nothing_is_shared(make_model):
    text, tower = make_model(), transformers.SiglipVisionModel(TOWERS["siglip"]())
    before = copy.deepcopy(text.state_dict())
    model = hfllm.with_vision(text, tower, image_token_id=IMAGE)
    for name, weight in tower.named_parameters():
        assert torch.equal(weight, model.model.vision_tower.get_parameter(name))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in text.state_dict().items())
    assert text.config.vocab_size == model.config.text_config.vocab_size


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_new_image_token_gets_rows_and_is_never_written(make_model, is_tied):
    text = make_model(tie_word_embeddings=is_tied, lm_head_bias=True)
    rows = text.config.vocab_size
    # What the text model never writes the new one does not, either.
    text.generation_config.suppress_tokens = [7]
    model = hfllm.with_vision(text, TOWERS["siglip"](), image_token_id=rows + 2)
    assert model.generation_config.suppress_tokens == [7, rows + 2]
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows + 3
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == is_tied
    for new, table in ((model.get_input_embeddings(), text.get_input_embeddings()), (model.lm_head, text.lm_head)):
        torch.testing.assert_close(new.weight[rows:], table.weight.mean(0).expand(3, -1))
    ids = prompts(images=0)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :rows], text(ids).logits)
        model.lm_head.bias[rows + 2] = 1e3
    assert (model.generate(ids, max_new_tokens=3, do_sample=False) < rows + 2).all()


def test_a_native_text_model_gets_its_own_class(make_model):
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **{**WIDTHS, "head_dim": 8})).eval()
    model, ids = seeing(text), prompts(images=0)["input_ids"]
    assert type(model) is transformers.LlavaForConditionalGeneration
    with torch.no_grad():
        assert torch.equal(model(ids).logits, text(ids).logits)


WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
def test_tools_take_it_as_any_model(make_model):
    from peft import LoraConfig, get_peft_model

    model, inputs = seeing(make_model(num_local_experts=4)), prompts()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
        assert (
            model.to(torch.bfloat16)(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
            .logits.isfinite()
            .all()
        )
        model.float()
    called = []
    handle = model.model.language_model.layers[0].register_forward_hook(lambda *_: called.append(1))
    model(**inputs)
    handle.remove()
    assert called
    model = seeing(make_model(num_local_experts=4)).train()
    plain = model(**inputs, labels=inputs["input_ids"]).loss
    model.gradient_checkpointing_enable()
    checkpointed = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(plain, checkpointed)
    checkpointed.backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.any()
    adapted = get_peft_model(seeing(make_model()), LoraConfig())
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("language_model.layers.1.self_attn.v_proj.lora_B" in name for name in trained)
    assert model.get_decoder() is model.model.language_model


@pytest.mark.slow
def test_a_step_with_a_static_cache_is_traced_whole(make_model):
    model, ids = seeing(make_model()), prompts()["input_ids"][:, -6:]
    expected = model(ids).logits[:, -1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(ids[:, :-1], cache=cache)
        found = step(ids[:, -1:], cache=cache, position_ids=torch.full((len(ids), 1), 5)).logits[:, -1]
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.turn(2)
def test_it_compiles_whole(make_model):
    model, inputs = seeing(make_model()), prompts()
    expected = model(**inputs, labels=inputs["input_ids"]).loss
    compiled = torch.compile(model, fullgraph=True)(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(compiled, expected)


@pytest.mark.slow
def test_it_trains_in_int8_with_adapters(make_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    inputs = prompts()
    seeing(make_model()).save_pretrained(tmp_path)
    quantized = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quantized)
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    adapted = get_peft_model(model, LoraConfig())
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs["input_ids"][:, :4], "4 image tokens .* and their pictures have 32 vectors"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"][:1]}, "32 image tokens .* have 16 vectors"),
        (lambda inputs: {"pixel_values": None}, "32 image tokens .* and no pictures"),
        (lambda inputs: {"pixel_values": torch.zeros(2, 3, 48, 48)}, "48x48 pixels do not fit .* 32x32"),
        (lambda inputs: {"mm_encoder_outputs": {"image": 1}}, "both"),
    ],
)
def test_pictures_that_do_not_fit_the_prompt_are_refused_in_a_line(make_model, change, message):
    model, inputs = seeing(make_model()), prompts()
    changed = change(inputs)
    inputs |= changed if isinstance(changed, dict) else {"input_ids": changed}
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=message) as error:
            call(**inputs)
        assert "\n" not in str(error.value)


def test_models_that_cannot_see_are_refused_in_a_line(make_model):
    from peft import LoraConfig, get_peft_model

    tower, text = TOWERS["siglip"](), make_model()
    for wrong, message in (
        (make_model(model_class=hfllm.HfllmForSequenceClassification), "causal language model"),
        (make_model(model_class=hfllm.HfllmForMaskedLM, is_causal=False), "causal language model"),
        (get_peft_model(make_model(), LoraConfig()), "adapters must be merged"),
    ):
        with pytest.raises(InputError, match=message):
            hfllm.with_vision(wrong, tower, image_token_id=IMAGE)
    for options, message in (
        ({"vision_feature_layer": 9}, "vision_feature_layer=9"),
        ({"image_token_id": -1}, "image_token_index=-1"),
        ({"vision_feature_select_strategy": "first"}, "vision_feature_select_strategy"),
    ):
        with pytest.raises(InputError, match=message):
            hfllm.with_vision(text, tower, **{"image_token_id": IMAGE, **options})
    with pytest.raises(InputError, match=r"leaves out logit_scale=0\.5"):
        seeing(make_model(logit_scale=0.5), config_class=transformers.LlavaConfig)
    for wrong, message in (
        ("google/siglip", "expected a tower.*google/siglip"),
        (transformers.SiglipConfig(), "no hidden_size: it is no tower"),
        (transformers.LlamaConfig(), "no patch_size: it is no tower"),
    ):
        with pytest.raises(InputError, match=message) as error:
            hfllm.with_vision(text, wrong, image_token_id=IMAGE)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="sees and hears nothing"):
        idle_media_parameters(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["text_config"].update(model_type="llama"), "model_type='llama'"),
        (lambda values: values["text_config"].update(is_causal=False), "is_causal"),
        (lambda values: values.update(vision_feature_layer=[]), "must name a layer"),
        (lambda values: values.update(image_token_index=10**9), "image_token_index"),
        (lambda values: values.update(vision_config={"model_type": "t5"}), "it is no tower|Unrecognized"),
        (lambda values: values.update(vision_config={"model_type": "../../x"}), "Unrecognized model type"),
    ],
)
def test_a_hostile_config_is_refused(make_model, tmp_path, change, message):
    import json

    from hfllm.models.loading.saved import saved_model

    seeing(make_model()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises((InputError, ValueError), match=message):
        saved_model(transformers.AutoModelForImageTextToText, str(tmp_path))
