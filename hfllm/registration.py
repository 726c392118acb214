"""Register the family with transformers and PEFT when they are imported, and not before."""

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType


def register_with_transformers() -> None:
    """Register now with libraries already loaded, and with the others right after they are loaded."""
    for name, register in (("transformers", _register), ("peft.utils.constants", _register_with_peft)):
        if name in sys.modules:
            register()
        elif not any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _After(name, register))


def _register() -> None:
    # First: this module says if transformers is too old for the others.
    from hfllm.models.family import configuration_hfllm

    configuration_hfllm.HfllmConfig.register_for_auto_class()
    # Importing this module registers its quantizer.
    import hfllm.compression.int8  # noqa: F401
    from hfllm.models.family import configuration_hfllm_vision, modeling_hfllm, modeling_hfllm_vision

    configuration_hfllm_vision.HfllmVisionConfig.register_for_auto_class()
    _register_family(configuration_hfllm.HfllmConfig, configuration_hfllm.AUTO_MAP, modeling_hfllm)
    _register_family(
        configuration_hfllm_vision.HfllmVisionConfig, configuration_hfllm_vision.AUTO_MAP, modeling_hfllm_vision
    )


def _register_family(config_class: type, auto_map: Mapping[str, str], models: ModuleType) -> None:
    """Register a config and the models of its `auto_map` with the Auto classes.

    Args:
        models: the module with them.
    """
    # Only now: one of its modules replaces `transformers` by a second copy when it is first imported.
    transformers = sys.modules["transformers"]
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, path in auto_map.items():
        if auto_name == "AutoConfig":
            continue
        model_class = getattr(models, path.split(".")[1])
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
        # Writes auto_map and the code next to saved weights, for users who load them without hfllm.
        model_class.register_for_auto_class(auto_name)
        # For a class saved with its code, `generate` reads the signature at every token.
        model_class.forward.__signature__ = inspect.signature(model_class.forward)
        # `transformers serve`, behind `transformers chat`, looks the class up by its name there.
        setattr(transformers, model_class.__name__, model_class)


def _register_with_peft() -> None:
    """Give the family the default target modules of Llama, with the same names of projections.

    With latent attention there are others instead. PEFT asks for any of the names, not for all of them.
    """
    constants = sys.modules["peft.utils.constants"]
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict) and "llama" in mapping:
            targets = mapping["llama"]
            latent = {"q_proj": "q_b_proj", "v_proj": "kv_b_proj"}
            more = [latent[each] for each in targets if each in latent] if isinstance(targets, list) else []
            for model_type in ("hfllm", "hfllm_vision"):
                mapping.setdefault(model_type, [*targets, *more] if more else targets)


class _After(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader of one module so that `callback` runs after it is executed.

    For transformers this moment is safe: it imports its own modules lazily, so none of them is half-loaded yet.
    """

    def __init__(self, name: str, callback: Callable[[], None]):
        self.name, self.callback = name, callback

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            # Here and not above: libraries also look up the spec only to see whether the module is installed.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self.callback()

        spec.loader.exec_module = execute_and_register
        return spec
