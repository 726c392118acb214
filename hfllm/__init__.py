"""hfllm: one architecture family and its recipes, from raw text to an aligned, published model.

Importing this package registers the family with transformers' Auto classes. Neither torch nor transformers is
imported for that: it registers when transformers' Auto classes are imported, so `hfllm.scaling` stays light.
"""

from importlib import import_module
from typing import Any

from hfllm.registration import register_with_transformers
from hfllm.version import __version__

_PUBLIC = {
    "DistillationConfig": "hfllm.trainers.distillation.config",
    "DistillationTrainer": "hfllm.trainers.distillation.trainer",
    "HfllmConfig": "hfllm.models.family.configuration_hfllm",
    "HfllmModel": "hfllm.models.family.modeling_hfllm",
    "HfllmForCausalLM": "hfllm.models.family.modeling_hfllm",
    "HfllmForConditionalGeneration": "hfllm.models.family.modeling_hfllm_vision",
    "HfllmForMaskedLM": "hfllm.models.family.modeling_hfllm",
    "HfllmForQuestionAnswering": "hfllm.models.family.modeling_hfllm",
    "HfllmForSequenceClassification": "hfllm.models.family.modeling_hfllm",
    "HfllmForTokenClassification": "hfllm.models.family.modeling_hfllm",
    "HfllmVisionConfig": "hfllm.models.family.configuration_hfllm_vision",
    "HfllmVisionForSequenceClassification": "hfllm.models.family.modeling_hfllm_vision",
    "PPOConfig": "hfllm.trainers.ppo.config",
    "PPOTrainer": "hfllm.trainers.ppo.trainer",
    "RewardModel": "hfllm.rewards.models",
    "World": "hfllm.data.world.world",
    "from_native": "hfllm.models.conversion.convert",
    "gold_reward": "hfllm.rewards.functions",
    "list_presets": "hfllm.models.family.presets",
    "student_from_layers": "hfllm.trainers.distillation.students",
    "to_native": "hfllm.models.conversion.convert",
    "train_tokenizer": "hfllm.data.tokenizer",
    "vision_processor": "hfllm.multimodal.processors",
    "with_audio": "hfllm.multimodal.composed",
    "with_vision": "hfllm.multimodal.composed",
}
__all__ = ["__version__", *_PUBLIC]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hfllm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
