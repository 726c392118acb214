"""The process of one organisation: `python -m hfllm.federation.worker`, started by `transports.SeveralProcesses`.

It reads a line of JSON with its name and settings, then one line per round, and answers every round with a line with
the reason of a failure, or none. The output of learners, and the traceback of their errors, go to its log. When the
server closes the pipe, or is killed, it ends at once, whatever it does.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hfllm.errors import InputError


def learner_of(name: str, organisation: str, settings: Mapping[str, Any]) -> "Any":
    """Return the learner made by `module:function` for an organisation.

    Raises:
        InputError: when there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"learner {name!r} cannot be imported: {error}; expected module:function") from error
    return make(organisation, settings)


def main() -> None:
    """Train whenever the server asks, until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever is printed from now on, also by libraries in C, is no answer.
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    about, learner = json.loads(lines.get()), None
    from hfllm.federation.transports import failed_by
    from hfllm.federation.updates import to_bytes, weights_from_bytes

    while True:
        request, reason = json.loads(lines.get()), ""
        try:
            learner = learner or learner_of(about["learner"], about["organisation"], about["settings"])
            weights = weights_from_bytes(Path(request["weights"]).read_bytes())
            data = to_bytes(learner(request["round"], weights), about["compression"], request["round"])
            path = Path(request["update"])
            partial = path.with_suffix(".partial")
            partial.write_bytes(data)
            os.replace(partial, path)
        except InputError as error:
            reason = str(error) or type(error).__name__
        except Exception as error:
            traceback.print_exc()
            # Its state is unknown: the next round makes another.
            learner = None
            reason = failed_by(error, about["organisation"], about["log"])
        answers.write(json.dumps({"reason": reason}) + "\n")
        answers.flush()


def _read(lines: "SimpleQueue[str]") -> None:
    """Hand lines on; without a server nobody waits for a training result, and the next server may train the same."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
