"""Fine-tuning a vision-language model by `hfllm sft`: on images, text and both; refusals and its control."""

import json
import shutil

import pytest
import sft
import torch
from PIL import Image
from safetensors.torch import load_file
from seeing_rows import WORDS, halves, make_processor, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfllm
from hfllm.data.images.rows import as_dataset, by_turns
from hfllm.errors import InputError
from hfllm.evaluation.before_after import evaluate_tuned
from hfllm.evaluation.pictures import answer_pictures
from hfllm.flags import ALWAYS, Flags
from hfllm.runs.models import named_model
from hfllm.stages import shared
from hfllm.stages.sft import build as sft_build
from hfllm.trainers.trl_trainers import SFTTrainer

QUIET = ["--per_device_train_batch_size", "8", "--logging_steps", "1", "--save_strategy", "no"]


def run(model, rows, output, *flags):
    named = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", output, *QUIET, *flags]
    return sft.main(*sft.parse(list(map(str, named))))


def rows_of(script_args, model_args):
    """The training and held-out rows."""
    processor = shared.processor_of(model_args.model_name_or_path)
    return sft_build.instruction_data(script_args, script_args.num_examples, 3, "m", processor)


def trainer_of(script_args, args, model_args, *parts):
    train, held_out = ([turn for row in rows for turn in by_turns(row)] for rows in parts)
    model, processor = shared.load_picture_model(named_model(model_args))
    sets = {
        "train_dataset": as_dataset(train, script_args.max_pixels),
        "eval_dataset": as_dataset(held_out, script_args.max_pixels),
    }
    return SFTTrainer(model=model, args=shared.picture_args(args, train), processing_class=processor, **sets)


@pytest.fixture(scope="module")
def texts(seeing_folder):
    rows = [{"prompt": f"say {one} {two}", "completion": f"{one} {two}"} for one in WORDS[5:] for two in WORDS[5:10]]
    path = seeing_folder / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_it_learns_what_the_pictures_show(seeing_folder, tmp_path, capsys):
    """The loss falls, with the pictures of other rows it is higher, and new pictures are answered."""
    rows = write_rows(tmp_path / "data", halves(160))
    flags = ["--max_steps", "25", "--learning_rate", "0.01", "--per_device_train_batch_size", "24"]
    metrics = run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    assert metrics["examples"] == 152 and metrics["eval_examples"] == 8
    assert metrics["held_out_loss_change"] < -0.5 and metrics["eval_loss"] < 0.2
    assert metrics["other_pictures_extra_loss"] > 2 * metrics["other_pictures_extra_loss_se"] > 0
    # The same held-out rows, measured in another way.
    assert metrics["held_out_loss_after"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert "with the pictures of other rows" in capsys.readouterr().out
    new, model = halves(60, seed=7), AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which side"}]}]] * 60
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    said = answer_pictures(model, processor, asked, [[row["image"]] for row in new], 2)
    assert sum(each == row["side"] for each, row in zip(said, new, strict=True)) > 54


def test_rows_with_and_without_pictures_are_mixed(seeing_folder, texts, tmp_path):
    """Each row's loss is what the model gives it alone, however the batch mixes them."""
    rows = write_rows(tmp_path / "data", halves(8))
    rows.write_text(rows.read_text() + "\n" + "\n".join(texts.read_text().splitlines()[:12]))
    named = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    script_args, args, model_args = sft.parse(list(map(str, named)))
    train, held_out = rows_of(script_args, model_args)
    assert sum(len(row["images"]) for row in (*train, *held_out)) == 8 and len(train) + len(held_out) == 20
    trainer = trainer_of(script_args, args, model_args, train, train)
    together = evaluate_tuned(trainer, [], trainer.train_dataset, collate=trainer.data_collator).rows
    for place in range(len(train)):
        batch = trainer.data_collator([trainer.train_dataset[place]])
        loss = trainer.model.eval()(**batch).loss.item()
        assert together[place][0] == pytest.approx(loss * together[place][1], rel=1e-4)


@pytest.mark.slow
def test_text_alone_is_learned_by_the_decoder(seeing_folder, texts, tmp_path):
    """Packing and all: the tower stays as it is, and the processor is saved."""
    before = load_file(seeing_folder / "model" / "model.safetensors")
    metrics = run(seeing_folder / "model", texts, tmp_path / "out", "--max_steps", "2", "--packing")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert moved - {"weight"} == {"language_model"} and "other_pictures_loss" not in metrics
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"


@pytest.mark.slow
def test_parts_are_frozen_and_the_last_answer_alone_is_learned(seeing_folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(12))
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in lines:
        said = [
            ("user", "<image>\nwhich"),
            ("assistant", "say"),
            ("user", "side"),
            ("assistant", row.pop("completion")),
        ]
        row.pop("prompt")
        row["messages"] = [{"role": role, "content": text} for role, text in said]
    rows.write_text("\n".join(map(json.dumps, lines)))
    before = load_file(seeing_folder / "model" / "model.safetensors")
    flags = ["--max_steps", "1", "--learning_rate", "0.1", "--freeze_vision", "--freeze_text", "--loss_on", "last"]
    metrics = run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"multi_modal_projector"} and metrics["examples"] + metrics["eval_examples"] == 12
    metrics = run(seeing_folder / "model", rows, tmp_path / "all", "--max_steps", "1")
    assert metrics["examples"] + metrics["eval_examples"] == 24


@pytest.mark.slow
def test_an_adapter_is_made_and_trained_further(seeing_folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(12))
    flags = ["--max_steps", "1", "--learning_rate", "0.1"]
    run(seeing_folder / "model", rows, tmp_path / "one", *flags, "--use_peft", "--lora_target_modules", "q_proj")
    run(tmp_path / "one", rows, tmp_path / "two", *flags)
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])
    with pytest.raises(InputError, match="--lora_target_modules w_proj: not in a model of type hfllm_vision"):
        run(seeing_folder / "model", rows, tmp_path / "no", "--use_peft", "--lora_target_modules", "w_proj")


@pytest.mark.slow
def test_held_out_pictures_lie_beside_their_own_rows(seeing_folder, tmp_path):
    rows, held_out = write_rows(tmp_path / "train", halves(8)), write_rows(tmp_path / "test", halves(4, seed=5))
    for path in (tmp_path / "train").glob("*.png"):
        path.rename(path.with_stem(f"t{path.stem}"))
    rows.write_text(rows.read_text().replace('"image": "', '"image": "t'))
    flags = ["--max_steps", "1", "--eval_dataset_name", held_out]
    metrics = run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    assert (metrics["examples"], metrics["eval_examples"]) == (8, 4)


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_is_refused_or_dropped(seeing_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "data", halves(8))
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"line 4: picture .*3.png: .*--bad_images drop") as error:
        run(seeing_folder / "model", rows, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    rows.write_text(rows.read_text().replace('"image"', '"photo"'))
    flags = ["--bad_images", "drop", "--column_mapping", "image=photo", "--max_steps", "1"]
    metrics = run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    assert metrics["examples"] + metrics["eval_examples"] == 7
    assert "1 with a picture that cannot be read" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_pictures_and_what_is_said_of_them(seeing_folder, tmp_path):
    """As the Hub keeps images: `metadata.jsonl` names each by `file_name`, of which nothing must be left out."""
    rows = write_rows(tmp_path / "data", halves(60))
    metadata = rows.with_name("metadata.jsonl")
    metadata.write_text(rows.read_text().replace('"image"', '"file_name"'))
    rows.unlink()
    metrics = [
        run(seeing_folder / "model", each, tmp_path / name, "--max_steps", "1")
        for name, each in (("folder", tmp_path / "data"), ("file", metadata))
    ]
    assert all("other_pictures_loss" in found for found in metrics)
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


@pytest.mark.slow
def test_a_finished_run_is_not_that_of_other_pictures(seeing_folder, tmp_path, capsys):
    """A picture that was replaced makes another run of the same flags and rows, and of a checkpoint, too."""
    rows = write_rows(tmp_path / "data", halves(8))
    flags = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    again = run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    assert "already done" in capsys.readouterr().out and again["examples"] + again["eval_examples"] == 8
    halves(1, seed=99)[0]["image"].save(tmp_path / "data" / "3.png")
    with pytest.raises(InputError, match="holds a finished run with pictures of dataset_name contents='"):
        run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(InputError, match="other contents of --dataset_name"):
        run(seeing_folder / "model", rows, tmp_path / "out", *flags, "--resume_from_checkpoint", "true")
    halves(8)[3]["image"].save(tmp_path / "data" / "3.png")
    run(seeing_folder / "model", rows, tmp_path / "out", *flags, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--packing"], "--packing cannot be used here: rows with pictures are not packed"),
        (["--padding_free"], "--padding_free"),
        (["--assistant_only_loss"], "--assistant_only_loss"),
        (["--completion_only_loss", "false"], "--completion_only_loss false"),
        (["--max_length", "64"], "--max_length cannot be used here: rows with pictures are not cut"),
        (["--augment", "0.5"], "--augment"),
        (["--chat_template_path", "chatml"], "--chat_template_path"),
        (["--added_tokens", "<new>"], "--added_tokens"),
        (["--eos_token", "<eos>"], "--eos_token"),
        (["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by_length"),
        (["--use_peft", "--freeze_text"], "--freeze_text"),
    ],
)
def test_flags_that_do_not_go_with_pictures_are_refused(seeing_folder, tmp_path, flags, words):
    rows = write_rows(tmp_path / "data", halves(2))
    with pytest.raises(InputError, match=words) as error:
        run(seeing_folder / "model", rows, tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_pictures_in_some_rows_alone_are_refused_where_weights_are_split(seeing_folder, texts, tmp_path, monkeypatch):
    """A process whose batch has none would not take part where the others gather or reduce the tower."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    rows = write_rows(tmp_path / "data", halves(4))
    named = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    script_args, args, model_args = sft.parse(list(map(str, named)))
    all_seen = rows_of(script_args, model_args)
    assert shared.check_rows(script_args, args, model_args, all_seen, sees=True)
    rows.write_text(rows.read_text() + "\n" + "\n".join(texts.read_text().splitlines()[:12]))
    with pytest.raises(InputError, match=r"pictures in 4 of 1\d training rows: DeepSpeed and FSDP") as error:
        run(seeing_folder / "model", rows, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    # Of processes with all of the weights each waits for what it has not used.
    mixed = rows_of(script_args, model_args)
    assert shared.check_rows(script_args, args, model_args, mixed, sees=True)
    trainer = trainer_of(script_args, args, model_args, *mixed)
    assert trainer.args.ddp_find_unused_parameters


def test_flags_of_pictures_and_rows_without_any(seeing_folder, texts, tmp_path):
    with pytest.raises(InputError, match="--freeze_vision cannot be used here: no row has a picture"):
        run(seeing_folder / "model", texts, tmp_path / "out", "--freeze_vision")
    for flags in (["--chat_template_path", "chatml"], ["--added_tokens", "<new>"]):
        with pytest.raises(InputError, match=f"{flags[0]} cannot be used here: the model sees") as error:
            run(seeing_folder / "model", texts, tmp_path / "out", *flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", shared.NOT_JOINED)
def test_flags_beside_images_are_refused_where_they_are_on(flag):
    fact = shared.refused_with_images(ALWAYS)[flag]
    assert fact.holds(Flags(**{flag: True})) and not fact.holds(Flags(**{flag: False}))


def test_a_model_of_text_is_refused_by_its_name(seeing_folder, tmp_path):
    config = hfllm.HfllmConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hfllm.HfllmForCausalLM(config).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    rows = write_rows(tmp_path / "data", [{**halves(1)[0], "image": Image.new("RGB", (8, 8))}])
    with pytest.raises(InputError, match=r"line 1: the row has pictures, and the model '.*text' reads text alone"):
        run(tmp_path / "text", rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BLIND = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 16}, "the processor makes pictures of 16x16 pixels and the vision tower takes 8x8"),
        ({"patch_size": 2}, "the processor has patch_size=2 and the vision tower 4"),
        ({"num_additional_image_tokens": 1}, r"the processor writes \+1 image tokens"),
        ({"chat_template": None}, "its processor has no chat template"),
        ({"chat_template": "{% for m in %}"}, "its processor cannot write a question about a picture"),
        ({"chat_template": BLIND}, "its processor cannot write a question about a picture .* Found total 0 <image>"),
        ({"pad_token": None, "eos_token": None}, "has no end token"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused_before_training(seeing_folder, tmp_path, changes, words):
    processor = make_processor()
    for name, value in changes.items():
        if name == "size":
            processor.image_processor.size = {"height": value, "width": value}
        else:
            setattr(processor.tokenizer if name.endswith("_token") else processor, name, value)
    if "chat_template" in changes:
        processor.tokenizer.chat_template = changes["chat_template"]
    shutil.copytree(seeing_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    processor.save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "data", halves(4))
    with pytest.raises(InputError, match=words) as error:
        run(tmp_path / "model", rows, tmp_path / "out", "--max_steps", "1")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*.safetensors"))
