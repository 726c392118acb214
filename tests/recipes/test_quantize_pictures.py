"""hfllm quantize on a vision-language model: answers of its forms about images, and saving and loading."""

import json
import math

import evaluate
import pytest
import quantize
import sft
import torch
from seeing_rows import halves, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfllm.data.images import rows as image_rows
from hfllm.errors import InputError
from hfllm.evaluation.before_after import PictureQuantization, answer_tokens
from hfllm.evaluation.pictures import Asked, answer_pictures
from hfllm.stages.quantize import picture_schemes, questions_of

QUICK = ["--num_sensitivity_texts", "2", "--prompt_tokens", "8", "--new_tokens", "2", "--rounds", "1"]
QUICK += ["--response_length", "3", "--num_eval_texts", "16", "--num_eval_prompts", "40"]
DYNAMIC = ["--schemes", "dynamic", "--save_scheme", "dynamic"]
SIZES = {"bytes_before", "bytes_after", "linear_bytes_share", "agreement", "reload_difference"}
SPEEDS = {"prefill_speedup", "decode_speedup"}
ENDS = ("before", "before_se", "after", "after_se", "change", "change_se", "n")


def run(*argv):
    return quantize.main(*quantize.parse([*QUICK, *map(str, argv)]))


@pytest.fixture(scope="module")
def taught(seeing_folder, tmp_path_factory):
    """A folder with a model that says which side is bright, and rows that it has not seen."""
    folder = tmp_path_factory.mktemp("taught")
    rows = write_rows(folder / "train", halves(160))
    flags = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", rows, "--output_dir", folder / "model"]
    flags += ["--max_steps", "25", "--learning_rate", "0.01", "--per_device_train_batch_size", "24"]
    sft.main(*sft.parse(list(map(str, [*flags, "--save_strategy", "no"]))))
    return folder / "model", write_rows(folder / "test", halves(40, seed=7))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "dynamic"])
def test_it_answers_as_before_and_is_loaded_again(taught, tmp_path, scheme):
    if scheme == "int8":
        pytest.importorskip("bitsandbytes")
    model, rows = taught
    flags = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    metrics = run(*flags, "--schemes", scheme, "--save_scheme", scheme)
    bounds = {f"right_{side}_{end}" for side in ("before", "after", "change") for end in ("low", "high")}
    assert set(metrics) == SIZES | SPEEDS | bounds | {f"{name}_{end}" for name in ("loss", "right") for end in ENDS}
    assert metrics["reload_difference"] == 0 and metrics["linear_bytes_share"] < 0.3
    assert metrics["right_before"] > 0.9 and abs(metrics["right_change"]) < 0.1 and metrics["right_n"] == 40
    assert metrics["agreement"] > 0.9 and abs(metrics["loss_change"]) < 0.05 and metrics["loss_n"] == 16
    # The lines of the report load it; tower, projector and decoder are in 8 bits, the head is not.
    names = {}
    exec((tmp_path / "out" / "report.md").read_text().partition("## Next")[2].split("```")[1], names)
    again = names["model"]
    kinds = {name: module.weight.dtype for name, module in again.named_modules() if hasattr(module, "weight")}
    in_eight = {name.split(".")[1] for name, dtype in kinds.items() if dtype == torch.int8}
    assert in_eight == {"vision_tower", "multi_modal_projector", "language_model"}
    assert kinds["lm_head"] == torch.float32
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which side"}]}]] * 20
    new = halves(20, seed=9)
    said = answer_pictures(again.eval(), names["processor"], asked, [[row["image"]] for row in new], 2)
    assert sum(each == row["side"] for each, row in zip(said, new, strict=True)) >= 18
    assert {part["part"] for part in report_rows(tmp_path / "out")} >= {"model.language_model.layers.1"}


def report_rows(folder):
    """The parts that were quantized one at a time, as the report lists them."""
    lines = (folder / "report.md").read_text().partition("Change of loss by layer")[2].splitlines()
    return [{"part": line.split("|")[1].strip()} for line in lines if line.startswith("| model")]


@pytest.mark.slow
def test_the_loss_is_that_of_the_answer_alone(taught):
    """By hand, on the tokens of one answer; the picture is the one that is shown."""
    model, processor = (each.from_pretrained(taught[0]) for each in (AutoModelForImageTextToText, AutoProcessor))
    row = halves(1, seed=3)[0]
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which side"}]}]
    found = answer_tokens(processor, Asked(prompt, [row["image"]], row["side"]))
    text = f"<user> <image> which side <assistant> {row['side']} <eos>"
    by_hand = processor(text=text, images=row["image"], return_tensors="pt")
    assert torch.equal(found.inputs["input_ids"], by_hand["input_ids"])
    assert torch.equal(found.inputs["pixel_values"], by_hand["pixel_values"])
    assert processor.tokenizer.decode(found.inputs["input_ids"][0, found.begin :]).split() == [row["side"], "<eos>"]
    evaluation = quantize_evaluation(processor, Asked(prompt, [row["image"]], row["side"]))
    with torch.no_grad():
        chances = model.eval()(**by_hand).logits[0].softmax(-1)
    ids = by_hand["input_ids"][0]
    nats = -sum(math.log(chances[place - 1, ids[place]]) for place in range(found.begin, len(ids)))
    assert evaluation.loss(model, 1) == pytest.approx(nats / (len(ids) - found.begin), rel=1e-4)


def quantize_evaluation(processor, asked):
    from hfllm.evaluation.before_after import PictureQuantization

    return PictureQuantization(processor.tokenizer, (), 0, processor=processor, questions=[asked])


@pytest.mark.slow
def test_a_part_may_be_left_and_drawn_pictures_are_asked_about(taught, tmp_path):
    flags = ["--model_name_or_path", taught[0], "--output_dir", tmp_path / "out", "--dataset_name", "digits"]
    more = ["--skip_modules", "model.vision_tower", "--sensitivity", "none", "--rounds", "0"]
    metrics = run(*flags, *DYNAMIC, *more)
    assert "right_after" in metrics and metrics["right_n"] == 40
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    layers = {
        name: module.weight.dtype for name, module in again.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert all(dtype == torch.float32 for name, dtype in layers.items() if "vision_tower" in name)
    assert layers["model.language_model.layers.0.self_attn.q_proj"] == torch.int8


@pytest.mark.slow
def test_four_bits_on_a_cpu_are_left_out_or_refused(taught, tmp_path, monkeypatch):
    """Its kernel reads what is not contiguous as if it were, as the projector's input is for one picture."""
    flags = ["--model_name_or_path", taught[0], "--dataset_name", taught[1], "--output_dir", tmp_path / "out"]
    for more in (["--schemes", "nf4"], ["--save_scheme", "nf4_double"]):
        with pytest.raises(InputError, match=r"reads pictures wrongly; for a model that sees: int8, dynamic"):
            run(*flags, *more)
    script_args, _ = quantize.parse(list(map(str, flags)))
    assert picture_schemes(script_args.schemes, script_args.save_scheme) == ["int8", "dynamic"]
    monkeypatch.setattr("hfllm.compression.schemes.default_device", lambda: "cuda")
    assert picture_schemes(script_args.schemes, script_args.save_scheme) == ["int8", "nf4", "nf4_double"]


@pytest.mark.slow
def test_no_recipe_loads_four_bits_on_a_cpu(taught, tmp_path):
    flags = ["--model_name_or_path", taught[0], "--dataset_name", taught[1], "--output_dir", tmp_path / "out"]
    flags = list(map(str, [*flags, "--load_in_4bit", "true"]))
    for recipe, more in ((sft, ["--use_peft", "true", "--lora_target_modules", "q_proj"]), (evaluate, [])):
        with pytest.raises(
            InputError, match="--load_in_4bit cannot be used here: on a CPU bitsandbytes' 4-bit kernel reads"
        ):
            recipe.main(*recipe.parse([*flags, *more]))


@pytest.mark.slow
def test_no_more_pictures_are_read_than_asked_about(taught, tmp_path):
    rows = write_rows(tmp_path / "rows", halves(6))
    for number in (4, 5):
        (tmp_path / "rows" / f"{number}.png").unlink()
    given = ["--model_name_or_path", taught[0], "--dataset_name", rows, "--num_eval_prompts"]
    processor = AutoProcessor.from_pretrained(taught[0])

    def asked(count):
        script_args, _ = quantize.parse(list(map(str, [*given, count])))
        return questions_of(script_args.row_source, script_args.image_reading(), count, processor)

    assert len(asked(3)) == 3 and len(asked(4)) == 4
    with pytest.raises(InputError, match=r"line 5: picture .* no such file"):
        asked(5)


@pytest.mark.slow
def test_few_pictures_are_shown_at_once(taught, monkeypatch):
    model, processor = (each.from_pretrained(taught[0]) for each in (AutoModelForImageTextToText, AutoProcessor))
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which side"}]}]
    questions = [Asked(prompt, [row["image"]], row["side"]) for row in halves(20)]
    shown = []
    batch = image_rows.conversation_batch

    def counted(processor, prompts, *args, **options):
        shown.append(len(prompts))
        return batch(processor, prompts, *args, **options)

    for module in ("hfllm.evaluation.before_after", "hfllm.evaluation.pictures"):
        monkeypatch.setattr(f"{module}.conversation_batch", counted)
    evaluation = PictureQuantization(processor.tokenizer, (), 0, 2, processor=processor, questions=questions)
    assert not shown
    before = evaluation.loss(model.eval(), 3)
    assert shown == [1] * 6
    assert evaluation._quality("original", model)["right"] > 0.9
    assert evaluation.loss(model, 3) == before and max(shown) == 8


@pytest.mark.slow
def test_replaced_pictures_make_another_run(taught, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows", halves(4))
    told = []

    def stage(*args, also=None, **options):
        told.append(also)
        raise InputError("seen")

    monkeypatch.setattr("hfllm.runs.stage.Stage", stage)
    for _ in range(2):
        with pytest.raises(InputError, match="seen"):
            run("--model_name_or_path", taught[0], "--dataset_name", rows, *DYNAMIC)
        (tmp_path / "rows" / "2.png").write_bytes(b"another")
    assert told[0] and told[1] and told[0] != told[1]


@pytest.mark.slow
def test_what_does_not_fit_is_refused(taught, saved, tmp_path):
    output = ["--output_dir", tmp_path / "out"]
    model = ["--model_name_or_path", taught[0], "--dataset_name", taught[1], *output]
    for flags, words in (
        (["--model_name_or_path", taught[0], *output], "it sees, and --dataset_name world is of texts"),
        ([*model, "--max_length", "64"], "--max_length cannot be used here: rows with pictures are not cut"),
        ([*model, "--skip_modules", "w_proj"], "skipped layers: 'w_proj' names none of"),
        (["--model_name_or_path", saved, "--dataset_name", "pictures", *output], "the model reads text alone"),
        (["--model_name_or_path", saved, "--bad_images", "drop", *output], "--bad_images cannot be used here"),
    ):
        with pytest.raises(InputError, match=words) as error:
            run(*flags, *DYNAMIC)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    lines = [json.loads(line) for line in taught[1].read_text().splitlines()]
    words = tmp_path / "words.jsonl"
    words.write_text("\n".join(json.dumps({name: row[name] for name in ("prompt", "completion")}) for row in lines))
    with pytest.raises(InputError, match="no row is left"):
        run("--model_name_or_path", taught[0], "--dataset_name", words, *output, *DYNAMIC)
