"""Write the input of `flwr run`: a folder with two short modules and the settings of the run.

    python -m hfllm.federation.flower_app FOLDER --loop module:function --learner module:function --num_organisations 2

With --check, certificates are looked at first: an expired one stops here, in one line, not in a handshake.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from hfllm.errors import InputError, one_line
from hfllm.federation.settings import COMPRESSIONS
from hfllm.version import __version__

TEMPLATE = """[project]
name = "hfllm-federation"
version = "{version}"
dependencies = []

[tool.flwr.app]
publisher = "hfllm"

[tool.flwr.app.components]
serverapp = "federation_server:app"
clientapp = "federation_client:app"

[tool.flwr.app.config]
{config}
"""


def write_app(folder: str | Path, config: Mapping[str, str | int | float | bool]) -> None:
    """Write a Flower app whose code is hfllm's: all machines have it installed.

    Args:
        config: of the run: `loop`, `learner`, `num-organisations`, `timeout`, and the settings of these two.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # JSON's texts, numbers and booleans are TOML's too, but for escaped pairs of surrogates.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in config.items()]
    text = TEMPLATE.format(version=__version__, config="\n".join(lines))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    for side in ("server", "client"):
        # Flower looks for an assignment.
        lines = f"from hfllm.federation import {side}_app\n\napp = {side}_app.app\n"
        (folder / f"federation_{side}.py").write_text(lines, encoding="utf-8")


def check_certificate(path: str | Path, now: datetime.datetime | None = None) -> None:
    """Refuse a certificate not valid now."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"certificate {path}: cannot be read: {one_line(error, 120)}") from error
    now = now or datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(f"certificate {path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; make a new one")
    if now < certificate.not_valid_before_utc:
        raise InputError(f"certificate {path}: valid from {certificate.not_valid_before_utc:%Y-%m-%d} on only")


def main(arguments: list[str] | None = None) -> int:
    """Write a folder, and return 0, or 2 after one line about the error."""
    parser = argparse.ArgumentParser(description="Write the app that `flwr run` takes.")
    parser.add_argument("folder")
    parser.add_argument("--loop", required=True, help="module:function that runs all rounds at the server")
    parser.add_argument("--learner", required=True, help="module:function that makes an organisation's learner")
    parser.add_argument("--num_organisations", type=int, required=True)
    parser.add_argument("--timeout", type=float, help="seconds of a round")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="none")
    parser.add_argument("--config", nargs="*", default=[], metavar="NAME=VALUE", help="what the loop reads besides")
    parser.add_argument("--check", nargs="*", default=[], metavar="CERTIFICATE", help="certificates to check first")
    options = parser.parse_args(arguments)
    config = {"loop": options.loop, "learner": options.learner, "num-organisations": options.num_organisations}
    config |= {"compression": options.compression} | ({"timeout": options.timeout} if options.timeout else {})
    try:
        for text in options.config:
            name, is_pair, value = text.partition("=")
            if not (is_pair and name.replace("-", "").replace("_", "").isalnum()):
                raise InputError(f"--config {text!r}: expected NAME=VALUE")
            config[name] = value
        for path in options.check:
            check_certificate(path)
        write_app(options.folder, config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
