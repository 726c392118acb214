"""Rounds between a SuperLink and SuperNodes of Flower on loopback, with TLS: the bits of one process."""

import datetime
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from learners import BASE
from safetensors import safe_open
from test_transports import SETTINGS, in_process, run_rounds

from hfllm.errors import InputError
from hfllm.federation.flower_app import check_certificate, main, write_app

HERE = Path(__file__).parent
needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="flwr is not installed: pip install 'hfllm[federated]'"
)


def make_certificates(folder):
    """An authority and a server's certificate for loopback, as docs/guides/federation.md makes them."""
    folder.mkdir()
    commands = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=federation -keyout ca.key -out ca.pem",
        "openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "openssl x509 -req -days 90 -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile san"
        " -out server.pem",
    )
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for command in commands:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def test_the_app_is_a_folder_of_settings(tmp_path, capsys):
    assert main([str(tmp_path), "--loop", "a:b", "--learner", "c:d", "--num_organisations", "3"]) == 0
    settings = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert settings["config"] == {"loop": "a:b", "learner": "c:d", "num-organisations": 3, "compression": "none"}
    assert {path.name for path in tmp_path.glob("*.py")} == {"federation_server.py", "federation_client.py"}
    words = [str(tmp_path), "--loop", "a:b", "--learner", "c:d", "--num_organisations", "3", "--config"]
    assert main([*words, "flags=/a b/c.yaml"]) == 0 and main([*words, "flags"]) == 2
    assert main([*words, "who=\U0001f3e5 ü"]) == 0
    settings = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert settings["config"]["who"] == "\U0001f3e5 ü"
    assert main([*words, "flags=/a b/c.yaml"]) == 0
    assert 'flags = "/a b/c.yaml"' in (tmp_path / "pyproject.toml").read_text()
    assert capsys.readouterr().err == "error: --config 'flags': expected NAME=VALUE\n"
    pytest.importorskip("cryptography")
    missing = [str(tmp_path), "--loop", "a:b", "--learner", "c:d", "--num_organisations", "3", "--check", "none.pem"]
    assert main(missing) == 2
    assert capsys.readouterr().err.startswith("error: certificate none.pem: cannot be read")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_expired_certificates_are_refused(tmp_path):
    pytest.importorskip("cryptography")
    make_certificates(tmp_path / "tls")
    path, now = tmp_path / "tls" / "server.pem", datetime.datetime.now(datetime.UTC)
    check_certificate(path)
    with pytest.raises(InputError, match=r"server\.pem: expired on 20\d\d-"):
        check_certificate(path, now + datetime.timedelta(days=91))
    with pytest.raises(InputError, match=r"server\.pem: valid from 20\d\d-"):
        check_certificate(path, now - datetime.timedelta(days=2))


class Loopback:
    """A SuperLink and a SuperNode for each organisation, with TLS; ended on leaving."""

    def __init__(self, folder, settings):
        self.folder, self.settings, self.processes = folder, settings, []
        path = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            **{"FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": os.pathsep.join(path),
            # Flower's commands start each other by name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(words, stdout=log, stderr=log, env=self.environment))

    def __enter__(self):
        make_certificates(self.folder / "tls")
        tls = [str(self.folder / "tls" / name) for name in ("ca.pem", "server.pem", "server.key")]
        link, *ports = free_ports(1 + len(self.settings))
        self.address = f"127.0.0.1:{link}"
        certificates = ("--ssl-ca-certfile", tls[0], "--ssl-certfile", tls[1], "--ssl-keyfile", tls[2])
        place = ("--host", "127.0.0.1", "--port", str(link))
        self.start("link", "flower-superlink", "--disable-runtime-dependency-installation", *place, *certificates)
        wait_for(lambda: is_open(link), self.folder, 120)
        for (name, values), port in zip(self.settings.items(), ports, strict=True):
            (self.folder / f"{name}.json").write_text(str(values).replace("'", '"'))
            config = f'organisation="{name}" settings="{self.folder / name}.json"'
            where = ("--superlink", self.address, "--root-certificates", tls[0], "--port", str(port))
            self.start(name, "flower-supernode", *where, "--node-config", config)
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        text = f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "{self.address}"\n'
        (home / "config.toml").write_text(text + f'root-certificates = "{tls[0]}"\n')
        return self

    def run(self, **config):
        result = self.folder / "result.safetensors"
        write_app(self.folder / "app", {"result": str(result), "num-organisations": len(self.settings), **config})
        command = ["flwr", "run", str(self.folder / "app"), "loop"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=200)
        wait_for(result.exists, self.folder, 400)
        with safe_open(result, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    def __exit__(self, *error):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, folder, seconds):
    since = time.monotonic()
    while not condition():
        if time.monotonic() - since > seconds:
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"{seconds} seconds: {logs}")
        time.sleep(0.2)


@pytest.mark.slow
@needs_flower
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_two_machines_give_the_bits_of_one_process(tmp_path):
    settings = dict(list(SETTINGS.items())[:2])
    with Loopback(tmp_path, settings) as loopback:
        ours, said = loopback.run(loop="flower_loop:run", learner="learners:make_learner")
    one = in_process(settings)
    theirs, _ = run_rounds(one, names=list(settings))
    assert said["names"] == "org0 org1" and not said["failures"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and theirs["w"].abs().max() > 0.01
    assert said["bytes"] == f"{one.bytes_sent} {one.bytes_received}" and one.base_sha256 == BASE
