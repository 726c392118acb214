"""Register the family with transformers' Auto classes as soon as somebody imports transformers, and not before."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


def register_with_transformers() -> None:
    """Register now if transformers is loaded, else right after it is."""
    if "transformers" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    import transformers

    from hfllm.models import modeling_hfllm as models
    from hfllm.models.configuration_hfllm import AUTO_MAP, HfllmConfig

    transformers.AutoConfig.register("hfllm", HfllmConfig, exist_ok=True)
    HfllmConfig.register_for_auto_class()
    for auto_name, path in AUTO_MAP.items():
        if auto_name == "AutoConfig":
            continue
        model_class = getattr(models, path.split(".")[1])
        getattr(transformers, auto_name).register(HfllmConfig, model_class, exist_ok=True)
        # Writes auto_map and the code beside saved weights, for those who load them without hfllm.
        model_class.register_for_auto_class(auto_name)


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader of `transformers` so that `_register` runs once it is executed.

    That moment is safe: transformers imports its own modules lazily, so none of them is half-loaded yet.
    """

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        if name != "transformers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            # Here and not above: libraries also look for the spec only to know whether transformers is installed.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec
