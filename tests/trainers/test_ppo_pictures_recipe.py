"""`hfllm rlhf` on a dataset with a column of pictures."""

import json

import picture_run as run
import pytest
import rlhf

import hfllm
from hfllm.errors import InputError

REWARD = """
def names_side(completions, side, **columns):
    return [float(said[0]["content"].split() == [answer]) for said, answer in zip(completions, side)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that reads pictures, one of text, a reward, and rows that name their pictures' files."""
    made = tmp_path_factory.mktemp("pictures")
    run.make_model().save_pretrained(made / "model")
    run.make_processor().save_pretrained(made / "model")
    config = hfllm.HfllmConfig(vocab_size=len(run.WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hfllm.HfllmForCausalLM(config).save_pretrained(made / "text")
    run.make_processor().tokenizer.save_pretrained(made / "text")
    (made / "my.py").write_text(REWARD)
    rows = run.halves(24)
    for number, row in enumerate(rows):
        row["image"].save(made / f"{number}.png")
        row["image"] = str(made / f"{number}.png")
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def parsed(folder, output, **flags):
    given = {
        **{"model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": output},
        **{"reward_funcs": f"{folder / 'my.py'}:names_side", "num_eval_prompts": 4, "max_steps": 2},
        **{"per_device_train_batch_size": 4, "response_length": 2, "save_strategy": "no"},
    }
    return rlhf.parse([each for name, value in (given | flags).items() for each in (f"--{name}", str(value))])


def test_a_policy_that_reads_pictures_is_aligned_and_saved_with_its_processor(folder, tmp_path):
    metrics = rlhf.main(*parsed(folder, tmp_path / "out"))
    assert metrics["episodes"] == 16
    assert (tmp_path / "out" / "processor_config.json").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]["eval_prompts"] == 2


def test_a_policy_of_text_refuses_rows_with_pictures_before_training(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"rows.jsonl, line \d+ has a picture, and the policy \(of type hfllm\) reads none"
    ):
        rlhf.main(*parsed(folder, tmp_path / "out", model_name_or_path=folder / "text"))
