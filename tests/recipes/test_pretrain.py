"""recipes/pretrain.py on your own text: packed, mixed, scheduled, watched, in three objectives."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pretrain
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hfllm.data import packing
from hfllm.data.loading import load_sources
from hfllm.data.packing import Prepared
from hfllm.errors import InputError
from hfllm.runs.models import named_fields, new_config
from hfllm.runs.stage import Stage
from hfllm.stages.pretrain import build as pretrain_build
from hfllm.stages.pretrain.build import infilled, rows_of_run
from hfllm.stages.pretrain.flags import check

ROOT = Path(__file__).parent.parent.parent
WORDS = ["owl", "fox", "red", "blue", "house", "river", "walks", "sings", "the", "a", "old", "small"]


def texts(seed, count=120):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(15, 80))) + "." for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """Two files of documents."""
    files = []
    for name, seed in (("one", 1), ("two", 2)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(seed)))
    return files


@pytest.fixture
def run(tmp_path):
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 320,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "logging_steps": 1,
        "sample_steps": 0,
        "output_dir": str(tmp_path / "out"),
    }

    def make(*flags, **values):
        settings = {name: value for name, value in {**tiny, **values}.items() if value is not None}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return pretrain.main(*pretrain.parse([*words, *map(str, flags)]))

    return make


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_it_packs_mixes_schedules_and_reports(run, corpus, tmp_path):
    metrics = run(
        *("--dataset_mixture", f"{corpus[0]}:0.75", f"{corpus[1]}:0.25"),
        total_tokens=6400,
        length_curriculum="0:16,0.25:32,0.5:64",
        batch_ramp="0:128,0.5:512",
        z_loss_coef=1e-4,
        peak_flops=1e12,
        sample_steps=10,
    )
    out = tmp_path / "out"
    assert {"bits_per_byte", "bits_per_byte_5gram", "bits_per_byte_gzip", "tokens_per_second"} <= metrics.keys()
    assert 0 < metrics["bits_per_byte"] < 8 and metrics["bits_per_byte_5gram"] < metrics["bits_per_byte_gzip"]
    steps = [entry for entry in history(out) if "loss" in entry]
    # 100 rows of 64 tokens: 50 in batches of 2, 50 in batches of 8.
    assert len(steps) == 25 + 7
    assert all({"tokens_per_second", "bits_per_byte", "mfu"} <= entry.keys() for entry in steps)
    report = (out / "report.md").read_text()
    assert "## Sources" in report and "one.jsonl" in report and "## Samples" in report and "](loss.png)" in report
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {10, 20, 30, 32}
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_max_samples_is_of_each_dataset_of_a_mixture(run, corpus):
    mixture = ("--dataset_mixture", f"{corpus[0]}:1", f"{corpus[1]}:1")
    assert run(*mixture, max_samples=40, total_tokens=640)["documents"] == 2 * 38


@pytest.mark.slow
def test_the_world_may_be_a_part_of_a_mixture(run, corpus):
    run("--dataset_mixture", f"{corpus[0]}:1", "world:1", num_documents=200, total_tokens=640)


def test_a_baseline_learns_from_the_beginning_of_a_long_text():
    assert list(pretrain_build.beginning(["ab", "cé", "d"], 4)) == ["ab", "c"]
    assert list(pretrain_build.beginning(["long"], 3)) == ["lon"] and list(pretrain_build.beginning(["ab"], 9)) == [
        "ab"
    ]


def test_all_texts_of_a_mixture_are_ordered_by_weight(corpus, tmp_path):
    flags = ["--dataset_mixture", f"{corpus[0]}:3", f"{corpus[1]}:1", "--output_dir", str(tmp_path)]
    arguments = pretrain.parse(flags)[0]
    prepared = Prepared(tmp_path / "it", {})
    sources, together, held_out = load_sources(arguments.text_sources, arguments.mixture_weights, 0, prepared)
    assert sorted(together) == sorted(text for source in sources.values() for text in source["text"])
    first, second = (set(source["text"]) for source in sources.values())
    for count in (40, 80, 120):
        sizes = [sum(len(text) for text in together[:count] if text in source) for source in (first, second)]
        assert sizes[0] / sum(sizes) == pytest.approx(0.75, abs=0.03)
    assert len(held_out) == 12


def test_nothing_is_held_out_of_one_dataset_that_another_trains_on(corpus, tmp_path):
    copied = tmp_path / "copied.jsonl"
    copied.write_text("".join(corpus[0].read_text().splitlines(keepends=True)[:60]))
    flags = ["--dataset_mixture", f"{corpus[0]}:1", f"{copied}:1", "--output_dir", str(tmp_path)]
    arguments = pretrain.parse(flags)[0]
    prepared = Prepared(tmp_path / "it", {})
    _, together, held_out = load_sources(arguments.text_sources, arguments.mixture_weights, 0, prepared)
    # Six of the whole and three of its half were taken.
    assert 0 < len(held_out) < 9 and not set(held_out) & set(together)


@pytest.mark.slow
def test_flags_reach_a_new_model(run, corpus, tmp_path, monkeypatch):
    made = []
    build = pretrain_build.trainer_of_rows
    monkeypatch.setattr(pretrain_build, "trainer_of_rows", lambda *args: made.append(args[2]) or build(*args))
    run(dataset_name=corpus[0], attn_implementation="eager", dtype="bfloat16", total_tokens=640)
    assert made[0].config._attn_implementation == "eager" and made[0].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    # What is not saved is what a loaded model has, such as the frequencies of rotary positions.
    assert all(map(torch.equal, made[0].buffers(), loaded.buffers()))
    with pytest.raises(InputError, match="--attn_implementation fast: "):
        run(dataset_name=corpus[0], output_dir=tmp_path / "other", attn_implementation="fast")


@pytest.mark.slow
def test_half_a_surrogate_pair_stops_nothing(run, corpus):
    with corpus[0].open("a") as file:
        file.write('{"text": "the old \\ud83e fox walks"}\n')
    assert run(dataset_name=corpus[0], total_tokens=640)["documents"] == 115


@pytest.mark.slow
def test_files_that_are_edited_make_another_run(run, corpus, tmp_path):
    folder = corpus[0].parent / "texts" / "deeper"
    folder.mkdir(parents=True)
    for file in corpus:
        file.rename(folder / file.name)
    settings = {"dataset_name": folder.parent, "total_tokens": 640}
    assert run(**settings) == run(**settings)
    before = run(**settings)
    os.utime(folder / "one.jsonl", (2e9, 2e9))
    assert run(**settings) == before
    with (folder / "one.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    os.utime(folder / "one.jsonl", (2e9, 2e9))
    with pytest.raises(InputError, match="holds a finished run with dataset_name contents="):
        run(**settings)


def test_chinchilla_is_twenty_tokens_per_parameter(corpus, tmp_path):
    flags = ["--dataset_name", str(corpus[0]), "--total_tokens", "chinchilla", "--output_dir", str(tmp_path)]
    script_args, training_args, _ = pretrain.parse(flags)
    assert rows_of_run(training_args, script_args.total_tokens, 512, 1000, 7) == 20_000 // 512


@pytest.mark.slow
def test_the_masked_objective_makes_a_bidirectional_model(run, corpus, tmp_path):
    metrics = run(dataset_name=corpus[0], objective="masked", total_tokens=3200)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "HfllmForMaskedLM" and not model.config.is_causal
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<|mask|>"
    assert "bits_per_byte" not in metrics and metrics["eval_loss"] > 0


@pytest.mark.slow
def test_the_infilling_objective_cuts_documents_in_three(run, corpus, tmp_path):
    run(dataset_name=corpus[0], objective="infilling", total_tokens=3200)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer("<PRE> a <SUF>b <MID>")["input_ids"]) < 10
    documents = list(infilled(texts(1), tokenizer, 512, seed=0))
    assert sum(document.startswith("<PRE>") for document in documents) == pytest.approx(108, abs=12)


@pytest.mark.slow
def test_a_tokenizer_may_be_named(run, corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(dataset_name=corpus[0], tokenizer_name_or_path=tmp_path / "tokenizer", total_tokens=1600)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_it_resumes_where_it_was(run, corpus, tmp_path):
    settings = {"dataset_name": corpus[0], "total_tokens": 6400, "save_strategy": "steps", "save_steps": 10}
    whole = run(**settings)
    for path in ("report.json", "model.safetensors"):
        (tmp_path / "out" / path).unlink()
    assert not (tmp_path / "out" / "prepared").exists()
    again = run(**settings, resume_from_checkpoint=tmp_path / "out" / "checkpoint-10")
    assert again["eval_loss"] == whole["eval_loss"]


@pytest.mark.slow
def test_a_resumed_run_reads_no_text_again(run, corpus, tmp_path, monkeypatch):
    settings = {"dataset_name": corpus[0], "total_tokens": 6400, "save_strategy": "steps", "save_steps": 10}
    whole = run(**settings, output_dir=tmp_path / "whole")
    finish = Stage.finish
    monkeypatch.setattr(Stage, "finish", lambda *args, **kwargs: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run(**settings)
    monkeypatch.setattr(Stage, "finish", finish)
    packed = []
    monkeypatch.setattr("hfllm.data.loading.iterate_source", lambda *args: pytest.fail("read again"))
    pack = packing.packed_tables
    monkeypatch.setattr(packing, "packed_tables", lambda texts, *rest: packed.append(len(texts)) or pack(texts, *rest))
    again = run(**settings, resume_from_checkpoint=tmp_path / "out" / "checkpoint-10")
    assert again["eval_loss"] == whole["eval_loss"]
    # Only what was held out.
    assert packed == [6]


@pytest.mark.slow
def test_muon_learns_and_is_refused_where_it_cannot(run, corpus, tmp_path):
    settings = {"dataset_name": corpus[0], "num_train_epochs": 1, "learning_rate": 6e-3}
    plain = run(**settings, output_dir=tmp_path / "adamw", use_muon="false")
    muon = run(**settings, output_dir=tmp_path / "muon")
    assert muon["eval_loss"] != plain["eval_loss"]
    padded = run(**settings, output_dir=tmp_path / "padded", use_muon=True, packing="false")
    # A uniform guess over some 300 tokens loses 5.7.
    assert max(muon["eval_loss"], padded["eval_loss"]) < 4
    with pytest.raises(InputError, match="--use_muon cannot be used here: --optim sgd is asked for too"):
        run(**settings, use_muon=True, optim="sgd")


def test_under_deepspeed_the_default_is_adamw(corpus, tmp_path):
    pytest.importorskip("deepspeed")
    flags = ["--dataset_name", str(corpus[0]), "--output_dir", str(tmp_path)]
    assert pretrain.parse(flags)[0].use_muon
    flags += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    script_args, training_args, model_args = pretrain.parse(flags)
    assert not script_args.use_muon and training_args.learning_rate == 0.002
    with pytest.raises(InputError, match="--use_muon cannot be used here: DeepSpeed and FSDP"):
        check(replace(script_args, use_muon=True), training_args, model_args)


def test_under_fsdp_the_default_is_adamw(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not pretrain.parse(["--dataset_name", str(corpus[0]), "--output_dir", str(tmp_path)])[0].use_muon
    script_args, training_args, _ = pretrain.parse(["--output_dir", str(tmp_path)])
    assert (script_args.use_muon, training_args.learning_rate) == (False, 0.003)


def test_on_the_world_another_optimizer_takes_the_place_of_muon(tmp_path):
    assert pretrain.parse(["--output_dir", str(tmp_path)])[0].use_muon
    script_args, training_args, _ = pretrain.parse(["--output_dir", str(tmp_path), "--optim", "sgd"])
    assert (script_args.use_muon, training_args.learning_rate) == (False, 0.003)


@pytest.mark.slow
def test_text_of_less_than_one_row_is_one_row(run, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one two three"}\n{"text": "four five"}\n')
    assert run(dataset_name=tmp_path / "few.jsonl")["documents"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"packing": "false", "length_curriculum": "0:32,0.5:64"}, "--length_curriculum cannot be used here"),
        ({"packing": "false", "objective": "masked"}, "--objective cannot be used here"),
        ({"length_curriculum": "0:48"}, "length of 48 does not divide the row length of 64"),
        ({"batch_ramp": "0:32"}, "a batch of 32 tokens has 0 rows of 64 tokens"),
        ({"batch_ramp": "many"}, "--batch_ramp 'many': expected a number, or share:number"),
        ({"total_tokens": "lots"}, "--total_tokens 'lots': expected a number of tokens, or 'chinchilla'"),
        ({"total_tokens": "10"}, r"the run has 0 row\(s\) of 64 tokens"),
        ({"total_tokens": "640", "max_steps": 3}, "--max_steps cannot be used here"),
        ({"objective": "masked", "model_name_or_path": "nowhere"}, "--objective masked cannot be used here"),
        ({"z_loss_coef": "-1"}, "--z_loss_coef -1.0: expected a number of at least 0"),
        ({"model_name_or_path": "nowhere"}, "--vocab_size cannot be used here: it is for a new model"),
        ({"load_in_4bit": "true"}, "--load_in_4bit cannot be used here: such weights cannot be trained"),
    ],
)
def test_what_cannot_work_is_refused(run, corpus, flags, message):
    with pytest.raises(InputError, match=message):
        run(dataset_name=corpus[0], **flags)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (["{0}"], "expected NAME:WEIGHT"),
        (["{0}:0"], "with a weight above 0"),
        (["{0}:1", "{0}:2"], "a dataset comes twice"),
    ],
)
def test_bad_mixtures_are_refused(run, corpus, mixture, message):
    with pytest.raises(InputError, match=message):
        run("--dataset_mixture", *(entry.format(corpus[0]) for entry in mixture))


def test_a_new_model_has_the_named_architecture(corpus, tmp_path, make_config):
    """And rows of the vocabulary's tables that no token has."""
    make_config(vocab_size=512, hidden_size=32, norm_type="layernorm").save_pretrained(tmp_path / "config")
    flags = ["--dataset_name", str(corpus[0]), "--config_name_or_path", str(tmp_path / "config")]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"]
    pretrain.main(*pretrain.parse([*flags, "--max_length", "32"]))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.vocab_size, config.hidden_size, config.norm_type) == (512, 32, "layernorm")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= 512
    make_config(vocab_size=512, hidden_size=32).save_pretrained(tmp_path / "config")
    with pytest.raises(InputError, match="finished run with config_name_or_path contents="):
        pretrain.main(*pretrain.parse([*flags, "--max_length", "32"]))
    with pytest.raises(InputError, match="--hidden_size cannot be used here: --config_name_or_path has it"):
        pretrain.main(*pretrain.parse([*flags, "--hidden_size", "64", "--output_dir", str(tmp_path / "other")]))
    too_small = ["--config_name_or_path", str(tmp_path / "small"), "--tokenizer_name_or_path", str(tmp_path / "out")]
    make_config(vocab_size=40, hidden_size=32).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"vocab_size=40 is less than the \d+ tokens of the tokenizer"):
        pretrain.main(*pretrain.parse([*flags, *too_small, "--output_dir", str(tmp_path / "third")]))


@pytest.mark.slow
def test_layers_of_several_kinds_are_flags(run, corpus, tmp_path):
    flags = ["--layer_types", "sliding_attention", "linear_attention", "full_attention", "--sliding_window", "16"]
    flags += ["--no_rope_layers", "1", "1", "0", "--num_hidden_layers", "6", "--linear_key_head_dim", "8"]
    metrics = run(*flags, dataset_name=corpus[0], max_steps=1, num_hidden_layers=None)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.layer_types == ["sliding_attention", "linear_attention", "full_attention"] * 2
    assert config.no_rope_layers == [1, 1, 0] * 2 and config.linear_key_head_dim == 8
    assert metrics["parameters"] == config.num_parameters()


@pytest.mark.slow
def test_sparse_attention_is_a_flag(run, corpus, tmp_path):
    flags = ["--attn_implementation", "sparse", "--sparse_block_size", "8", "--sparse_num_blocks", "2"]
    run(*flags, dataset_name=corpus[0], max_steps=1)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["sparse_block_size"], saved["sparse_num_blocks"]) == (8, 2)


@pytest.mark.parametrize(
    ("implementation", "fields", "reason"),
    [
        ("sparse", {}, "needs sparse_block_size of at least 1 in the config, got None"),
        ("banded", {"attn_logit_softcapping": 20.0}, "has no attn_logit_softcapping"),
    ],
)
def test_attention_that_cannot_compute_the_model_is_refused(tmp_path, make_model, implementation, fields, reason):
    make_model(**fields).save_pretrained(tmp_path)
    for flag in ("--model_name_or_path", "--config_name_or_path"):
        flags = ["--attn_implementation", implementation, flag, str(tmp_path), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(InputError, match=f"^--attn_implementation {implementation}: .*{reason}"):
            check(*pretrain.parse(flags))


@pytest.mark.parametrize(
    "fields",
    [
        {"sparse_block_size": 8, "sparse_num_blocks": 2},
        {"kv_lora_rank": 16, "num_key_value_heads": None},
        {"num_local_experts": 4, "moe_intermediate_size": 16, "scoring_func": "sigmoid"},
    ],
)
def test_a_named_architecture_has_every_field(tmp_path, make_config, fields):
    config = make_config(**fields)
    config.save_pretrained(tmp_path)
    made = new_config(named_fields(str(tmp_path)))
    assert made.num_parameters() == config.num_parameters()
    for name in fields:
        assert getattr(made, name) == getattr(config, name), name


@pytest.mark.slow
def test_a_model_without_sparse_attention_has_no_sizes_of_it(run, corpus, tmp_path):
    run(dataset_name=corpus[0], max_steps=1)
    assert not [name for name in json.loads((tmp_path / "out" / "config.json").read_text()) if "sparse_" in name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--layer_types", "linear_atention", "full_attention"],
            "'linear_atention' is not one of .* did you mean 'linear_attention'",
        ),
        (["--layer_types", *["full_attention"] * 3], "has 3 values for --num_hidden_layers 2"),
        (["--layer_types", "linear_attention"], "has linear_attention alone"),
        (["--layer_types", "sliding_attention", "full_attention"], "needs sliding_window"),
        (["--layer_types", "sliding_attention", "--sliding_window", "0"], "sliding_window must be at least 1"),
        (
            ["--layer_types", "chunked_attention", "--attention_chunk_size", "0"],
            "attention_chunk_size must be at least 1",
        ),
        (["--linear_num_value_heads", "2"], "--linear_num_value_heads 2 needs linear_attention in --layer_types"),
        (
            [
                *("--attn_implementation", "sparse", "--sparse_block_size", "8", "--sparse_num_blocks", "2"),
                *("--objective", "masked"),
            ],
            "--objective masked sees later tokens",
        ),
        (["--no_rope_layers", "2"], "no_rope_layers=.* must be one 0"),
        (["--attn_implementation", "sparse", "--sparse_block_size", "8"], "--sparse_num_blocks None: expected both"),
        (["--sparse_block_size", "8", "--sparse_num_blocks", "2"], "it needs --attn_implementation sparse"),
        (
            ["--sparse_num_blocks", "2"],
            "--sparse_num_blocks cannot be used here: it needs --attn_implementation sparse",
        ),
        (["--attn_implementation", "sparse"], "needs --sparse_block_size and --sparse_num_blocks"),
        (["--layer_type", "full_attention"], "did you mean 'layer_types'"),
    ],
)
def test_bad_mixes_of_layers_are_refused(run, corpus, flags, message):
    with pytest.raises(InputError, match=message):
        run(*flags, dataset_name=corpus[0])
