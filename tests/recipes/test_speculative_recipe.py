"""hfllm speculative: from nothing and on your own model, with every draft; bad flags are refused."""

import json
from pathlib import Path

import pytest
import speculative
import torch
import yaml

from hfllm.errors import InputError
from hfllm.generation.packed.model import has_int8
from hfllm.stages.speculative import use_plain_generation

METRICS = {
    *("acceptance_rate", "tokens_per_target_call", "speedup", "speedup_predicted", "identical_share"),
    *("speedup_predicted_with_verification", "draft_cost", "verification_cost", "break_even_acceptance"),
    *("acceptance_rate_sampled", "tokens_per_target_call_sampled", "tokens_per_second", "tokens_per_second_plain"),
}
SHORT = {"train_baseline": False, "per_device_train_batch_size": 4, "save_strategy": "no", "num_samples": 1}
QUICK = ("--num_prompts", "12", "--num_timed_prompts", "2", "--max_new_tokens", "12", "--rounds", "1")

needs_int8 = pytest.mark.skipif(not has_int8(torch.float32, torch.device("cpu")), reason="no int8 kernels here")


def run(*argv):
    return speculative.main(*speculative.parse([*QUICK, "--num_draft_tokens_compared", "1", "3", *map(str, argv)]))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The recipe in miniature, from nothing."""
    folder = tmp_path_factory.mktemp("speculative")
    with open(folder / "draft.yaml", "w") as stream:
        sizes = {"student_hidden_size": 16, "student_num_hidden_layers": 1, "student_num_attention_heads": 2}
        yaml.safe_dump({**sizes, "num_examples": 40, "max_steps": 2, "num_eval_prompts": 12, **SHORT}, stream)
    flags = ["--pretrain_config", tiny["pretrain"], "--sft_config", tiny["sft"]]
    flags += ["--draft_config", folder / "draft.yaml", "--output_dir", folder / "out"]
    return folder / "out", flags, run(*flags)


@pytest.mark.slow
def test_from_nothing(made, capsys):
    folder, flags, metrics = made
    report = json.loads((folder / "report.json").read_text())
    assert set(metrics) >= METRICS
    assert report["metrics"] == metrics
    # There is no model in the folder, and so no card.
    assert report["artifacts"] == {"speed": "speed.png"}
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "README.md").exists()
    assert metrics["identical_share"] == 1
    assert 1 <= metrics["tokens_per_target_call"] <= 13
    assert 0 <= metrics["acceptance_rate"] <= 1
    sizes = [json.loads((folder / name / "config.json").read_text())["hidden_size"] for name in ("sft", "draft")]
    assert sizes == [32, 16]
    assert report["arguments"]["draft.teacher_model_name_or_path"] == str(folder / "sft")
    text = (folder / "report.md").read_text()
    assert "Speed by number of draft tokens" in text
    assert "adaptive (asked for)" in text
    capsys.readouterr()
    assert run(*flags) == metrics
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_explains_every_metric(made):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "generation.md").read_text()
    for name in made[2]:
        assert f"`{name}`" in page or f"`{name.removesuffix('_sampled')}`" in page, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--draft", "prompt_lookup", "--num_draft_tokens", "3"],
        ["--draft", "early_exit", "--early_exit_layers", "1", "--batch_size", "2"],
        pytest.param(["--draft", "int8"], marks=needs_int8),
    ],
)
def test_on_a_model_of_your_own(flags, made, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"The {word} cat, the"}) for word in "abcdef"))
    data = ["--dataset_name", prompts, "--output_dir", tmp_path / "out"]
    assert run("--model_name_or_path", made[0] / "sft", *flags, *data)["identical_share"] == 1


def test_options_of_a_checkpoint_are_left_out_on_both_sides(make_model):
    target = make_model(eos_token_id=3)
    target.generation_config.update(repetition_penalty=1.3, top_p=0.8)
    assert use_plain_generation(target) == "repetition_penalty=1.3, top_p=0.8"
    assert target.generation_config.repetition_penalty is None and target.generation_config.eos_token_id == 3
    assert use_plain_generation(target) == ""


@pytest.mark.slow
def test_the_report_says_how_to_decode_in_code_of_your_own(made):
    text = (made[0] / "report.md").read_text()
    code = text.partition("## Next")[2].split("```")[1]
    names = {}
    exec(code, names)
    assert names["output"].sequences.shape[0] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "oracle"], "oracle"),
        (["--num_draft_tokens", "many"], "--num_draft_tokens 'many'"),
        (["--num_draft_tokens_compared", "0"], r"--num_draft_tokens_compared \[0\]"),
        (["--temperature", "0"], "--temperature 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--draft", "prompt_lookup", "--early_exit_layers", "2"], "--early_exit_layers cannot be used"),
        (["--draft", "early_exit", "--max_ngram", "2"], "--max_ngram cannot be used"),
        (["--draft", "early_exit", "--assistant_model_name_or_path", "x"], "--assistant_model_name_or_path cannot"),
        (["--use_peft"], "--use_peft cannot be used"),
        (["--model_name_or_path", "x", "--draft", "int8", "--sft_config", "y"], "--sft_config cannot be used here"),
        (
            ["--draft", "int8", "--draft_config", "x.yaml"],
            "--draft_config cannot be used here: it is for",
        ),
        (
            ["--assistant_model_name_or_path", "x", "--draft_config", "x"],
            "--draft_config cannot be used here: the",
        ),
        (["--assistant_model_name_or_path", "no/such"], "no/such' could not be loaded"),
        (["--draft", "prompt_lookup", "--max_ngram", "0"], "n-grams of 1 to 0"),
        (["--draft", "early_exit", "--early_exit_layers", "4"], "--early_exit_layers 4: the target has 4, so 1 to 3"),
        (["--draft", "int8", "--attn_implementation", "eager"], "attn_implementation='eager' is not 'sdpa'"),
        (["--draft", "int8", "--load_in_8bit"], "--draft int8 cannot be used here: it quantizes plain"),
        (["--dataset_name", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["--draft", "int8", "--compile", "true"], "--compile cannot be used"),
        (["--max_samples", "3"], "--max_samples cannot be used"),
        (["--model_name_or_path", "x"], "--model_name_or_path x needs a draft"),
        (["--num_draft_token", "3"], "did you mean 'num_draft_tokens'"),
        (["--lookahead", "3"], "unknown flag 'lookahead': its name is 'num_draft_tokens' now"),
        (["--lookaheads", "3"], "unknown flag 'lookaheads': its name is 'num_draft_tokens_compared' now"),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.pipeline.run_stage", lambda *args, **kwargs: pytest.fail("a stage was run"))
    with pytest.raises(InputError, match=message):
        speculative.main(*speculative.parse([*flags, "--output_dir", str(tmp_path)]))


@pytest.mark.slow
def test_a_model_that_cannot_be_its_own_int8_draft_is_refused(made, tmp_path):
    flags = ["--model_name_or_path", made[0] / "sft", "--draft", "int8", "--attn_implementation", "eager"]
    with pytest.raises(InputError, match="--draft int8 cannot be used here: attn_implementation='eager'"):
        run(*flags, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_a_draft_with_another_tokenizer_is_refused(made, make_model, tmp_path):
    from hfllm.data.tokenizer import train_tokenizer

    other = train_tokenizer(["zebra quagga okapi " * 20], vocab_size=300, model_max_length=64)
    make_model(vocab_size=400).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    named = ["--model_name_or_path", made[0] / "sft", "--assistant_model_name_or_path", tmp_path / "other"]
    with pytest.raises(InputError, match=r"vocab_size|another tokenizer"):
        run(*named, "--output_dir", tmp_path / "out")
