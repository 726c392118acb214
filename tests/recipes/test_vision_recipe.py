"""The recipe that learns to see, in miniature: drawn pictures, PPO, your own rows, frozen parts, and refusals."""

import json
from dataclasses import replace

import pytest
import reward
import sft
import torch
import vision
from killed import SAVES, Killed
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfllm.data.images.rows import as_dataset
from hfllm.data.world.pictures import STYLES
from hfllm.errors import InputError
from hfllm.evaluation.pictures import answer_pictures
from hfllm.outputs.card import picture_lines
from hfllm.runs.models import named_model
from hfllm.stages import shared
from hfllm.stages.vision.build import drawn_rows, new_model, new_trainer, own_rows, question_rows
from hfllm.stages.vision.flags import check
from hfllm.trainers.pretraining.muon import MuonWithAdamW
from hfllm.trainers.trl_trainers import SFTTrainer

TINY = ["--hidden_size", "16", "--num_attention_heads", "2", "--num_hidden_layers", "1", "--num_vision_layers", "1"]
QUIET = ["--per_device_train_batch_size", "4", "--logging_steps", "1"]
SHORT = [*QUIET, "--num_eval_examples", "12"]
COUNTS = ["--num_patch_pictures", "8", "--num_captions", "8", "--num_examples", "8"]
DRAWN = [*TINY, *SHORT, *COUNTS, "--max_new_tokens", "4"]


def run(folder, *flags):
    return vision.main(*vision.parse(["--output_dir", str(folder), *map(str, flags)]))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "out"
    return folder, run(folder, *DRAWN)


@pytest.mark.slow
def test_from_nothing_to_a_report(drawn, capsys):
    folder, metrics = drawn
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == "vision" and report["metrics"] == pytest.approx(metrics)
    assert {"right.png", "pictures.png", "loss.png", "README.md"} <= {path.name for path in folder.iterdir()}
    # A few steps teach nothing, and the report says so.
    assert any(line.startswith("questions about images (seen) answered right: ") for line in report["warnings"])
    assert {"seen_right", "held_out_right", "shuffled_right", "chance_right", "called_absent"} <= metrics.keys()
    assert {metrics[f"{name}_right_n"] for name in STYLES} == {6}
    assert "Right answers on what training has not shown" in (folder / "report.md").read_text()
    assert metrics["seen_right_n"] == metrics["shuffled_right_n"] == 12 and metrics["train_rows"] == 24
    # The model answers by what the folder holds alone.
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is red?"}]}]
    assert len(answer_pictures(model, processor, [prompt], [[Image.new("RGB", (32, 32))]], 4)) == 1
    # The same command again reuses what has finished.
    assert run(folder, *DRAWN) == pytest.approx(metrics)
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_ppo_on_drawn_pictures(drawn, tmp_path):
    """It starts from what fine-tuning saved, and leaves that as it is."""
    metrics = run(tmp_path / "out", *DRAWN, "--num_rl_prompts", "16")
    before = {name: value for name, value in metrics.items() if not name.startswith(("rl_", "sampled_gold"))}
    assert before == pytest.approx(drawn[1])
    assert {f"rl_{name}" for name in before if name.endswith("_right")} <= metrics.keys()
    change = metrics["sampled_gold_after"] - metrics["sampled_gold_before"]
    assert metrics["sampled_gold_change"] == pytest.approx(change) and metrics["sampled_gold_n"] == 12
    first, tuned, policy = (
        load_file(each / "model.safetensors") for each in (drawn[0], tmp_path / "out", tmp_path / "out" / "rl")
    )
    assert all(torch.equal(first[name], tuned[name]) for name in first)
    assert policy.keys() == tuned.keys() and any(not torch.equal(policy[name], tuned[name]) for name in tuned)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(drawn, tmp_path):
    folder, _ = drawn
    for seed, is_same in ((42, True), (7, False)):
        run(tmp_path / str(seed), *DRAWN, "--seed", seed)
        ours, theirs = (load_file(each / "model.safetensors") for each in (folder, tmp_path / str(seed)))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) is is_same


@pytest.mark.parametrize(("flag", "kind"), [("true", MuonWithAdamW), ("false", torch.optim.AdamW)])
def test_muon_is_used_where_it_is_asked_for(flag, kind, tmp_path):
    script_args, args, _ = vision.parse(["--output_dir", str(tmp_path / "out"), *DRAWN, "--use_muon", flag])
    rows = question_rows(script_args.dataset_name, 0, 8, 4)
    model = new_model(script_args.model_sizes, script_args.dataset_name, rows.texts(), seed=0)
    trainer = new_trainer(*model, rows, args, script_args.use_muon)
    assert isinstance(trainer.create_optimizer(), kind)


def own(folder, count=12, **columns):
    """Write a dataset with pictures and return its file; all pictures differ."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        Image.new("RGB", (20 + number, 30), (number * 20, 0, 0)).save(folder / f"{number}.png")
        row = {"prompt": "What color?", "completion": f"red {number}", "image": f"{number}.png", **columns}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.mark.slow
def test_rows_of_your_own_on_a_model_of_your_own(drawn, tmp_path):
    rows = own(tmp_path / "data")
    flags = ["--model_name_or_path", drawn[0], "--dataset_name", rows, *QUIET, "--max_steps", "2"]
    before = load_file(drawn[0] / "model.safetensors")
    moved = {}
    for name, more in (("all", []), ("text", ["--freeze_vision"]), ("none", ["--freeze_vision", "--freeze_text"])):
        metrics = run(tmp_path / name, *flags, "--learning_rate", "0.01", *more)
        after = load_file(tmp_path / name / "model.safetensors")
        moved[name] = {key for key in after if not torch.equal(after[key], before[key])}
        assert metrics["train_rows"] + metrics["held_out_right_n"] == 12
        assert {"held_out_right", "chance_right"} <= metrics.keys()
        # One row is held out, and there is no other picture to show it.
        assert metrics["held_out_right_n"] == 1 and "shuffled_right" not in metrics
    parts = {name: {key.split(".")[1] for key in keys if key.startswith("model.")} for name, keys in moved.items()}
    assert parts["all"] == {"vision_tower", "multi_modal_projector", "language_model"}
    assert parts["text"] == {"multi_modal_projector", "language_model"}
    assert parts["none"] == {"multi_modal_projector"} and moved["none"]


@pytest.mark.slow
def test_drawn_pictures_on_a_model_of_your_own(drawn, tmp_path):
    flags = ["--model_name_or_path", drawn[0], *SHORT, "--num_examples", "6", "--max_steps", "1"]
    metrics = run(tmp_path / "out", *flags, "--max_new_tokens", "4")
    # Each of the four questions about a picture is a row of its own, and so are the captions of the first and the
    # fifth: one of shapes, and another of colors where a word is.
    assert metrics["train_rows"] == 6 * 4 + 1 + 2 and metrics["seen_right_n"] == 12
    with pytest.raises(InputError, match="--patch_size cannot be used here"):
        run(tmp_path / "other", *flags, "--patch_size", "8")


@pytest.mark.slow
def test_what_is_frozen_stays_so_in_ppo(drawn, tmp_path):
    flags = ["--model_name_or_path", drawn[0], *SHORT, "--num_examples", "2", "--max_steps", "1", "--freeze_text"]
    run(tmp_path / "out", *flags, "--num_rl_prompts", "8", "--learning_rate", "0.1", "--rl_learning_rate", "0.1")
    before, tuned, policy = (
        load_file(each / "model.safetensors") for each in (drawn[0], tmp_path / "out", tmp_path / "out" / "rl")
    )
    for one, other in ((before, tuned), (tuned, policy)):
        moved = {name.split(".")[1] for name in one if not torch.equal(one[name], other[name])}
        assert moved == {"vision_tower", "multi_modal_projector"}


@pytest.mark.slow
def test_bad_pictures_are_refused_or_dropped_and_counted(drawn, tmp_path, capsys):
    rows = own(tmp_path / "data")
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    flags = ["--model_name_or_path", drawn[0], "--dataset_name", rows, *QUIET, "--max_steps", "1"]
    with pytest.raises(InputError, match=r"rows.jsonl, line 4: picture .*3.png: .*--bad_images drop") as error:
        run(tmp_path / "refused", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "refused" / "report.json").exists()
    metrics = run(tmp_path / "dropped", *flags, "--bad_images", "drop")
    assert "1 with a picture that cannot be read" in capsys.readouterr().out
    assert metrics["train_rows"] + metrics["held_out_right_n"] == 11


def conversation(folder):
    """Write rows of two turns, the second of which shows a picture of its own."""
    rows = own(folder, 4)
    lines = []
    for number in range(4):
        said = [("user", "<image>\nfirst?"), ("assistant", "one"), ("user", "and <image>?"), ("assistant", "two")]
        messages = [{"role": role, "content": text} for role, text in said]
        lines.append(json.dumps({"messages": messages, "images": [f"{number}.png", f"{(number + 1) % 4}.png"]}))
    rows.write_text("\n".join(lines))
    return rows


@pytest.mark.slow
def test_answers_alone_are_learned_one_row_for_each(drawn, tmp_path):
    """What the labels hold of conversations, of your own and drawn ones, decoded as the trainer collates them."""
    named = ["--model_name_or_path", str(drawn[0]), "--output_dir", str(tmp_path / "out"), *QUIET]
    for flags in (["--dataset_name", str(conversation(tmp_path / "data"))], ["--num_examples", "2"]):
        script_args, args, model_args = vision.parse([*named, *flags])
        if script_args.dataset_name == "pictures":
            mix = (script_args.num_examples, script_args.questions_per_picture, script_args.share_absent)
            rows = drawn_rows(question_rows("pictures", 0, *mix))
            said = [row["completion"][0]["content"][0]["text"] for row in rows]
            # One caption of shapes beside the questions of the first.
            assert len(rows) == 2 * 4 + 1
        else:
            rows, held_out = own_rows(script_args.row_sources, script_args.image_reading(), 0, 256)
            assert len(rows) == 6 and [each.answer for each in held_out] == ["one"]
            assert [len(row["images"]) for row in rows] == [1, 2] * 3 and len(held_out[0].images) == 1
            said = ["one", "two"] * 3
        model, processor = shared.load_picture_model(named_model(model_args))
        dataset = as_dataset(rows, script_args.max_pixels)
        args = shared.picture_args(args, rows)
        trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
        batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
        end = processor.tokenizer.eos_token
        learned = [processor.tokenizer.decode(each[each != -100]) for each in batch["labels"]]
        assert learned == [answer + end for answer in said]


def test_rows_that_would_stop_a_batch_are_refused_or_left_out(drawn, tmp_path, capsys):
    rows = own(tmp_path / "data")
    lines = rows.read_text().splitlines()
    named = ["--model_name_or_path", str(drawn[0]), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    script_args = vision.parse([*named, *QUIET])[0]

    def write(**columns):
        rows.write_text("\n".join([*lines[:3], json.dumps({**json.loads(lines[3]), **columns}), *lines[4:]]))

    write(prompt="Is <|image|> a mark?")
    train, held_out = own_rows(script_args.row_sources, script_args.image_reading(["<|image|>"]), 0, 256)
    assert len(train) + len(held_out) == 11 and "1 with words for a picture" in capsys.readouterr().out
    write(prompt="What?", completion="A <image>.")
    with pytest.raises(InputError, match=r"line 4: a place \(<image>\) in what the assistant says"):
        own_rows(script_args.row_sources, script_args.image_reading(), 0, 256)
    schema = {"type": "function", "function": {"name": "look", "parameters": {}}}
    write(tools=[schema])
    with pytest.raises(InputError, match="line 4: the row has tools"):
        own_rows(script_args.row_sources, script_args.image_reading(), 0, 256)


def test_pictures_in_memory_may_be_of_any_mode():
    asked, said = ([{"role": role, "content": [{"type": "text", "text": "x"}]}] for role in ("user", "assistant"))
    row = {"prompt": asked, "completion": said, "images": [Image.new("CMYK", (8, 8), (0, 255, 255, 0))]}
    (read,) = as_dataset([row], 100)
    assert read["images"][0].getpixel((0, 0))[0] > 200 and read["images"][0].mode == "RGB"


@pytest.mark.slow
def test_an_adapter_is_trained_further(drawn, tmp_path, capsys):
    """Its lines load it, and the projector learns if it is named."""
    named = ["--dataset_name", own(tmp_path / "data"), *QUIET, "--max_steps", "1", "--learning_rate", "0.1"]
    first = tmp_path / "first"
    run(first, "--model_name_or_path", drawn[0], *named, "--use_peft", "--lora_target_modules", "q_proj")
    assert "--lora_modules_to_save" in capsys.readouterr().out
    code = {}
    exec("\n".join(picture_lines(str(first), is_adapter=True)), code)
    assert any("lora" in name for name in code["model"].state_dict())
    run(tmp_path / "second", "--model_name_or_path", first, *named)
    files = [load_file(each / "adapter_model.safetensors") for each in (first, tmp_path / "second")]
    assert files[0].keys() == files[1].keys() and any(
        not torch.equal(files[0][name], files[1][name]) for name in files[0]
    )
    with pytest.raises(InputError, match="is an adapter already"):
        run(tmp_path / "third", "--model_name_or_path", first, *named, "--use_peft")


def test_a_text_model_is_refused_where_pictures_come(saved, tmp_path):
    rows = own(tmp_path / "data")
    with pytest.raises(InputError, match="reads text alone") as error:
        run(tmp_path / "out", "--model_name_or_path", saved, "--dataset_name", rows)
    assert "\n" not in str(error.value)


def test_a_reward_model_refuses_rows_with_pictures(saved, tmp_path):
    row = {"prompt": "What?", "chosen": "A fox.", "rejected": "A cat.", "image": "a.png"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    words = ["--model_name_or_path", str(saved), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    with pytest.raises(InputError, match=r"line 1: the row has pictures, and the model reads text alone"):
        reward.main(*reward.parse([*words, "--output_dir", str(tmp_path / "out")]))


def test_fine_tuning_on_text_refuses_rows_with_pictures(saved, tmp_path):
    rows = own(tmp_path / "data", count=2)
    words = ["--model_name_or_path", str(saved), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"line 1: the row has pictures, and the model .* reads text alone") as error:
        sft.main(*sft.parse(words))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "world"], "pictures is the world to be seen"),
        (["--dataset_name", "some/rows"], "take a vision-language model of your own"),
        (["--num_rl_prompts", "-1"], "expected at least 0"),
        (["--use_muon", "true", "--model_name_or_path", "some/model", "--dataset_name", "some/rows"], "--use_muon"),
        (["--freeze_vision"], "--freeze_vision cannot be used here"),
        (["--freeze_text"], "--freeze_text cannot be used here"),
        (["--packing"], "--packing cannot be used here"),
        (["--patch_size", "5"], "a divisor of the pictures' side, 32"),
        (["--patch_size", "16"], "--patch_size 16: with --num_patch_pictures expected at most 8"),
        (["--questions_per_picture", "0"], "expected 1 to 16"),
        (["--dataset_name", "digits", "--num_patch_pictures", "8"], "digits have no patches of their own"),
        (["--share_absent", "1"], "expected at least 0, and at most 0.999"),
        (["--dataset_name", "digits", "--share_absent", "0.1"], "every digit that is asked for is there"),
        (["--dataset_name", "digits", "--questions_per_picture", "3"], "expected 1 to 2"),
        (["--hidden_size", "30"], "a multiple of twice"),
        (["--vision_hidden_size", "-8"], "--vision_hidden_size -8: expected a multiple of twice"),
        (["--vision_hidden_size", "8", "--model_name_or_path", "m", "--dataset_name", "r"], "--vision_hidden_size"),
        (["--num_examples", "0"], "expected at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected at least 1"),
        (["--max_samples", "3"], "--max_samples"),
        (["--bad_images", "drop"], "--bad_images cannot be used here: it is for rows of your own"),
        (["--kl_coef", "0.5"], "--kl_coef cannot be used here: it is for PPO"),
        (["--model_name_or_path", "some/model", "--use_peft", "--freeze_text"], "--freeze_text cannot be used here"),
        (["--model_name_or_path", "some/model", "--use_peft", "--num_rl_prompts", "8"], "not an adapter"),
        (["--model_name_or_path", "m", "--dataset_name", "some/rows", "--num_examples", "3"], "--num_examples cannot"),
        (["--model_name_or_path", "m", "--max_length", "64"], "--max_length cannot be used here: rows with pictures"),
        (["--model_name_or_path", "m", "--completion_only_loss", "false"], "--completion_only_loss false cannot"),
        (["--model_name_or_path", "m", "--assistant_only_loss", "true"], "--assistant_only_loss cannot"),
        (["--model_name_or_path", "m", "--eos_token", "<eos>"], "--eos_token cannot"),
        (["--completion_only_loss", "false"], "--completion_only_loss false cannot"),
        (["--optim", "sgd"], "--use_muon cannot be used here: --optim sgd is asked for too"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        run(tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_muon_is_refused_where_weights_are_split(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    script_args, args, model_args = vision.parse(["--output_dir", str(tmp_path / "out"), *DRAWN])
    with pytest.raises(InputError, match="--use_muon cannot be used here: DeepSpeed and FSDP split"):
        check(script_args, args, model_args)
    script_args = replace(script_args, use_muon=False)
    with pytest.raises(InputError, match="--num_patch_pictures cannot be used here: DeepSpeed and FSDP split"):
        check(script_args, args, model_args)
    check(replace(script_args, num_patch_pictures=0), args, model_args)


def test_answers_before_the_first_picture_are_refused_where_weights_are_split(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    rows = conversation(tmp_path / "data")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in lines:
        row["messages"][0]["content"], row["images"] = "first?", row["images"][:1]
    rows.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model_name_or_path", drawn[0], "--dataset_name", rows, *QUIET]
    with pytest.raises(InputError, match="pictures in 3 of 6 training rows: DeepSpeed and FSDP"):
        run(tmp_path / "out", *flags)


# ---- killed, see killed.py ----


KILLED = Killed(lambda files: [*DRAWN, *SAVES])
