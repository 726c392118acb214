"""hfllm quantize: from nothing and on your own model; the saved model reloads; bad flags are refused."""

import json
from pathlib import Path

import pytest
import quantize
import torch
from transformers import AutoModelForCausalLM

from hfllm.errors import InputError

METRICS = {
    *("bytes_before", "bytes_after", "linear_bytes_share", "perplexity_before", "perplexity_after", "agreement"),
    *("reload_difference", "prefill_speedup", "decode_speedup"),
}
GOLD = {"gold_reward_before", "gold_reward_after"}
ERRORS = ("before_se", "after_se", "change", "change_se", "n")
METRICS |= {f"perplexity_{ending}" for ending in ERRORS}
GOLD |= {f"gold_reward_{ending}" for ending in ERRORS}
QUICK = (
    *("--num_eval_texts", "8", "--num_eval_prompts", "12", "--response_length", "4", "--num_sensitivity_texts", "2"),
    *("--prompt_tokens", "8", "--new_tokens", "2", "--rounds", "1"),
)
DYNAMIC = ("--schemes", "dynamic", "--save_scheme", "dynamic")


def run(*argv):
    return quantize.main(*quantize.parse([*QUICK, *map(str, argv)]))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The recipe in miniature, from nothing."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantize")
    flags = ["--pretrain_config", tiny["pretrain"], "--sft_config", tiny["sft"], "--schemes", "int8", "dynamic"]
    flags += ["--output_dir", folder / "out"]
    return folder / "out", flags, run(*flags)


@pytest.mark.slow
def test_from_nothing(made, capsys):
    folder, flags, metrics = made
    report = json.loads((folder / "report.json").read_text())
    # A share of 0 and 1, as the gold rewards of so small a model are, has bounds.
    assert {name for name in metrics if not name.endswith(("_low", "_high"))} == METRICS | GOLD
    assert report["metrics"] == metrics
    assert metrics["reload_difference"] == 0
    # 32 inputs to a row, so that its scale in float32 is an eighth of the weights.
    assert metrics["linear_bytes_share"] < 0.3
    assert metrics["bytes_after"] < metrics["bytes_before"]
    assert metrics["perplexity_after"] == pytest.approx(metrics["perplexity_before"], rel=0.01)
    assert metrics["agreement"] > 0.8
    for name in ("sensitivity_layer", "sensitivity_kind"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert all(f"| {name} " in text for name in ("original", "int8", "dynamic", "model.layers.1", "mlp.down_proj"))
    assert (folder / "README.md").is_file()
    assert report["artifacts"]["model"] == "."
    assert report["arguments"]["schemes"] == ["int8", "dynamic"]
    capsys.readouterr()
    assert run(*flags) == metrics
    assert "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="finished run with num_eval_texts=8, this one has num_eval_texts=9"):
        run(*flags, "--num_eval_texts", "9")


@pytest.mark.slow
def test_the_saved_model_is_loaded_by_the_lines_of_the_report(made):
    text = (made[0] / "report.md").read_text()
    names = {}
    exec(text.partition("## Next")[2].split("```")[1], names)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    ids = names["tokenizer"]("The cat", return_tensors="pt")
    assert names["model"].generate(**ids, max_new_tokens=2).shape[0] == 1


@pytest.mark.slow
def test_the_page_explains_every_metric(made):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "quantization.md").read_text()
    for name in made[2]:
        assert f"`{name}`" in page, name


def test_on_a_model_of_your_own(saved, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("The fox runs.\n\nThe fox sleeps in the day.\n\nThe bird sings.")
    flags = ["--model_name_or_path", saved, "--dataset_name", texts, "--output_dir", tmp_path / "out"]
    metrics = run(*flags, "--schemes", "dynamic", "--save_scheme", "dynamic", "--sensitivity", "none", "--rounds", "0")
    assert set(metrics) == METRICS - {"prefill_speedup", "decode_speedup"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    with pytest.raises(InputError, match=r"is quantized already \(hfllm_int8\)"):
        run("--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "twice")


def test_a_model_is_not_written_over_itself(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(InputError, match=r"link is --model_name_or_path, which it would overwrite"):
        run("--model_name_or_path", saved, "--output_dir", tmp_path / "link", *DYNAMIC)


def test_more_tokens_than_the_context_are_not_timed(saved, tmp_path):
    flags = ["--model_name_or_path", saved, "--output_dir", tmp_path / "out", "--schemes", "dynamic"]
    with pytest.raises(InputError, match=r"are 302 tokens, the model's context is 256: choose fewer, or --rounds 0"):
        run(*flags, "--save_scheme", "dynamic", "--prompt_tokens", "300")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "dynamic"])
def test_what_is_published_loads_and_learns_on(hub, saved, learns_on, tmp_path, scheme):
    if scheme == "int8":
        pytest.importorskip("bitsandbytes")
    quick = ["--schemes", scheme, "--save_scheme", scheme, "--sensitivity", "none", "--rounds", "0"]
    flags = ["--model_name_or_path", saved, "--output_dir", tmp_path / "out", *quick, "--skip_modules", "v_proj"]
    run(*flags, "--push_to_hub", "--hub_model_id", "me/small")
    folder = hub.repos["me/small"].download(tmp_path / "copy")
    assert {"config.json", "model.safetensors", "report.json"} <= {path.name for path in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "import hfllm" in card
    assert f"quantized ({'hfllm_int8' if scheme == 'dynamic' else 'bitsandbytes'})" in card
    # The family's code can travel; the scheme of ours is known to hfllm alone.
    assert ("trust_remote_code=True" in card) == (scheme == "int8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.is_quantized and type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    learns_on(folder)
    run(*flags, "--push_to_hub", "--hub_model_id", "me/small")
    assert len(hub.repos["me/small"].messages) == 2  # made, and pushed once


def test_help_lists_each_flag_once_and_none_of_training(capsys):
    with pytest.raises(SystemExit):
        quantize.parse(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert {"--output_dir", "--seed", "--model_name_or_path", "--save_scheme"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert "--learning_rate" not in listed


def test_the_flags_know_all_parts():
    from hfllm.compression import schemes
    from hfllm.stages.quantize import PARTS

    assert PARTS == schemes.PARTS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schemes", "int9"], "scheme 'int9' is not one of int8, nf4"),
        (["--save_scheme", "int9"], "scheme 'int9' is not one of int8, nf4"),
        (["--sensitivity", "block"], "--sensitivity 'block': expected some of linear, layer, kind, or none"),
        (["--num_eval_texts", "0"], "--num_eval_texts 0: expected at least 1"),
        (["--max_length", "1"], "--max_length 1: expected at least 2"),
        (["--rounds", "-1"], "--rounds -1: expected at least 0"),
        (["--use_peft"], "--use_peft cannot be used"),
        (["--load_in_8bit"], "--load_in_8bit cannot be used"),
        (["--bnb_4bit_quant_type", "fp4"], "--bnb_4bit_quant_type cannot be used here: --schemes says how"),
        (["--use_bnb_nested_quant"], "--use_bnb_nested_quant cannot be used"),
        (["--bnb_4bit_quant_storage", "uint8"], "--bnb_4bit_quant_storage cannot be used"),
        (["--model_name_or_path", "x", "--sft_config", "y"], "--sft_config cannot be used here: the model is named"),
        (["--model_name_or_path", "x", "--pretrain_config", "y"], "--pretrain_config cannot be used"),
        (["--max_samples", "3"], "--max_samples cannot be used"),
        (["--llm_int8_threshold", "-1"], "llm_int8_threshold=-1.0: expected a number of at least 0"),
        (
            ["--schemes", "dynamic", "--save_scheme", "dynamic", "--llm_int8_threshold", "2"],
            "--llm_int8_threshold cannot be used here: no scheme is int8",
        ),
        (["--scheme", "int8"], "did you mean 'schemes'"),
        (["--model_name_or_path", "nowhere/at-all"], "could not be loaded"),
        # Of the model that the stages before are to make.
        ([*DYNAMIC, "--skip_modules", "w_proj"], "skipped layers: 'w_proj' names none of down_proj"),
        ([*DYNAMIC, "--prompt_tokens", "5000"], "are 5032 tokens, the model's context is 512"),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.pipeline.run_stage", lambda *args, **kwargs: pytest.fail("a stage was run"))
    with pytest.raises(InputError, match=message):
        quantize.main(*quantize.parse([*flags, "--output_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_a_missing_library_and_a_wrong_device_are_refused_before_anything_is_made(monkeypatch, tmp_path):
    from hfllm.compression import schemes

    output = ["--output_dir", tmp_path / "out"]
    monkeypatch.setattr(schemes, "default_device", lambda: "cuda")
    with pytest.raises(InputError, match="scheme 'dynamic' runs on cpu, not on cuda"):
        run("--schemes", "dynamic", *output)
    monkeypatch.undo()
    monkeypatch.setattr(schemes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"scheme 'int8' needs bitsandbytes: pip install"):
        run("--schemes", "dynamic", "--save_scheme", "int8", *output)
    assert not (tmp_path / "out").exists()
