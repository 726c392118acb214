"""The app of Flower's SuperLink: `app`, which hands a transport to the loop of rounds named in the run's settings.

`loop`, `module:function`, is called with a function from the base model's sha256 to the transport, and with the run's
settings.
"""

import importlib
from collections.abc import Mapping
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hfllm.errors import refuse_if
from hfllm.federation.flower import LOST_WAIT, FlowerTransport, is_true

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    config = dict(context.run_config)
    module, _, function = str(config.get("loop", "")).partition(":")
    refuse_if(not function, f"the run's loop is {config.get('loop')!r}; expected module:function")
    getattr(importlib.import_module(module), function)(partial(transport_of, grid, config), config)


def transport_of(grid: Grid, config: Mapping[str, object], base_sha256: str) -> FlowerTransport:
    """Return the transport by the run's settings: num-organisations, timeout and lost-wait (seconds), any-rank."""
    return FlowerTransport(
        grid,
        base_sha256,
        num_organisations=int(config.get("num-organisations", 1)),
        timeout=float(config["timeout"]) if "timeout" in config else None,
        lost_wait=float(config.get("lost-wait", LOST_WAIT)),
        any_rank=is_true(config, "any-rank"),
    )
