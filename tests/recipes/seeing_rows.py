"""A tiny vision-language model, and rows about the bright half of an image, for recipes that take images."""

import json
import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast, SiglipVisionConfig

import hfllm

WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", "<image>", "which", "side", "is", "bright", "say", "left", "right"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def tower() -> SiglipVisionConfig:
    """Of pictures of 8x8 pixels in patches of 4."""
    return SiglipVisionConfig(**TOWER, image_size=8, patch_size=4, vision_use_head=False)


def make_processor(image_token: str = "<image>") -> LlavaProcessor:
    """A processor of words and pictures."""
    words = [word.replace("<image>", image_token) for word in WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "extra_special_tokens": [image_token, "<user>", "<assistant>"],
    }
    template = TEMPLATE.replace("<image>", image_token)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **marks)
    return hfllm.vision_processor(tokenizer, tower(), image_token=image_token)


def make_model(seed: int = 0) -> PreTrainedModel:
    """A composed model of 32 numbers, new."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1}
    config = hfllm.HfllmConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes, **marks)
    return hfllm.with_vision(hfllm.HfllmForCausalLM(config), tower(), image_token_id=4)


def halves(count: int, seed: int = 0) -> list[dict]:
    """Rows with a noisy picture each, of which one half is bright, and the name of that side."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        side, made = rng.choice(("left", "right")), Image.new("RGB", (8, 8))
        for column in range(8):
            light = 180 * ((column < 4) == (side == "left"))
            for row in range(8):
                made.putpixel((column, row), (rng.randrange(60) + light,) * 3)
        rows.append({"image": made, "side": side})
    return rows


def write_rows(folder: Path, rows: list[dict], is_pair: bool = False) -> Path:
    """Write pictures, and rows that name them as seen from there; return the file of the rows.

    Args:
        is_pair: whether rows compare the right answer and the wrong one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        row["image"].save(folder / f"{number}.png")
        other = "left" if row["side"] == "right" else "right"
        said = {"chosen": row["side"], "rejected": other} if is_pair else {"completion": row["side"]}
        lines.append(json.dumps({"prompt": "which side", **said, "image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"
