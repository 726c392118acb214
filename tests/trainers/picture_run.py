"""A tiny policy that reads pictures, its processor and its rows: pictures of 8x8 pixels with one bright half.

Usage: picture_run.py OUTPUT_DIR EPISODES_PER_PROCESS [halves [DEEPSPEED_CONFIG]], under torchrun or DeepSpeed's
launcher for several processes. With `halves` each prompt has one picture.
"""

import os
import random
import sys

import torch
from ddp_run import start_deepspeed
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import hfllm
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer

WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", "<image>", "which", "side", "is", "bright", "say", "left", "right"]
PLACE = {"type": "image"}
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def vision_config() -> SiglipVisionConfig:
    """Of a tower of pictures of 8x8 pixels in patches of 4."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes, image_size=8, patch_size=4, vision_use_head=False)


def make_processor() -> LlavaProcessor:
    """A processor of words and pictures."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "extra_special_tokens": ["<image>", "<user>", "<assistant>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **marks)
    return hfllm.vision_processor(tokenizer, vision_config(), image_token="<image>")


def make_model(kind: str = "hfllm", seed: int = 0, lively: bool = False):
    """A composed model of 32 numbers: ours, or transformers' Llava with our text model or Llama's.

    Args:
        lively: with weights so large that what it says differs from picture to picture.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config, text = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (hfllm.HfllmConfig, hfllm.HfllmForCausalLM)
    config = config(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.1, **sizes, **marks)
    if kind == "llava":
        choice = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "image_token_index": 4}
        made = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision_config(), text_config=config, **choice))
    else:
        made = hfllm.with_vision(text(config), vision_config(), image_token_id=4)
    if lively:
        with torch.no_grad():
            for weight in made.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=4 / weight.shape[-1] ** 0.5)
    return made


def picture(side: str, rng: random.Random) -> Image.Image:
    """A picture with one half bright, and noise."""
    made = Image.new("RGB", (8, 8))
    for column in range(8):
        is_bright = (column < 4) == (side == "left")
        for row in range(8):
            made.putpixel((column, row), (rng.randrange(60) + 180 * is_bright,) * 3)
    return made


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows with no, one and two pictures; what is asked for goes by the last of them."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        sides = [rng.choice(("left", "right")) for _ in range(number % 3)]
        asked = [{"type": "text", "text": "which side is bright"}, {"type": "text", "text": "say"}][: 1 + number % 2]
        content = [*([PLACE] * len(sides)), *asked]
        images = [picture(side, rng) for side in sides]
        rows.append(
            {"prompt": [{"role": "user", "content": content}], "images": images, "side": (sides or ["left"])[-1]}
        )
    return rows


def halves(count: int, seed: int = 0) -> list[dict]:
    """Rows with one picture each, in the column `image`."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        side = rng.choice(("left", "right"))
        prompt = [{"role": "user", "content": "which side is bright"}]
        rows.append({"prompt": prompt, "image": picture(side, rng), "side": side})
    return rows


def names_side(prompts, completions, side, **columns) -> list[float]:
    """Reward: 1 where the answer is the bright side."""
    return [float(said[0]["content"].split() == [answer]) for said, answer in zip(completions, side, strict=True)]


def some_words(completions, **columns) -> list[float]:
    """Reward that differs from answer to answer."""
    return [0.1 * said[0]["content"].count("e") - 0.02 * len(said[0]["content"]) for said in completions]


def build(output_dir: str, model=None, reward_funcs=some_words, rows=None, processing_class=None, **arguments):
    """A tiny trainer; `arguments` are PPOConfig's, or the trainer's."""
    settings = {
        **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **{"per_device_train_batch_size": 6, "num_mini_batches": 1, "num_ppo_epochs": 2, "response_length": 4},
        # So that Adam does not blow up the rounding of gradients that are nearly zero.
        **{"learning_rate": 1e-3, "adam_epsilon": 1e-6, "max_steps": 4, "logging_strategy": "no"},
    }
    own = {"eval_dataset", "peft_config", "value_model", "rollout_func", "callbacks", "reward_processing_classes"}
    return PPOTrainer(
        model=model or make_model(),
        reward_funcs=reward_funcs,
        args=PPOConfig(output_dir=output_dir, **settings | {k: v for k, v in arguments.items() if k not in own}),
        train_dataset=make_rows(12) if rows is None else rows,
        processing_class=processing_class or make_processor(),
        **{name: value for name, value in arguments.items() if name in own},
    )


def main(output_dir: str, episodes: int, rows: str = "", deepspeed_config: str | None = None) -> None:
    if deepspeed_config:
        start_deepspeed()
    trainer = build(
        output_dir,
        rows=halves(12) if rows == "halves" else None,
        deepspeed=deepspeed_config,
        per_device_train_batch_size=episodes // 2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        generation_kwargs={"top_k": 1},
    )
    trainer.train()
    trainer.save_model(output_dir)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
