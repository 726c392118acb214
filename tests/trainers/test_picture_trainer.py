"""The short way from drawn rows to a batch gives what the processor gives: the same tokens, the same pixels."""

import math
import pickle

import numpy
import pytest
import torch
from transformers import TrainingArguments
from vision import parse

from hfllm.data.images.rows import conversation_batch
from hfllm.data.packing import IGNORE
from hfllm.data.world.pictures import (
    CAPTIONS,
    COLORS,
    HELD_OUT,
    PATCHES,
    SEEN,
    SHAPES,
    WORDS,
    DrawnWorld,
    PictureRow,
    Scene,
    Thing,
    patch_names,
)
from hfllm.evaluation.pictures import answer_pictures
from hfllm.stages.vision.build import new_model
from hfllm.trainers.trl_trainers import PatchNames, PictureCollator, PictureTrainer, TokenizedPictures, TurnTokens

SMALL = [
    "--patch_size",
    "4",
    "--hidden_size",
    "16",
    "--num_attention_heads",
    "2",
    "--num_hidden_layers",
    "1",
    "--num_vision_layers",
    "1",
]


@pytest.fixture(scope="module")
def made():
    script_args = parse(["--num_captions", "8", *SMALL])[0]
    rows = DrawnWorld(0, 12, num_questions=3)
    texts = [*rows.texts(), *DrawnWorld(0, 12, CAPTIONS).texts()]
    return new_model(script_args.model_sizes, script_args.dataset_name, texts, seed=0)


def collator(processor):
    images = processor.image_processor
    return PictureCollator(processor.tokenizer.pad_token_id, images.image_mean, images.image_std)


def test_rows_are_the_same_in_a_process_of_their_own(made):
    processor = made[1]
    tokens = TurnTokens(processor, processor.image_token_id, 64)
    rows = TokenizedPictures(DrawnWorld(3, 4, num_questions=3), tokens, PatchNames(processor.tokenizer, 8))
    # So they travel where processes are not forked.
    there = pickle.loads(pickle.dumps(rows))
    for ours, theirs in zip(rows, there, strict=True):
        assert ours.pop("pixels").tolist() == theirs.pop("pixels").tolist() and ours == theirs


@pytest.mark.parametrize("kind", ["questions", CAPTIONS])
def test_tokens_and_pixels_are_those_of_the_processor(made, kind):
    """Each question, behind the picture, has the tokens and positions of a conversation of its own."""
    processor = made[1]
    rows = DrawnWorld(3, 6, kind, num_questions=3)
    tokenized = TokenizedPictures(rows, TurnTokens(processor, processor.image_token_id, 64))
    for row, ours in zip(rows, tokenized, strict=True):
        batch = collator(processor)([ours])
        for number, turn in enumerate(row.turns, 1):
            messages = PictureRow(row.picture, (turn,)).messages()
            messages[0]["content"][0] = {"type": "image", "image": row.picture}
            theirs = processor.apply_chat_template([messages], tokenize=True, return_dict=True)
            mine = [place for place, branch in enumerate(ours["branches"]) if branch in (0, number)]
            assert [ours["input_ids"][place] for place in mine] == list(theirs["input_ids"][0])
            assert [ours["position_ids"][place] for place in mine] == list(range(len(mine)))
        pixels = torch.from_numpy(numpy.stack(theirs["pixel_values"]))
        assert (batch["pixel_values"] - pixels).abs().max() < 1e-5
        # What is learned are the answers, and the mark that ends each.
        learned = [token for token, label in zip(ours["input_ids"], ours["labels"], strict=True) if label != IGNORE]
        said = processor.tokenizer.decode(learned).split(processor.tokenizer.eos_token)
        assert said == [*(answer for _, answer in row.turns), ""]


def test_turns_that_do_not_fit_are_left_out(made):
    """A row ends before the first turn that would be too long for it; one turn stays, whatever its length."""
    processor = made[1]
    settings = processor, processor.image_token_id, 64
    turns = DrawnWorld(3, 1, num_questions=6)[0].turns
    sizes = [len(TurnTokens(*settings)(turns[:count])["input_ids"]) for count in range(1, 7)]
    for most in range(sizes[0] - 2, sizes[-1] + 2):
        row = TurnTokens(*settings, max_length=most)(turns)
        expected = max([size for size in sizes if size <= most], default=sizes[0])
        assert {len(each) for each in row.values()} == {expected}
        assert row["branches"][-1] == sizes.index(expected) + 1


def test_a_question_is_answered_as_if_it_were_the_only_one(made):
    """The loss of several questions in one row is that of each in a row of its own; so padding changes none either."""
    model, processor = made
    tokens, collate = TurnTokens(processor, processor.image_token_id, 64), collator(processor)
    rows = list(DrawnWorld(3, 5, num_questions=3))
    turns = [PictureRow(row.picture, (turn,)) for row in rows for turn in row.turns]

    def total(kept):
        batch = collate(list(TokenizedPictures(kept, tokens)))
        with torch.no_grad():
            return float(model(**batch).loss) * int((batch["labels"] != IGNORE).sum())

    assert total(rows) == pytest.approx(sum(total([row]) for row in turns), rel=1e-5)


def test_the_loss_of_the_trainer_is_that_of_the_model(made, tmp_path):
    """Over all logits and with the model's own loss, also divided by the targets of several batches."""
    model, processor = made
    tokens = TurnTokens(processor, processor.image_token_id, 64)
    settings = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), **settings)
    trainer = PictureTrainer(DrawnWorld(3, 5, num_questions=3), tokens, processor, model=model, args=args)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        theirs = model(**batch, use_cache=False).loss
        assert torch.allclose(trainer.compute_loss(model, batch), theirs, rtol=1e-5)
        count = (batch["labels"] != IGNORE).sum()
        halved = trainer.compute_loss(model, batch, num_items_in_batch=2 * count)
    assert torch.allclose(2 * halved, theirs, rtol=1e-5)
    # Captions come first: rows keep their order.
    assert list(trainer._get_train_sampler()) == list(range(5))


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(made):
    model, processor = made
    rows = list(DrawnWorld(5, 7))
    prompts, images = [row.prompt() for row in rows], [[row.picture] for row in rows]
    whole = answer_pictures(model, processor, prompts, images, 6)
    assert whole == answer_pictures(model, processor, prompts, images, 6, batch_size=2) and len(whole) == 7
    side = processor.tokenizer.padding_side
    batch = conversation_batch(processor, prompts, images, "left", add_generation_prompt=True)
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1 and processor.tokenizer.padding_side == side
    assert all(row[-length:].all() for row, length in zip(batch["attention_mask"], lengths, strict=True))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 7 * 64
    sampled = [answer_pictures(model, processor, prompts, images, 6, do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_untrained_model_sees_its_picture(made):
    """Another picture changes the logits of the answer, so that its pixels do reach them."""
    model, processor = made
    rows, collate = list(DrawnWorld(5, 2)), collator(processor)
    tokenized = TokenizedPictures(rows, TurnTokens(processor, processor.image_token_id, 64))
    one = dict(tokenized[0])
    with torch.no_grad():
        logits = [model(**collate([{**one, "pixels": each["pixels"]}])).logits[:, -1] for each in tokenized]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


# ---- names of patches ----


def test_a_patch_is_named_by_what_has_its_center_there(made):
    scene = Scene((Thing("red", "bar", 0, (9, 10)), Thing("navy", "frame", 3, (24, 31))), "go", 1, (18, 1))
    named = {number: name for number, name in enumerate(patch_names(scene, 8)) if name}
    places = ("top", "left"), ("bottom", "right"), ("top", "right")
    centers = {5: ("red", "bar", *places[0]), 15: ("navy", "frame", *places[1]), 3: ("word", "go", *places[2])}
    parts = {4: ("red", "bar"), 14: ("navy", "frame"), 2: ("word", "go"), 6: ("word", "go"), 7: ("word", "go")}
    assert named == {**centers, **parts}
    numbers = PatchNames(made[1].tokenizer, 8)(scene)
    red, bar = 1 + list(COLORS).index("red"), 1 + SHAPES.index("bar")
    # A part has no corner.
    assert numbers[5] == (red, bar, 1, 1) and numbers[4] == (red, bar, 0, 0) and not any(numbers[0])
    assert numbers[3] == (1 + len(COLORS), 1 + len(SHAPES) + WORDS.index("go"), 1, 2) and len(numbers) == 16
    # What has no name is no target, and parts of two shapes in one patch have none.
    numbers = PatchNames(made[1].tokenizer, 8)(Scene((Thing("", "bar", 0, (9, 10)),)))
    assert numbers[5] == (IGNORE, bar, 1, 1) and numbers[4] == (IGNORE, bar, 0, 0)
    near = Scene((Thing("red", "square", 0, (5, 5), 3), Thing("blue", "square", 0, (13, 9), 3)))
    assert patch_names(near, 8)[1] == ("", "") and patch_names(near, 8)[4] == ("red", "square")
    assert PatchNames(made[1].tokenizer, 8)(near)[1] == (IGNORE, IGNORE, 0, 0)
    # No two things of any drawn scene have their centers in one patch.
    for row in DrawnWorld(0, 200, PATCHES):
        content = len(row.scene.things) + (row.scene.word is not None)
        assert sum(name is not None and len(name) == 4 for name in patch_names(row.scene, 8)) == content


def never_with(color, shape):
    """Return the numbers of the colors that the shape never has in training, and of the shapes of the color."""
    return (
        {1 + list(COLORS).index(each) for each, other in HELD_OUT if other == shape},
        {1 + SHAPES.index(other) for each, other in HELD_OUT if each == color},
    )


def test_a_pair_that_training_never_shows_is_no_wrong_answer(made):
    """By hand: of a shape's patch the colors that it never has are not in the sum of its softmax, nor the reverse."""
    names = PatchNames(made[1].tokenizer, 8)
    torch.manual_seed(0)
    vectors, embeddings = torch.randn(1, 8), torch.randn(len(made[1].tokenizer), 8)
    color, shape = SEEN[0]
    numbers = 1 + list(COLORS).index(color), 1 + SHAPES.index(shape)
    never = never_with(color, shape)
    assert all(never)
    expected = 0.0
    for kind, number in enumerate((*numbers, 1, 1)):
        scores = [0.0, *(vectors @ embeddings[names.ids[kind]].T)[0].tolist()]
        kept = [score for place, score in enumerate(scores) if kind > 1 or place not in never[kind]]
        expected += math.log(sum(map(math.exp, kept))) - scores[number]
    found = names.loss(vectors, embeddings, torch.tensor([[(*numbers, 1, 1)]]))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # Where one is shown after all, it is learned.
    shown = tuple(1 + list(each).index(name) for each, name in zip((COLORS, SHAPES), HELD_OUT[0], strict=True))
    assert names.loss(vectors, embeddings, torch.tensor([[(*shown, 1, 1)]])).isfinite()


def trainer_of(made, folder, rows, **more):
    model, processor = made
    names = PatchNames(processor.tokenizer, 4)
    tokens = TurnTokens(processor, processor.image_token_id, 64)
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", remove_unused_columns=False, **more)
    return PictureTrainer(rows, tokens, processor, names, model=model, args=args)


def test_the_loss_of_names_is_added_to_that_of_answers(made, tmp_path):
    """By hand: the products of other images' vectors and the embeddings of names, and nothing at zero."""
    model, names = made[0], PatchNames(made[1].tokenizer, 4)
    trainer = trainer_of(made, tmp_path, DrawnWorld(3, 4, num_questions=2))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        vectors = torch.stack(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        expected = 0.0
        for axis, ids in enumerate(names.ids):
            scores = torch.cat([torch.zeros(4, 64, 1), vectors @ model.get_input_embeddings().weight[ids].T], -1)
            targets = batch["patches"][..., axis]
            for row, patch in (batch["patches"][..., :2] > 0).all(-1).nonzero().tolist():
                color, shape = batch["patches"][row, patch, :2].tolist()
                if axis < 2 and shape <= len(SHAPES):
                    scores[
                        row, patch, sorted(never_with(list(COLORS)[color - 1], SHAPES[shape - 1])[axis])
                    ] = -torch.inf
            has_name = targets != IGNORE
            chosen = scores.log_softmax(-1)[has_name].gather(-1, targets[has_name][:, None])
            expected -= float(chosen.mean())
        both = float(trainer.compute_loss(model, batch))
        answers = float(trainer.compute_loss(model, {k: v for k, v in batch.items() if k != "patches"}))
        assert both - answers == pytest.approx(expected, rel=1e-4)
        # Without any turn only the names are left, also through the whole model.
        bare = trainer_of(made, tmp_path, DrawnWorld(3, 4, PATCHES))
        batch = bare.data_collator(list(bare.train_dataset))
        alone = float(bare.compute_loss(model, batch))
        wrapped = torch.nn.Sequential(model)
        wrapped.forward = model.forward
        bare.accelerator.unwrap_model = lambda _: model
        assert float(bare.compute_loss(wrapped, batch)) == pytest.approx(alone, rel=1e-5)
    halved = trainer_of(made, tmp_path, DrawnWorld(3, 4, PATCHES), gradient_accumulation_steps=2)
    assert 2 * float(halved.compute_loss(model, batch).detach()) == pytest.approx(alone, rel=1e-5)


def test_patches_alone_move_the_tower_and_leave_the_decoder(made, tmp_path):
    model = made[0]
    model.zero_grad()
    trainer = trainer_of(made, tmp_path, DrawnWorld(3, 4, PATCHES))
    trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset))).backward()
    moved = {name.split(".")[1] for name, each in model.named_parameters() if each.grad is not None}
    assert {"vision_tower", "multi_modal_projector"} <= moved
    within = [name for name, each in model.named_parameters() if "layers" in name and each.grad is not None]
    assert within and all("vision_tower" in name for name in within)
    model.zero_grad()
