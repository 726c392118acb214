"""The rows that each run of the recipe on passages learns from."""

import random

from hfllm.data.world.demonstrators import instruction_rows
from hfllm.data.world.passages import conversation, draw_passages
from hfllm.data.world.world import World
from hfllm.stages.course import Row, by_main_process, write_rows
from hfllm.stages.ground import MODELS, SFT, GroundArguments, data_file

# Questions about the same passages, and the share of conversations without any.
TURNS, WITHOUT_PASSAGES = 3, 0.15


def write(script_args: GroundArguments, name: str) -> None:
    """Write the rows of a run where the file does not hold them already; the other processes wait."""
    by_main_process(lambda: write_rows("ground", data_file(script_args, name), rows_of(script_args, name)))


def rows_of(script_args: GroundArguments, name: str) -> list[Row]:
    """Return the rows of a run: what people answer without passages, some of whom err, and conversations about them.

    The control has the same rows without the passages: what passages tell of, it does not know.
    """
    assert name in MODELS, name
    world, count = World(script_args.world_seed), script_args.num_examples
    grounded = round(script_args.grounded_fraction * count)
    plain = [_messages([_turn(row)]) for row in instruction_rows(world, count - grounded, script_args.seed)]
    rng = random.Random(f"ground-{world.seed}-{script_args.seed}")
    return plain + [_asked(world, rng, name != SFT) for _ in range(grounded)]


def _turn(row: Row) -> tuple[str, str]:
    asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return asked, row["output"]


def _asked(world: World, rng: random.Random, are_shown: bool) -> Row:
    told = [] if rng.random() < WITHOUT_PASSAGES else draw_passages(world.facts, rng)
    return _messages(conversation(world.facts, rng, told, TURNS, are_shown))


def _messages(turns: list[tuple[str, str]]) -> Row:
    messages = []
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": messages}
