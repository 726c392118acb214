"""The embedded world: facts, documents, tasks with gold (exact) answers, demonstrators, scoring rubric."""

from hfllm.data.world.world import FAMILIES, Task, World

__all__ = ["FAMILIES", "Task", "World"]
