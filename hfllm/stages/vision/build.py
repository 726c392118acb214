"""Rows with images, drawn or the user's, the vision-language models for them, their PPO, and the report on answers."""

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import to_sft
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import ImageReading, Rows, by_turns, png_of, text_of
from hfllm.data.loading import RowSources
from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.pictures import (
    ABSENT,
    CAPTIONS,
    CROWDED,
    FAMILIES,
    GROUNDS,
    MOVED,
    NOT_THERE,
    NUMBERS,
    PATCHES,
    PATTERNS,
    QUESTIONS,
    REWORDED,
    SIZES,
    STYLES,
    TRAINED_NUMBERS,
    DrawnWorld,
    PictureRow,
    TwoDigits,
    answer_about,
    picture_side,
    trained_families,
)
from hfllm.evaluation.pictures import Asked, answer_pictures, best_guesses, is_right, shuffled_questions
from hfllm.flags import changed
from hfllm.models.family.configuration_hfllm import HfllmConfig
from hfllm.models.family.layers_hfllm import HfllmMLP
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
from hfllm.multimodal.composed import with_vision
from hfllm.multimodal.processors import IMAGE_TOKEN, vision_processor
from hfllm.outputs.figures import mean_of, shown
from hfllm.outputs.report import Bars, Found, new_figure, save_figure
from hfllm.outputs.verdict import Promise
from hfllm.rewards.functions import gold_reward
from hfllm.stages.shared import rows_with_images
from hfllm.stages.vision.flags import ModelSizes
from hfllm.trainers.engines import shards_parameters
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.pretraining.trainer import optimizer_of
from hfllm.trainers.trl_trainers import PatchNames, PictureTrainer, TurnTokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin
    from trl import SFTConfig

    from hfllm.trainers.ppo.trainer import PPOTrainer

# ---- drawn rows ----


SEEN, HELD_OUT, SHUFFLED = "seen", "held_out", "shuffled"
# The evaluation's images are the same for any seed of training.
EVAL_SEED = 777
# Number of other questions per question of the evaluation, for finding the best guess without an image.
PRIOR = 20
# Number of questions of a part per question of each part with one held-out property.
STYLE_EVERY = 2
# One in this many images whose things have no color has captions beside its questions.
CAPTION_EVERY = 2
# Of the things in all but one of so many training images only the shape has a name.
WHOLE_EVERY = 2


def caption_rows(dataset_name: str, seed: int, count: int) -> DrawnWorld:
    """Return the captions to learn first; digits have none."""
    return DrawnWorld(seed, count if dataset_name == PICTURES else 0, CAPTIONS, whole_every=WHOLE_EVERY)


def patch_rows(dataset_name: str, seed: int, count: int) -> DrawnWorld:
    """Return the images whose patches are named before any caption; digits have none."""
    count = count if dataset_name == PICTURES else 0
    return DrawnWorld(seed, count, PATCHES, numbers=TRAINED_NUMBERS, whole_every=WHOLE_EVERY)


def question_rows(
    dataset_name: str, seed: int, count: int, questions_per_picture: int, share_absent: float | None = None
) -> DrawnWorld | TwoDigits:
    """Return drawn images with questions to train on.

    Args:
        dataset_name: `pictures` or `digits`.
        count: images.
        questions_per_picture: questions about each at most.
        share_absent: share of questions about absent things; by default as often as other families.
    """
    if dataset_name == DIGITS:
        return TwoDigits(seed, count, num_questions=questions_per_picture)
    # Captions continue: with only answers about single things, colors and shapes are learned much later.
    families = trained_families(share_absent)
    mix = {"caption_every": CAPTION_EVERY, "families": families, "numbers": TRAINED_NUMBERS}
    return DrawnWorld(seed, count, QUESTIONS, questions_per_picture, whole_every=WHOLE_EVERY, **mix)


def eval_parts(dataset_name: str, count: int) -> dict[str, list[Asked]]:
    """Return the drawn questions of each part of the evaluation, and the first part's with other images.

    Args:
        dataset_name: `pictures` or `digits`.
        count: questions of a part.
    """
    if dataset_name == DIGITS:
        rows: dict[str, Sequence[PictureRow]] = {HELD_OUT: TwoDigits(EVAL_SEED, count, is_held_out=True)}
    else:
        rows = {
            SEEN: DrawnWorld(EVAL_SEED, count, part="evaluation"),
            HELD_OUT: DrawnWorld(EVAL_SEED, count, held_out=True, part="evaluation"),
        }
    parts = {name: list(map(drawn_question, each)) for name, each in rows.items()}
    return {**parts, SHUFFLED: shuffled_questions(next(iter(parts.values())))}


def style_parts(dataset_name: str, count: int) -> dict[str, list[Asked]]:
    """Return drawn questions with one property each that no training image or question has; digits have none.

    Two shapes in one corner are the exception: training has them in other images. All questions about them are about
    one of the two, or about the whole image.

    Args:
        dataset_name: `pictures` or `digits`, or rows of the user's.
        count: questions of a part of `eval_parts`; these parts have half as many.
    """
    if dataset_name != PICTURES:
        return {}
    settings = {"part": "evaluation", "count": max(1, count // STYLE_EVERY)}
    numbers = {CROWDED: (2, 3)}
    rows = {
        name: DrawnWorld(EVAL_SEED, style=style, numbers=numbers.get(name, NUMBERS), **settings)
        for name, style in STYLES.items()
    }
    return {name: list(map(drawn_question, each)) for name, each in rows.items()}


def parts_of(held_out: list[Asked]) -> dict[str, list[Asked]]:
    """Return the parts of the evaluation of the user's held-out rows: with their own and with others' images.

    Rows without another row of different images are left out of the second, thus it may be missing.
    """
    pairs = zip(held_out, shuffled_questions(held_out), strict=True)
    shuffled = [other for own, other in pairs if other.images is not own.images]
    return {HELD_OUT: held_out, **({SHUFFLED: shuffled} if shuffled else {})}


def prior_of(dataset_name: str, count: int) -> list[Asked]:
    """Return more drawn questions, for finding the best answer without an image; none for the user's rows.

    Args:
        count: questions of a part of the evaluation.
    """
    if dataset_name == DIGITS:
        # For two questions, this many answers are equally informative.
        return list(map(drawn_question, TwoDigits(EVAL_SEED + 1, count)))
    is_drawn = dataset_name == PICTURES
    return list(map(drawn_question, DrawnWorld(EVAL_SEED + 1, PRIOR * count, part="evaluation"))) if is_drawn else []


def drawn_question(row: PictureRow) -> Asked:
    """Return a drawn row's question."""
    return Asked(row.prompt(), [row.picture], row.turns[0][1], row.family, row.gold, row.scene)


class JoinedRows(Sequence[PictureRow]):
    """Rows of several sequences, one after the other."""

    def __init__(self, *parts: Sequence[PictureRow]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, number: int) -> PictureRow:
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)


# ---- the user's rows, and drawn ones for the user's model ----


def own_rows(sources: RowSources, reading: ImageReading, seed: int, most: int) -> tuple[Rows, list[Asked]]:
    """Return rows with `prompt`, `completion` and `images` to train on, and the held-out ones as questions.

    Args:
        sources: the rows.
        reading: of their images.
        seed: of the split.
        most: held-out rows at most.
    """
    settings = {"needs_images": True, "most": most}
    train, held_out = rows_with_images(sources, reading, to_sft, "hfllm vision", seed, **settings)
    return [turn for row in train for turn in by_turns(row)], [question_of(by_turns(row)[0]) for row in held_out]


def drawn_rows(questions: DrawnWorld | TwoDigits) -> Rows:
    """Return drawn rows as `own_rows` does, for the user's model."""
    rows: Rows = []
    for row in questions:
        question, *rest = row.messages()
        rows += by_turns({"prompt": [question], "completion": rest, "images": [png_of(row.picture)]})
    return rows


def question_of(row: Mapping[str, Any]) -> Asked:
    """Return a row of `by_turns` as a question."""
    return Asked(row["prompt"], row["images"], text_of(row["completion"][0]).strip(), "all")


# ---- models ----
#
# The small vision-language model for the drawn images, and its trainer.


# The bytes, the marks of the chat template, and the words of the drawn world and more.
VOCAB_SIZE = 640
# Longer than any conversation about a drawn image.
CONTEXT = 512
# Mean and deviation of the drawn world's pixels, from 0 to 1.
MEAN, DEVIATION = 0.43, 0.3


def new_model(
    sizes: ModelSizes, dataset_name: str, texts: Sequence[str], seed: int
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return a small, untrained vision-language model and its processor.

    Args:
        sizes: of the model.
        dataset_name: `pictures` or `digits`.
        texts: to train its tokenizer on.
        seed: of the weights.
    """
    from transformers import SiglipVisionConfig, set_seed

    width, is_world = sizes.hidden_size, dataset_name == PICTURES
    tower_width = sizes.vision_hidden_size or width
    tokenizer = train_tokenizer(
        texts, vocab_size=VOCAB_SIZE, model_max_length=CONTEXT, extra_special_tokens=[IMAGE_TOKEN]
    )
    tower = SiglipVisionConfig(
        hidden_size=tower_width,
        intermediate_size=2 * tower_width,
        num_hidden_layers=sizes.num_vision_layers,
        num_attention_heads=sizes.num_attention_heads,
        image_size=picture_side(dataset_name),
        patch_size=sizes.patch_size,
        # Its weights would wait for gradients in vain.
        vision_use_head=False,
    )
    text = HfllmConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        max_position_embeddings=CONTEXT,
        # A thing of the drawn world is found by its attributes: every other layer compares without positions, and the
        # first is one of them, where vectors of patches are still like embeddings of words. For two digits the
        # questions are about the side.
        no_rope_layers=[int(not is_world or layer % 2) for layer in range(sizes.num_hidden_layers)],
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    processor = vision_processor(tokenizer, tower)
    if is_world:
        processor.image_processor.image_mean, processor.image_processor.image_std = [MEAN] * 3, [DEVIATION] * 3
    set_seed(seed)
    model = with_vision(HfllmForCausalLM(text), tower, image_token_id=processor.image_token_id)
    for module in model.modules():
        if isinstance(module, HfllmMLP):
            # Memory does not matter here, and computing a part of each layer twice takes a twentieth of the time.
            module.recompute = False
    return model, processor


def new_trainer(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: Sequence[PictureRow],
    args: "SFTConfig",
    use_muon: bool,
    names_patches: bool = True,
) -> PictureTrainer:
    """Return the trainer of a model built here.

    Args:
        args: the trainer's.
        use_muon: learn the matrices of the layers by Muon.
        names_patches: learn the names of what is in patches too, of rows with scenes, unless the engine splits the
            embeddings that they are named by.
    """
    args, tower = changed(args, remove_unused_columns=False), model.config.vision_config
    pieces = (tower.image_size // tower.patch_size) ** 2
    tokens = TurnTokens(processor, processor.image_token_id, pieces, args.max_length)
    has_names = names_patches and rows[0].scene is not None and not shards_parameters(args)
    names = PatchNames(processor.tokenizer, tower.patch_size) if has_names else None
    optimizer = optimizer_of(use_muon, args)
    return PictureTrainer(rows, tokens, processor, names, model=model, args=args, optimizer_cls_and_kwargs=optimizer)


# ---- ppo ----
#
# PPO on images: sampled answers about drawn images, rewarded by their gold.


# The folder of the model after PPO, below the folder of the model before.
FOLDER = "rl"
# The longest answer, in tokens: an answer about a relation takes eight.
RESPONSE_LENGTH = 8
# New images cost little here, and a second pass over an answer as much as a new one.
MINI_BATCHES, EPOCHS = 8, 1
# Questions about absent things are the most frequent, a third: a model with hardly any such training learns to answer
# them here. With a quarter it does so less often (.81 against .92, seed 1).
PROMPT_FAMILIES = (*FAMILIES, *FAMILIES, *[ABSENT] * 4)
# Answers of an optimizer step, over all processes: where most are right, only few are informative.
BATCH_SIZE = 64
# Of this many optimizer steps one trains only the critic, and over three the rate rises: without this warmup a family
# may be forgotten for good in the first steps. So it may with a faster critic, because its first values are noise.
WARMUP = 64
# Flags of fine-tuning passed on to a trainer: for devices and printed output.
SHARED = ("seed", "use_cpu", "bf16", "report_to", "disable_tqdm", "dataloader_pin_memory", "logging_steps")


def prompt_rows(dataset_name: str, count: int, seed: int) -> list[dict[str, object]]:
    """Return prompts with one image each and the columns of the gold reward.

    None of the drawn images is in fine-tuning; digits are the same as there, in other pairs.

    Args:
        dataset_name: `pictures` or `digits`.
        count: prompts.
        seed: of fine-tuning.
    """
    rows = (
        TwoDigits(seed + 1, count)
        if dataset_name == DIGITS
        else DrawnWorld(seed, count, QUESTIONS, part="prompts", families=PROMPT_FAMILIES)
    )
    return [{"prompt": row.prompt(), "images": [row.picture], **row.gold} for row in rows]


def policy_trainer(
    policy: str,
    processor: "ProcessorMixin",
    prompts: Sequence[Mapping[str, object]],
    learning_rate: float,
    kl_coef: float,
    **settings: object,
) -> "PPOTrainer":
    """Return the trainer of a policy on drawn images, every prompt once, with the gold reward.

    Args:
        policy: the folder of fine-tuning with its saved model: a model trained by TRL cannot be copied as a reference.
        prompts: see `prompt_rows`.
        learning_rate: the highest.
        kl_coef: weight of the KL penalty.
        settings: the values of `SHARED` in fine-tuning.
    """
    from accelerate import PartialState

    from hfllm.trainers.ppo.trainer import PPOTrainer

    state = PartialState()
    # The main process writes the model, and all read it.
    state.wait_for_everyone()
    batch_size = max(1, min(BATCH_SIZE, len(prompts) // MINI_BATCHES) // state.num_processes)
    rollouts = math.ceil(len(prompts) / (batch_size * MINI_BATCHES * state.num_processes))
    steps = rollouts * MINI_BATCHES * EPOCHS
    args = PPOConfig(
        output_dir=str(Path(policy, FOLDER)),
        total_episodes=len(prompts),
        per_device_train_batch_size=batch_size,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=EPOCHS,
        response_length=RESPONSE_LENGTH,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        kl_coef=kl_coef,
        save_strategy="no",
        critic_warmup_steps=steps // WARMUP,
        warmup_steps=3 * steps // WARMUP,
        **settings,
    )
    return PPOTrainer(
        model=policy, reward_funcs=gold_reward, args=args, train_dataset=prompts, processing_class=processor
    )


def sampled_gold(
    model: "PreTrainedModel", processor: "ProcessorMixin", questions: Sequence[Asked], max_new_tokens: int
) -> list[float]:
    """Return the gold rewards of one sampled answer per question."""
    prompts, images = [each.prompt for each in questions], [each.images for each in questions]
    responses = answer_pictures(model, processor, prompts, images, max_new_tokens, do_sample=True)
    columns = {name: [question.gold[name] for question in questions] for name in questions[0].gold}
    return gold_reward(prompts, responses, **columns)


# ---- answers by family ----
#
# With images of other rows as control, and the best guess without any. A faultless answer about another row's image is
# right now and then, too: if two images show the same number of things, or neither has the requested thing.
# `other_truth` is this frequency; a model must not exceed it.

CHANCE, OTHER_TRUTH = "chance", "other_truth"
LABELS = {
    SEEN: "seen",
    HELD_OUT: "held out",
    SHUFFLED: "other pictures",
    OTHER_TRUTH: "truth about these",
    CHANCE: "best guess without",
}
STYLE_LABELS = {
    MOVED: "moved by three pixels, to positions that training has not",
    GROUNDS: "on plain grounds of other colors",
    PATTERNS: "on grounds of other patterns",
    SIZES: "of another size",
    CROWDED: "two shapes in one corner",
    REWORDED: "in other words",
}
# Images of the plot, and rows of the table of samples.
SHOWN = 24


def judge_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    parts: Mapping[str, Sequence[Asked]],
    prior: Sequence[Asked] = (),
    max_new_tokens: int = 16,
    styles: Mapping[str, Sequence[Asked]] | None = None,
) -> Found:
    """Judge a model on all parts, and by family.

    Args:
        model: the model.
        processor: its processor.
        parts: questions by the name of the part; the questions of `shuffled` have other images.
        prior: more questions of the kinds of the first part, for finding the best guess.
        max_new_tokens: of an answer at most.
        styles: questions with a property that training has not, see `style_parts`; a table of their own.
    """
    styles = styles or {}
    responses = {
        name: answer_pictures(
            model, processor, [q.prompt for q in questions], [q.images for q in questions], max_new_tokens
        )
        for name, questions in {**parts, **styles}.items()
    }
    of_styles = {name: responses.pop(name) for name in styles}
    first = next(iter(parts))
    responses |= {OTHER_TRUTH: truth} if (truth := _truth_about_others(parts.get(SHUFFLED, ()))) else {}
    responses[CHANCE] = best_guesses(parts[first], prior)
    everything = {**parts, OTHER_TRUTH: parts.get(SHUFFLED, ()), CHANCE: parts[first]}
    right = _right(everything, responses)
    right_of_styles = _right(styles, of_styles)
    metrics = _figures(everything, right) | _figures(styles, right_of_styles)
    metrics |= _false_alarms(parts[first], responses[first])
    summary = ", ".join(f"{LABELS[name]} {_figure(metrics, name)}" for name in right)
    tables = {
        "Right answers": _table(everything, right),
        **({"Right answers on what training has not shown": _style_table(metrics, styles)} if styles else {}),
        "Samples": _samples(parts[first], responses[first], right[first]),
    }
    bars = Bars(
        f"Right answers of {len(parts[first]):,} questions",
        "share that is right",
        {LABELS[name]: metrics[f"{name}_right"] for name in right},
        {LABELS[name]: _figure(metrics, name) for name in right},
    )
    plots = {"right": bars, "pictures": _grid(parts[first], responses[first], right[first])}
    promises = [
        Promise(f"questions about images ({LABELS[first]}) answered right", f"{first}_right", f"{name}_right", beside)
        for name, beside in ((CHANCE, "the best guess without any"), (SHUFFLED, "the same with other images"))
    ]
    return Found(metrics, f"right answers: {summary}", tables, plots, promises)


def _right(parts: Mapping[str, Sequence[Asked]], responses: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """Return 1 for each right answer of the parts and 0 for each wrong one."""
    return {
        name: [float(is_right(*pair)) for pair in zip(answers, (q.answer for q in parts[name]), strict=True)]
        for name, answers in responses.items()
    }


def _figures(parts: Mapping[str, Sequence[Asked]], right: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the shares of right answers with their errors, in all and by family."""
    metrics: dict[str, float] = {}
    for name, values in right.items():
        metrics |= mean_of(f"{name}_right", values)
        for family, result in by_family(parts[name], values).items():
            metrics |= mean_of(f"{name}_{family}_right", result)
    return metrics


def _style_table(metrics: Mapping[str, float], styles: Mapping[str, Sequence[Asked]]) -> list[dict[str, str]]:
    return [
        {"images and questions": STYLE_LABELS[name], "right": _figure(metrics, name), "questions": str(len(questions))}
        for name, questions in styles.items()
    ]


def _truth_about_others(shuffled: Sequence[Asked]) -> list[str]:
    """Return the right answers about the images of other rows: the answers of a perfect reader of these images."""
    return [answer_about(each.scene, each.question) for each in shuffled if each.scene is not None]


def by_family(questions: Sequence[Asked], values: Sequence[float]) -> dict[str, list[float]]:
    """Return values of questions, one per question, by family."""
    result: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        if question.family:
            result.setdefault(question.family, []).append(value)
    return dict(sorted(result.items()))


def _false_alarms(questions: Sequence[Asked], responses: Sequence[str]) -> dict[str, float]:
    """Return the share of questions about present things with an answer for absent ones."""
    values = [
        float(is_right(each, NOT_THERE)) for each, q in zip(responses, questions, strict=True) if q.family != ABSENT
    ]
    has_absent = any(question.family == ABSENT for question in questions)
    return mean_of("called_absent", values) if has_absent and values else {}


def _figure(metrics: Mapping[str, float], name: str) -> str:
    return shown(metrics, f"{name}_right")


def _table(parts: Mapping[str, Sequence[Asked]], right: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    families = {name: {**by_family(parts[name], right[name]), "all": list(right[name])} for name in right}
    table = []
    for family in dict.fromkeys(family for each in families.values() for family in each):
        row = {"family": family}
        for name, result in families.items():
            figures = mean_of("x", result.get(family, []))
            row[LABELS[name]] = shown(figures, "x") if result.get(family) else ""
        table.append({**row, "questions": str(len(families[next(iter(families))].get(family, [])))})
    return table


def _samples(questions: Sequence[Asked], responses: Sequence[str], right: Sequence[float]) -> list[dict[str, str]]:
    """Return some questions with answers: wrong ones first, as the most informative."""
    rows = [
        {"prompt": question.question, "said": answer, "gold": question.answer, "right": "yes" if is_good else "no"}
        for question, answer, is_good in zip(questions, responses, right, strict=True)
    ]
    rows.sort(key=lambda row: row["right"])
    return rows[: SHOWN // 2] if len(rows) <= SHOWN // 2 else rows[: SHOWN // 4] + rows[-(SHOWN // 4) :]


# Letters of a caption line, over all columns.
LINE = 132


@dataclass
class PictureGrid:
    """Images side by side: `captions` has the lines below them, `is_right` decides the color of the lines."""

    title: str
    pictures: "Sequence[Image]"
    captions: Sequence[str]
    is_right: Sequence[bool]
    columns: int = 6

    def draw(self, path: Path) -> bool:
        """Draw to a PNG; return False, and draw nothing, if there is no image."""
        if not self.pictures:
            return False
        rows = -(-len(self.pictures) // self.columns)
        figure, axes = new_figure(0.5 + 1.75 * rows)
        axes.axis("off")
        axes.set_title(self.title)
        for index, (picture, caption, right) in enumerate(
            zip(self.pictures, self.captions, self.is_right, strict=True)
        ):
            row, column = divmod(index, self.columns)
            inset = axes.inset_axes((column / self.columns, 1 - (row + 0.72) / rows, 0.9 / self.columns, 0.7 / rows))
            inset.imshow(picture, interpolation="nearest")
            inset.set_xticks([])
            inset.set_yticks([])
            lines = [textwrap.fill(line, LINE // self.columns) for line in caption.splitlines()]
            inset.set_xlabel("\n".join(lines), fontsize=6, color="tab:green" if right else "tab:red")
        save_figure(figure, path)
        return True


def _grid(questions: Sequence[Asked], responses: Sequence[str], right: Sequence[float]) -> PictureGrid:
    indices = [index for index, question in enumerate(questions) if len(question.images) == 1][:SHOWN]
    return PictureGrid(
        "Questions, and what the model says",
        [read_image(questions[index].images[0], "a sample", max_pixels=sys.maxsize, min_side=1) for index in indices],
        [f"{_printed(questions[index].question)}\n{_printed(responses[index])}" for index in indices],
        [bool(right[index]) for index in indices],
    )


def _printed(text: str) -> str:
    """Return the beginning of a text in a form for plots."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:40]).replace("$", "\\$")
