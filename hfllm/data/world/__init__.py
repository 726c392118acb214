"""The embedded world: facts, documents, tasks with gold answers, demonstrators and the rubric that judges."""

from hfllm.data.world.world import FAMILIES, Task, World

__all__ = ["FAMILIES", "Task", "World"]
