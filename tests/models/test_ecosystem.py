"""The tools around transformers load the family by its name: pipelines, the chat server, generation, lm-eval."""

import json

import pytest
import torch
from families import FAMILIES
from transformers import QuantizedCache, pipeline

import hfllm

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}


@pytest.fixture(params=["llama", "mistral", "gpt2", "mixtral"])
def model(make_model, request):
    return make_model(**FAMILIES[request.param])


@pytest.fixture
def ids():
    return torch.randint(10, 300, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("task", "head", "more"),
    [
        ("text-generation", "ForCausalLM", {}),
        ("text-classification", "ForSequenceClassification", {"num_labels": 3}),
        ("token-classification", "ForTokenClassification", {"num_labels": 3}),
        ("fill-mask", "ForMaskedLM", {"is_causal": False}),
    ],
)
def test_pipelines(make_model, tokenizer, tmp_path, task, head, more):
    make_model(model_class=getattr(hfllm, f"Hfllm{head}"), **more).save_pretrained(tmp_path)
    if task == "fill-mask":
        tokenizer = type(tokenizer).from_pretrained(save(tokenizer, tmp_path), mask_token="<mask>")
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(tmp_path)
    text = f"Say {tokenizer.mask_token}" if task == "fill-mask" else "Say red."
    result = pipeline(task, str(tmp_path))(text, **({"max_new_tokens": 3} if task == "text-generation" else {}))
    assert isinstance(result, list) and result[0]


def save(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_the_chat_server_loads_it(folder):
    from transformers.cli.serving import model_manager

    # As of transformers 5.25 a class of its own loads, and reads the modality from the config.
    loader = getattr(model_manager, "ModelLoader", model_manager.ModelManager)(device="cpu", dtype="float32")
    model, processor = loader.load_model_and_processor(folder)
    assert type(model) is hfllm.HfllmForCausalLM
    is_new = hasattr(model_manager, "ModelLoader")
    assert loader.get_model_modality(model.config if is_new else model, processor=processor).name == "LLM"


class TestGeneration:
    def test_sampling_is_reproducible(self, model, ids):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_p=0.9, pad_token_id=0))
        assert torch.equal(*runs)

    def test_beams_score_at_least_greedy(self, model, ids):
        greedy = model.generate(ids, **GREEDY)
        beams = model.generate(ids, num_beams=4, **GREEDY)

        def score(tokens):
            scores = model(tokens).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
            return scores.gather(2, tokens[:, ids.shape[1] :, None]).sum()

        assert score(beams) >= score(greedy) - 1e-4

    def test_assisted_generation_is_lossless(self, model, ids, make_model):
        draft = make_model(seed=1, num_hidden_layers=1)
        assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), model.generate(ids, **GREEDY))

    def test_prompt_lookup_is_lossless(self, model, ids):
        repeated = torch.cat((ids, ids), 1)
        expected = model.generate(repeated, **GREEDY)
        assert torch.equal(model.generate(repeated, prompt_lookup_num_tokens=3, **GREEDY), expected)

    def test_quantized_cache_is_close(self, model, ids):
        if model.config.sliding_window:
            with pytest.raises(ValueError, match="only full attention"):
                QuantizedCache("fp8", model.config)
            return
        cache = QuantizedCache("fp8", model.config)
        model(ids[:, :-1], cache=cache)
        exact, rounded = model(ids).logits[:, -1], model(ids[:, -1:], cache=cache).logits[:, -1]
        assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
def test_continuous_batching_equals_generate(model, ids):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    expected = model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist()
    settings = GenerationConfig(**{**GREEDY, "eos_token_id": -1})
    # By default it takes most of the machine's memory.
    small = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)}
    answers = model.generate_batch([ids[0].tolist()], generation_config=settings, **small)
    assert [answer.generated_tokens for answer in answers.values()] == [expected]


def assert_flex_equals_sdpa(model, ids):
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_flex_attention_equals_sdpa(model, ids, monkeypatch):
    from torch.nn.attention.flex_attention import create_mask
    from transformers import masking_utils

    called, make_mask = [], masking_utils.create_block_mask

    def plainly(query, key, value, block_mask, scale, **more):
        """What the kernel computes; compiling it takes half a minute of CPU."""
        called.append(more["enable_gqa"])
        mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    def uncompiled(*args, _compile, **kwargs):
        return make_mask(*args, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", plainly)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)
    assert_flex_equals_sdpa(model, ids)
    assert called == [True, True]


@pytest.mark.slow
@pytest.mark.turn(2)
def test_compiled_flex_attention_equals_sdpa(make_model, ids):
    assert_flex_equals_sdpa(make_model(**FAMILIES["mistral"]), ids)


@pytest.mark.slow
def test_lm_eval_runs_a_local_task(folder, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Say {word}.", "choices": ["red", "blue"], "label": 0} for word in ("red", "sky", "fox")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "colors.yaml").write_text(
        "task: colors\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder}", tasks=["colors"], task_manager=tasks, device="cpu"
    )
    assert 0 <= result["results"]["colors"]["acc,none"] <= 1
