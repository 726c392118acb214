"""`hfllm rlhf` on a dataset with a column of pictures."""

import json

import picture_run as run
import pytest
import rlhf
import torch
from safetensors.torch import load_file

import hfllm
from hfllm.errors import InputError
from hfllm.stages.rlhf.build import prompt_data
from hfllm.trainers.ppo.prompts import read_rows
from hfllm.trainers.ppo.setup import check_uses
from hfllm.trainers.ppo.trainer import PPOTrainer

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
        # As seen from the dataset, in the three ways of writing it.
        path, words = f"{number}.png", row["prompt"][0]["content"]
        if number % 3 == 0:
            row |= {"image": path, "prompt": f"<image>\n{words}"}
        elif number % 3 == 1:
            row["image"] = path
        else:
            content = [{"type": "image", "image": path}, {"type": "text", "text": words}]
            row = {"prompt": [{"role": "user", "content": content}], "side": row["side"]}
        rows[number] = row
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def parsed(folder, output, **flags):
    given = {
        **{"model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": output},
        **{"reward_funcs": f"{folder / 'my.py'}:names_side", "num_eval_prompts": 4, "max_steps": 2},
        **{"per_device_train_batch_size": 4, "response_length": 2, "save_strategy": "no"},
    }
    return rlhf.parse([each for name, value in (given | flags).items() for each in (f"--{name}", str(value))])


@pytest.mark.slow
def test_a_policy_that_reads_pictures_is_aligned_and_saved_with_its_processor(folder, tmp_path):
    metrics = rlhf.main(*parsed(folder, tmp_path / "out"))
    assert metrics["episodes"] == 16
    assert (tmp_path / "out" / "processor_config.json").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]["eval_prompts"] == 2


def test_every_way_of_writing_a_row_gives_the_same_prompt(folder, tmp_path):
    """A picture's four places and the words, whose pixels are those of the file."""
    script_args, args, _ = parsed(folder, tmp_path / "out")
    rows = [row for part in prompt_data(script_args, args.seed, []) for row in part]
    ids, seen = read_rows(rows, run.make_processor())
    assert len(rows) == 24 and len({tuple(each) for each in ids}) == 1 and ids[0].count(4) == 4
    sides = [
        float(episode["pixel_values"][..., :4].mean() - episode["pixel_values"][..., 4:].mean())
        for episode in seen["pictures"].episodes
    ]
    assert ["left" if side > 0 else "right" for side in sides] == [row["side"] for row in rows]


def test_prompts_of_text_are_conversations_where_others_have_pictures(folder, tmp_path):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines += [json.dumps({"prompt": f"say {word}", "side": word}) for word in ("left", "right", "which", "is")]
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    script_args, args, _ = parsed(folder, tmp_path / "out", dataset_name=folder / "mixed.jsonl")
    rows = [row for part in prompt_data(script_args, args.seed, []) for row in part]
    assert all(isinstance(row["prompt"], list) for row in rows) and {"images", "image"} <= rows[0].keys()
    script_args, args, _ = parsed(folder, tmp_path / "out", augment=0.5)
    with pytest.raises(InputError, match="--augment cannot be used here: the prompts have pictures"):
        prompt_data(script_args, args.seed, [])


@pytest.mark.slow
def test_blank_prompts_are_left_out_and_pictures_are_not(folder, tmp_path):
    flags = {"num_eval_prompts": 4, "filter_prompts": True}
    assert rlhf.main(*parsed(folder, tmp_path / "out", **flags))["train_prompts"] == 22


def test_a_policy_of_text_refuses_rows_with_pictures_before_training(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"rows.jsonl, line \d+ has a picture, and the policy \(of type hfllm\) reads none"
    ):
        rlhf.main(*parsed(folder, tmp_path / "out", model_name_or_path=folder / "text"))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [["freeze_vision"], ["freeze_text"], ["freeze_vision", "freeze_text"]])
def test_frozen_parts_stay_as_they_are(folder, tmp_path, frozen, monkeypatch):
    """To the bit, also where the head for values learns through them; the reference is the model before."""
    kept, save = {}, PPOTrainer.save_model

    def look(self, *args, **kwargs):
        kept["reference"] = {name: value.clone() for name, value in self.reference.state_dict().items()}
        kept["value_head"] = [weight.grad is not None for weight in self.actor.value_head.parameters()]
        return save(self, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "save_model", look)
    more = {"learning_rate": "0.05", "weight_decay": "0.1", **dict.fromkeys(frozen, "true")}
    rlhf.main(*parsed(folder, tmp_path / "out", **more))
    before, after = (load_file(each / "model.safetensors") for each in (folder / "model", tmp_path / "out"))
    assert all(torch.equal(kept["reference"][name], value) for name, value in before.items()) and kept["value_head"]
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    stays = {"freeze_vision": ("model.vision_tower",), "freeze_text": ("model.language_model", "lm_head")}
    names = tuple(each for flag in frozen for each in stays[flag])
    learned = {name for name in after if not name.startswith(names)}
    # Some weights of a tower have no path to the decoder.
    assert moved <= learned and {name.split(".")[1] for name in moved} == {name.split(".")[1] for name in learned}


def test_nothing_is_frozen_where_that_has_no_meaning(folder, tmp_path):
    with pytest.raises(InputError, match="--freeze_text cannot be used here: with --use_peft all weights are frozen"):
        rlhf.main(*parsed(folder, tmp_path / "out", freeze_text="true", use_peft="true"))
    asked = [[{"role": "user", "content": f"say {word}"}] for word in ("left", "right", "which", "is")]
    rows = [json.dumps({"prompt": prompt, "side": "left"}) for prompt in asked]
    (folder / "words.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match="--freeze_vision cannot be used here: no row has a picture"):
        rlhf.main(*parsed(folder, tmp_path / "out", freeze_vision="true", dataset_name=folder / "words.jsonl"))
    assert not (tmp_path / "out").exists()


def test_deepspeed_that_accelerate_brings_takes_pictures_in_all_prompts_or_none(folder, tmp_path):
    args = parsed(folder, tmp_path / "out")[1]
    check_uses(args, [(3, 8)], None, False)
    # As under `accelerate launch --use_deepspeed`, where the flag is not given.
    args.deepspeed_plugin = object()
    check_uses(args, [(8, 8), (0, 4)], None, False)
    with pytest.raises(InputError, match="deepspeed with pictures in some prompts only"):
        check_uses(args, [(8, 8), (3, 8)], None, False)
