"""The app of Flower's SuperNode at an organisation: `app`.

The node's --node-config has its organisation and the path of its settings; both stay on its machine:

    organisation="clinic" settings="/srv/clinic.json"

The settings, a JSON object, go to the learner named in the run (`learner`, `module:function`), with the terms of the
run as `terms`, where the server states some: a learner refuses terms other than its own.
"""

import json
import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hfllm.errors import InputError, refuse_if
from hfllm.federation.flower import RECORD, record_of
from hfllm.federation.transports import failed_by
from hfllm.federation.updates import to_bytes, weights_from_bytes
from hfllm.federation.worker import learner_of

LOG = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Reply with the organisation of this node."""
    return Message(content=record_of({"organisation": organisation_of(context)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round, and send the update, or the reason why there is none."""
    request = message.content[RECORD]
    name = organisation_of(context)
    try:
        config = {**context.run_config, **context.node_config}
        refuse_if("learner" not in config, "the run names no learner; expected module:function")
        settings, terms = settings_of(context), json.loads(str(request.get("terms", "{}")))
        learner = learner_of(str(config["learner"]), name, {**settings, **({"terms": terms} if terms else {})})
        number = int(request["round"])
        update = learner(number, weights_from_bytes(request["weights"]))
        compression = str(terms.get("compression", config.get("compression", "none")))
        reply = {"update": to_bytes(update, compression, number)}
    except InputError as error:
        reply = {"reason": str(error)}
    except Exception as error:
        LOG.exception("the learner of organisation %r failed", name)
        reply = {"reason": failed_by(error, name, "its own log")}
    return Message(content=record_of(reply), reply_to=message)


def organisation_of(context: Context) -> str:
    """Return the name of the organisation of this node."""
    return str(context.node_config.get("organisation", f"node {context.node_id}"))


def settings_of(context: Context) -> dict[str, object]:
    """Return the settings of this node.

    Raises:
        InputError: when their file cannot be read.
    """
    path = context.node_config.get("settings")
    if path is None:
        return {}
    try:
        values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"settings {path}: cannot be read: {error}") from error
    refuse_if(not isinstance(values, dict), f"settings {path}: expected a JSON object, got {type(values).__name__}")
    return values
