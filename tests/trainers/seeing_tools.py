"""A policy that reads pictures and calls a tool that returns one, for the tests of such tools."""

import random
from functools import partial

import picture_run
import torch
from transformers import LlavaProcessor

import hfllm
from hfllm.data.tokenizer import CALL_MARKS, TOOL, set_built_in, train_tokenizer
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer

TEXTS = [
    "Which side is bright? Look at it. left right nothing box 12",
    '{"name": "look", "arguments": {"box": 1}}',
] * 9
SIDES = ("left", "right")


def make_processor() -> LlavaProcessor:
    """Of a tokenizer whose chat template, this package's own, has tools and images."""
    tokenizer = train_tokenizer(TEXTS, 400, extra_special_tokens=[TOOL], added_tokens=CALL_MARKS)
    set_built_in(tokenizer, "hfllm")
    return hfllm.vision_processor(tokenizer, picture_run.vision_config())


def make_model(processor: LlavaProcessor, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = processor.tokenizer
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = hfllm.HfllmConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.1,
        lm_head_bias=True,
        **sizes,
        **marks,
    )
    text = hfllm.HfllmForCausalLM(config)
    with torch.no_grad():
        # Every fifth token or so ends a turn.
        text.lm_head.bias[tokenizer.eos_token_id] = 4.5
    return hfllm.with_vision(text, picture_run.vision_config(), image_token_id=processor.image_token_id)


class Boxes:
    """An environment with a picture in each box."""

    def __init__(self, extra: str = ""):
        self.extra = extra

    def reset(self, side: str, number: int = 0, **row: object) -> None:
        self.side, self.number = side, number

    def look(self, box: int) -> list[dict]:
        """Look into a box.

        Args:
            box: its number.
        """
        picture = picture_run.picture(self.side, random.Random(f"{self.number} {box}"))
        words = [{"type": "text", "text": f"box {box}{self.extra}"}]
        return [{"type": "image", "image": picture}, *words * (box > 1)]


def make_rows(count: int, with_pictures: bool = False, seed: int = 0) -> list[dict]:
    """Rows that ask for the bright side; with pictures every third prompt has one, and every third two."""
    rows, rng = [], random.Random(seed)
    for number in range(count):
        side = SIDES[rng.randrange(2)]
        row = {
            "prompt": [{"role": "user", "content": "Which side is bright?"}],
            "side": side,
            "number": 1000 * seed + number,
        }
        if with_pictures:
            row["images"] = [picture_run.picture(SIDES[at % 2], rng) for at in range(number % 3)]
        rows.append(row)
    return rows


def some_words(completions: list, **columns: object) -> list[float]:
    """Reward that differs from answer to answer."""
    return [0.1 * str(said[-1]["content"]).count("e") - 0.01 * len(said[-1]["content"]) for said in completions]


def build(output_dir: str, processor: LlavaProcessor, boxes=lambda place, turn: turn + 1, **arguments) -> PPOTrainer:
    """A trainer whose environment takes the policy's words for calls of `look`.

    Args:
        boxes: from an episode's place and its number of turns so far the box, or `None` for no call.
    """
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 6, "num_mini_batches": 1, "num_ppo_epochs": 2, "response_length": 160}
    settings |= {"learning_rate": 1e-3, "adam_epsilon": 1e-6, "max_steps": 4, "logging_strategy": "no"}
    parts = {"model": make_model(processor), "train_dataset": make_rows(12), "processing_class": processor}
    parts |= {"reward_funcs": some_words, "environment_factory": Boxes}
    for name in [name for name in arguments if name in (*parts, "tools", "peft_config", "value_model")]:
        parts[name] = arguments.pop(name)
    trainer = PPOTrainer(args=PPOConfig(output_dir=output_dir, **settings | arguments), **parts)
    trainer.environment._calls = partial(take_for_calls, trainer.environment, boxes)
    return trainer


def take_for_calls(environment, boxes, turn) -> list[dict]:
    """In place of `ToolEnvironment._calls`: whatever a turn says, it calls `look`."""
    episode = turn.episode
    episode.messages.append(environment.turns.parse(turn.ids))
    box = boxes(episode.place, sum(message["role"] == "tool" for message in episode.messages))
    if box is None or not turn.is_ended:
        return []
    return [{"type": "function", "function": {"name": "look", "arguments": {"box": box}}}]
