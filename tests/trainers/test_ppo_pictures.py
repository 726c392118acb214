"""PPO on pictures: what holds for prompts of words holds for prompts with pictures, and the pictures are read."""

import copy
import io
import random

import picture_run as run
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    TrainerCallback,
)
from transformers.integrations import deepspeed

import hfllm
from hfllm.errors import InputError
from hfllm.multimodal.processors import Pictures, encode
from hfllm.trainers.ppo import sampling
from hfllm.trainers.ppo.prompts import read_rows
from hfllm.trainers.ppo.rollout import Rollout, model_inputs, pad_prompts
from hfllm.trainers.ppo.setup import split_reference


@pytest.fixture(scope="module")
def processor():
    return run.make_processor()


@pytest.fixture
def build(tmp_path, processor):
    def make(**kwargs):
        return run.build(str(tmp_path), **{"processing_class": processor, **kwargs})

    return make


def logprobs_of(trainer, rows, batch):
    """Log-probabilities of the same responses to other rows' prompts."""
    prompts, pictures = prompts_of(trainer, rows)
    return trainer.actor(**{**model_inputs(batch), **prompts, "pictures": pictures})[0].detach()


def prompts_of(trainer, rows):
    ids, seen = read_rows(rows, trainer.processing_class)
    prompt_ids, prompt_mask = pad_prompts(ids, 0, torch.device("cpu"))
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}, seen.get("pictures")


# ---- the invariants of PPO ----


@pytest.mark.parametrize("kind", ["hfllm", "llava", "llama"])
def test_the_ratio_is_one_before_the_first_update_and_the_kl_zero(build, kind):
    trainer = build(model=run.make_model(kind))
    rollout = trainer.collect_rollout(run.make_rows(6))
    assert len(rollout.pictures.episodes) == 6
    for group in (rollout.micro_batch(0, 0, 6), rollout.micro_batch(0, 0, 2)):
        logprobs, values, _ = trainer.actor(**model_inputs(group))
        mask = group["action_mask"]
        ratio = ((logprobs - group["logprobs"]) * mask).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)
        torch.testing.assert_close(values, group["values"], atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-6, rtol=0)


def test_recorded_and_computed_logprobs_agree(build):
    """What is recorded while `generate` reads a picture once is what a pass over prompt and response computes."""
    trainer = build()
    batch = trainer.sample(run.make_rows(9))
    witness = batch["witness"]
    recorded = trainer.evaluate_tokens(batch)
    assert not witness.is_wrong
    assert trainer._trusted == {"padded with pictures": True}
    computed = trainer.evaluate_tokens({**batch, "witness": None})
    torch.testing.assert_close(recorded.logprobs, computed.logprobs, atol=1e-6, rtol=0)


@pytest.fixture
def uneven(build):
    """A trainer whose greedy answers to some rows are short and to others long, the rows, and their batch."""
    trainer = build(model=run.make_model(lively=True), response_length=8, generation_kwargs={"top_k": 1})
    rows = run.make_rows(24, seed=5)
    batch = trainer.sample(rows)
    lengths = batch["response_mask"].sum(1)
    assert ((lengths < 8).sum() * 2 >= len(rows)) and (lengths == 8).any()
    return trainer, rows, batch


@pytest.mark.slow
def test_rows_that_go_on_without_the_others_keep_their_pictures(uneven):
    trainer, rows, batch = uneven
    for place, row in enumerate(rows):
        one, length = trainer.sample([row]), int(batch["response_mask"][place].sum())
        assert int(one["response_mask"].sum()) == length
        assert torch.equal(one["response_ids"][0, :length], batch["response_ids"][place, :length])


@pytest.mark.slow
def test_rows_that_are_read_again_keep_their_pictures(uneven, monkeypatch):
    """Where a cache cannot be split, and where there is room for some rows at a time."""
    trainer, rows, batch = uneven
    again = []
    monkeypatch.setattr(sampling, "_selects_rows", lambda cache, policy: again.append(1) and False)
    assert torch.equal(trainer.sample(rows)["response_ids"], batch["response_ids"])
    assert again
    prompts, pictures = prompts_of(trainer, rows)
    parts = (trainer.policy, *prompts.values(), trainer.sampling_config, trainer.processing_class.tokenizer)
    parted = sampling.generate_responses(*parts, most_rows=5, pictures=pictures)
    assert torch.equal(parted["response_ids"], batch["response_ids"])


def test_rows_go_on_where_the_model_itself_keeps_a_batch():
    """Qwen2-VL keeps on itself how far pictures shift the positions of each row."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {"vocab_size": 32, "intermediate_size": 32, "rope_parameters": rope, "max_position_embeddings": 64, **sizes}
    torch.manual_seed(0)
    marks = {"image_token_id": 31, "video_token_id": 30, "vision_start_token_id": 29, "vision_end_token_id": 28}
    policy = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=tower, **marks))
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.normal_(std=4 / weight.shape[-1] ** 0.5)
    ids = torch.randint(10, 28, (16, 9))
    ids[:, 2:6] = 31
    kinds = (ids[0] == 31).long()
    grid = torch.tensor([[1, 4, 4]])
    shown = [{"pixel_values": torch.randn(16, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds} for _ in ids]
    config = GenerationConfig(
        max_new_tokens=8, eos_token_id=list(range(8)), pad_token_id=0, suppress_tokens=[28, 29, 30, 31]
    )
    pictures, mask = Pictures(shown), torch.ones_like(ids)
    whole = sampling.generate_responses(policy, ids, mask, config, None, pictures=pictures)
    lengths = whole["response_mask"].sum(1)
    assert (lengths < 8).sum() >= 8 and (lengths == 8).any()
    for row in torch.arange(16).split(1):
        one = sampling.generate_responses(policy, ids[row], mask[row], config, None, pictures=pictures[row])
        assert torch.equal(one["response_ids"][0], whole["response_ids"][row, : lengths[row]][0])


def test_padding_changes_nothing(build):
    trainer = build()
    rows = run.make_rows(6)
    batch = trainer.sample(rows)
    inputs = model_inputs({**batch, "action_mask": batch["response_mask"]})
    logprobs, values, _ = trainer.actor(**inputs)
    for place in range(6):
        one = {name: value[torch.tensor([place])] for name, value in inputs.items()}
        alone, value, _ = trainer.actor(**one)
        torch.testing.assert_close(alone, logprobs[place : place + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(value, values[place : place + 1], atol=1e-6, rtol=0)
    wide = dict(inputs)
    for name in ("prompt_ids", "prompt_mask"):
        wide[name] = torch.nn.functional.pad(inputs[name], (5, 0))
    torch.testing.assert_close(trainer.actor(**wide)[0], logprobs, atol=1e-6, rtol=0)


def gradients(trainer, rollout, size, limit=None):
    trainer.args.max_tokens_per_pass = limit
    trainer.model.zero_grad()
    trainer._sums = {}
    for micro in range(6 // size):
        batch = rollout.micro_batch(0, micro, size)
        tokens = batch.pop("mini_batch_tokens")
        for _, group in trainer._passes(batch):
            trainer.compute_loss(trainer.model, {**group, "mini_batch_tokens": tokens}).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_the_split_into_micro_batches_and_passes_changes_nothing(build):
    trainer = build()
    rollout = trainer.collect_rollout(run.make_rows(6))
    whole = gradients(trainer, rollout, 6, 10_000)
    assert whole["policy.model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 1e-6
    assert whole["policy.model.multi_modal_projector.linear_1.weight"].abs().max() > 1e-6
    for size, limit in ((2, 10_000), (1, 10_000), (6, 8)):
        other = gradients(trainer, rollout, size, limit)
        assert other.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, atol=2e-7, rtol=1e-4, msg=f"{name} {size} {limit}")


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.slow
def test_a_run_resumes_with_the_same_bits_in_the_middle_of_a_rollout(tmp_path, processor):
    settings = {"save_strategy": "steps", "save_steps": 3, "processing_class": processor}
    whole = run.build(str(tmp_path / "whole"), **settings)
    whole.train()
    cut = run.build(str(tmp_path / "cut"), **settings, callbacks=[Stop(3)])
    cut.train()
    resumed = run.build(str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 4
    for name, tensor in whole.actor.state_dict().items():
        assert torch.equal(tensor, resumed.actor.state_dict()[name]), name


def test_a_rollout_is_saved_with_each_picture_once(build, tmp_path):
    trainer = build(num_generations=2)
    rows = [row for row in run.make_rows(3) for _ in range(2)]
    rollout = trainer.collect_rollout(rows)
    assert rollout.pictures.episodes[4] is rollout.pictures.episodes[5]
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors", torch.device("cpu"))
    assert loaded.pictures.episodes[4] is loaded.pictures.episodes[5]
    for one, other in zip(rollout.pictures.episodes, loaded.pictures.episodes, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the pictures are read ----


def test_other_pictures_give_other_logprobs_under_policy_and_reference(build):
    trainer = build()
    rows = run.halves(6)
    batch = trainer.sample(rows)
    batch = {**batch, "action_mask": batch["response_mask"]}
    inputs = model_inputs(batch)
    same = logprobs_of(trainer, rows, batch)
    torch.testing.assert_close(same, trainer.actor(**inputs)[0].detach(), atol=1e-6, rtol=0)
    turned = [{**row, "image": other["image"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert (logprobs_of(trainer, turned, batch) - same).abs().amax(1).min() > 1e-5
    seen = trainer._reference(inputs, False)[0]
    others = {**inputs, "pictures": inputs["pictures"][torch.tensor([1, 2, 3, 4, 5, 0])]}
    assert (trainer._reference(others, False)[0] - seen).abs().amax(1).min() > 1e-5


def test_an_adapter_learns_and_its_reference_reads_the_pictures(build):
    from peft import LoraConfig

    trainer = build(peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]), max_steps=2)
    rollout = trainer.collect_rollout(run.make_rows(6))
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-6, rtol=0)
    before = {name: value.clone() for name, value in trainer.policy.named_parameters() if value.requires_grad}
    assert any("vision_tower" in name for name in before)
    trainer.train()
    changed = [
        name for name, value in trainer.policy.named_parameters() if name in before and (value != before[name]).any()
    ]
    assert any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)


class Zero3:
    """Settings as DeepSpeed's, of which transformers asks this."""

    def is_zero3(self):
        return True


@pytest.mark.parametrize("kind", ["hfllm", "llava"])
def test_models_with_a_tower_are_built_whole_where_zero_3_is_on(kind, monkeypatch):
    """transformers would partition the tower, before the constructor around it draws its weights."""
    policy, states, settings = run.make_model(kind), [], Zero3()
    build = AutoModel.from_config.__func__

    def watched(cls, *args, **kwargs):
        states.append(deepspeed.is_deepspeed_zero3_enabled())
        return build(cls, *args, **kwargs)

    monkeypatch.setattr(AutoModel, "from_config", classmethod(watched))
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(settings)
    reference, _ = split_reference(policy, None)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in reference.state_dict().items())
    if kind == "hfllm":
        run.make_model()
    assert states and not any(states) and deepspeed.is_deepspeed_zero3_enabled()


# ---- learning ----


def learn(build, seed, rows):
    """Train on rows of 64 at a time, each seen once, and return the reward on new ones."""
    trainer = build(
        model=run.make_model(seed=seed),
        reward_funcs=run.names_side,
        rows=rows,
        seed=seed,
        per_device_train_batch_size=64,
        num_ppo_epochs=1,
        response_length=1,
        learning_rate=4e-3,
        value_learning_rate=4e-3,
        kl_coef=0.0,
        max_steps=36,
        max_grad_norm=0.5,
    )
    trainer.train()
    return trainer.evaluate(run.halves(64, 99))["eval_reward"]


@pytest.mark.slow
def test_a_policy_learns_to_say_which_half_is_bright(build):
    # The settings were chosen on seed 0.
    assert learn(build, 1, run.halves(1024, 1)) > 0.9


@pytest.mark.slow
def test_a_policy_learns_nothing_from_the_pictures_of_others(build):
    rows = run.halves(1024, 1)
    pictures = [row["image"] for row in rows]
    random.Random(1).shuffle(pictures)
    assert learn(build, 1, [{**row, "image": each} for row, each in zip(rows, pictures, strict=True)]) < 0.7


# ---- what rewards and tables get ----


def test_reward_functions_get_the_columns_and_the_pictures_in_their_places(build, tmp_path):
    seen = {}

    def reward(prompts, completions, images, side, **columns):
        seen.update(prompts=prompts, images=images, side=side)
        return [0.0] * len(prompts)

    rows = run.make_rows(6)
    trainer = build(reward_funcs=reward, log_completions=True)
    trainer.collect_rollout(rows)
    assert seen["images"] == [row["images"] for row in rows]
    parts = seen["prompts"][2][0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert [part["image"] for part in parts[:2]] == rows[2]["images"]
    assert trainer.completions[2]["prompt"][0]["content"][0] == {"type": "image"}
    assert list((tmp_path / "completions").glob("*.parquet"))


def test_a_reward_model_of_words_reads_the_words(build, processor):
    config = hfllm.HfllmConfig(vocab_size=len(run.WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    judge = hfllm.HfllmForSequenceClassification(config_with_one_label(config))
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    rows = run.halves(3)
    trainer = build(reward_funcs=judge, reward_processing_classes=tokenizer)
    batch = trainer.sample(rows)
    assert batch["prompts"][0][0]["content"][0]["type"] == "image"
    scores = trainer.score(rows, batch).total
    texts = processor.batch_decode(batch["response_ids"], skip_special_tokens=True)
    for row, text, score in zip(rows, texts, scores.tolist(), strict=True):
        ids = tokenizer(f"{row['prompt'][0]['content']} {text} ", return_tensors="pt")["input_ids"]
        assert judge(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-5)


# ---- bad input, in one line and before training ----


def asked(*content):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "say"}]}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": asked(run.PLACE, run.PLACE), "image": 1},
            "2 places for pictures in the prompt, and the column 'image' has 1",
        ),
        (
            {"prompt": asked(run.PLACE), "images": [1, 1]},
            "1 place for pictures in the prompt, and the column 'images' has 2",
        ),
        ({"prompt": asked(run.PLACE)}, "1 place for pictures in the prompt, and there is no column image or images"),
        ({"prompt": "say", "image": 1}, "the prompt is text; with pictures it must be a list of messages"),
        ({"prompt": asked(), "images": "a.png"}, "images must be a list, got str"),
        ({"prompt": asked(), "image": "/nowhere.png"}, "picture /nowhere.png: no such file"),
        ({"prompt": asked(), "image": {"bytes": b"GIF89a"}}, "picture in bytes: no picture in a format"),
        ({"prompt": asked(), "image": 3}, "a picture must be a path, bytes or a PIL image, got '3'"),
        ({"prompt": asked({"type": "video"})}, "a part of the type 'video'; PPO reads text and image"),
        (
            {"prompt": asked({"type": "text", "text": "<image>"})},
            "the words spell '<image>', which stands for a picture",
        ),
        (
            {"prompt": asked({"type": "text", "text": "<image>"}), "image": 1},
            "the words spell '<image>', which stands",
        ),
        ({"prompt": [{"role": "system", "content": "say"}], "image": 1}, "no message of the user"),
    ],
)
def test_rows_with_other_pictures_than_places_are_refused(build, row, message):
    one = run.halves(1)[0]["image"]
    row = {**row, **({"image": one} if row.get("image") == 1 else {})}
    row = {**row, **({"images": [one] * len(row["images"])} if isinstance(row.get("images"), list) else {})}
    good = {"prompt": asked()} if not isinstance(row["prompt"], str) else {"prompt": "say"}
    with pytest.raises(InputError) as error:
        build(rows=[good, row])
    assert message in str(error.value)
    assert str(error.value).startswith("prompt 1 of the dataset")
    assert "\n" not in str(error.value)


def test_pictures_that_nothing_would_read_are_refused(build, processor):
    text = hfllm.HfllmForCausalLM(
        hfllm.HfllmConfig(vocab_size=len(run.WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    rows = run.halves(4)
    with pytest.raises(
        InputError, match=r"prompt 0 of the dataset has a picture, and the policy \(HfllmForCausalLM\) reads"
    ):
        build(model=text, rows=rows)
    with pytest.raises(InputError, match="processing_class is a tokenizer"):
        build(processing_class=processor.tokenizer, rows=rows)
    with pytest.raises(InputError, match="rollout_func reads no pictures"):
        build(rollout_func=lambda prompts, trainer: {}, rows=rows)
    critic = hfllm.HfllmForSequenceClassification(config_with_one_label(text.config))
    with pytest.warns(UserWarning, match="reads no pictures: its values go by the words alone"):
        build(value_model=critic, rows=rows, kl_coef=0.0)


def config_with_one_label(config):
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def test_pictures_may_be_paths_bytes_and_parts(build, tmp_path):
    """All ways of giving a picture are the same picture; rows of words need none."""
    row = run.halves(1)[0]
    row["image"].save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    trainer = build(rows=[row])
    first = read_rows([row], trainer.processing_class)
    part = {"type": "image", "image": row["image"]}
    words = row["prompt"][0]["content"]
    inside = [{"role": "user", "content": [part, {"type": "text", "text": words}]}]
    others = [{**row, "image": each} for each in (str(tmp_path / "a.png"), data, {"bytes": data, "path": None})]
    for other in (*others, {"prompt": inside}, {"prompt": row["prompt"], "images": [data]}):
        ids, seen = read_rows([other], trainer.processing_class)
        assert ids == first[0]
        pixels = seen["pictures"].episodes[0]["pixel_values"]
        assert torch.equal(pixels, first[1]["pictures"].episodes[0]["pixel_values"])


def test_prompts_that_are_processed_together_are_as_each_by_itself(processor, monkeypatch):
    """Rows with no, one and two pictures, more than one batch of them, and the same row several times in turn."""
    rows = [row for row in run.make_rows(45) for _ in range(2)]
    calls = []
    apply = type(processor).apply_chat_template
    counted = lambda self, said, **options: calls.append(len(said)) or apply(self, said, **options)  # noqa: E731
    monkeypatch.setattr(type(processor), "apply_chat_template", counted)
    ids, pictures, prompts = encode(rows, processor)
    assert calls == [16, 16, 13]
    for place, row in enumerate(rows):
        one_ids, one, (prompt,) = encode([row], processor)
        assert ids[place] == one_ids[0]
        found, expected = pictures.episodes[place], one.episodes[0] if one else {}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert [part["type"] for part in prompts[place][0]["content"]] == [
            part["type"] for part in prompt[0]["content"]
        ]
    # A copy each: what is kept of one keeps no others.
    shapes = [one["pixel_values"] for one in pictures.episodes if one]
    assert all(pixels.untyped_storage().nbytes() == pixels.nbytes for pixels in shapes)


def test_prompts_are_processed_one_by_one_where_it_is_not_sure_whose_a_picture_is(monkeypatch):
    rows, calls, processor = run.halves(3), [], run.make_processor()
    apply = type(processor).apply_chat_template

    def with_sizes(self, said, **options):
        """As a processor that pads pictures to the largest beside it."""
        calls.append(len(said))
        return {**apply(self, said, **options), "image_sizes": torch.full((len(said), 2), 8)}

    monkeypatch.setattr(type(processor), "apply_chat_template", with_sizes)
    pictures = encode(rows, processor)[1]
    assert calls == [3, 1, 1, 1]
    # It is not tried again.
    encode(rows, processor)
    assert calls[4:] == [1, 1, 1]
    assert [one["image_sizes"].tolist() for one in pictures.episodes] == [[[8, 8]]] * 3
    # Words that spell a place among prompts with pictures: the complaint is that of the row.
    monkeypatch.undo()
    spelled = {"prompt": asked({"type": "text", "text": "<image>"})}
    with pytest.raises((InputError, ValueError), match="<image>"):
        encode([*rows, spelled], processor)
    twice = {**rows[0], "prompt": asked(run.PLACE, {"type": "text", "text": "<image>"})}
    with pytest.raises((InputError, ValueError), match="image"):
        encode([*rows, twice], processor)


def test_a_beginning_is_added_to_each_prompt_as_to_it_alone():
    """transformers adds one to all or to none, by the words of the first."""
    processor = run.make_processor()
    processor.tokenizer.bos_token = "<user>"
    first, second = ({"prompt": [{"role": "user", "content": said}]} for said in ("<user> say", "say"))
    processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    pictures = [{**run.halves(1)[0], **row} for row in ({}, {})]
    del pictures
    together = encode([first, second], processor)[0]
    assert together == [encode([row], processor)[0][0] for row in (first, second)]


def test_pictures_are_upright_on_white_and_not_of_one_pixel(build):
    """What a policy sees is what fine-tuning on the same file has seen."""
    trainer, picture = build(), run.halves(1)[0]["image"]

    def pixels(image):
        row = {"prompt": asked(), "image": image}
        return read_rows([row], trainer.processing_class)[1]["pictures"].episodes[0]["pixel_values"]

    exif, stream = picture.getexif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(stream, "PNG", exif=exif)
    assert torch.equal(pixels(stream.getvalue()), pixels(picture.transpose(Image.Transpose.ROTATE_270)))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert torch.equal(pixels(clear), pixels(Image.new("RGB", (8, 8), "white")))
    with pytest.raises(InputError, match="1 x 1 pixels"):
        pixels(Image.new("RGB", (1, 1)))


@pytest.mark.slow
def test_a_dataset_of_pictures_and_a_saved_model_by_its_name(build, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = str(tmp_path / "model")
    run.make_model().save_pretrained(folder)
    run.make_processor().save_pretrained(folder)
    rows = run.halves(6)
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"prompt": message, "image": ImageFeature(), "side": Value("string")})
    trainer = build(model=folder, processing_class=None, rows=Dataset.from_list(rows, features=features), max_steps=1)
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert {"processor_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    again = build(model=str(tmp_path / "out"), processing_class=None, rows=rows)
    assert again.actor.never_sampled == trainer.actor.never_sampled == (0, 4)
