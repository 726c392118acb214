"""Small models, tokenizers and prompts that the tests share. Nothing here needs a network or a file."""

import gc
import os
import shutil
import signal
import sys
from contextlib import closing, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from processes import Processes, import_torch, import_what_runs_need

# Some minutes each. They start first: begun last, one would leave the other worker without work.
LONGEST = ("world", "fresh_processes", "kills", "engines")

PROCESSES = pytest.StashKey[Processes]()

# Torch and what stands on it are imported where they are used: with several workers, the process that hands out the
# tests needs none of it. Until the tests run, garbage collection has millions of imported objects to look through.
gc.disable()
# What the fixture `bare_processes` forks from is forked here, before folders' conftests import transformers.
HANDS_OUT = "PYTEST_XDIST_WORKER" not in os.environ and any(word.startswith(("-n", "--num")) for word in sys.argv)
BARE_PROCESSES = None if HANDS_OUT or "--collect-only" in sys.argv else Processes(import_torch)


def pytest_addoption(parser):
    parser.addoption("--turn", type=int, help="of the tests marked turn(n), run those of this number only")


def pytest_collection_modifyitems(config, items):
    turn = config.getoption("turn")
    if turn is not None:
        left_out = {item for item in items if (mark := item.get_closest_marker("turn")) and mark.args != (turn,)}
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: not item.path.stem.endswith(LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Now all is imported and nothing computed: what the fixture `processes` forks from is forked here."""
    is_needed = any("processes" in getattr(item, "fixturenames", ()) for item in session.items)
    if is_needed and not session.config.option.collectonly:
        session.config.stash[PROCESSES] = Processes(import_what_runs_need)


@pytest.fixture(scope="module")
def ctrl_c_is_heard():
    """Ctrl-C interrupts this process, which workers of a parallel test run and background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def other_runs_are_not_waited_for():
    """A run that holds a folder in a test is not ending."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfllm.runs.lock.PATIENCE", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def known_answers_are_kept():
    """What libraries find out again for each parser, save and unwrapped model, and what no test changes.

    Together it is a tenth of the time of many tests: whether deepspeed is installed, which files of code travel with a
    model, the types of a dataclass's fields, what a file of flags holds, how wide the terminal is, for each flag that
    is added, and who seeds the GPUs that are not there, for when they come.
    """
    if "transformers" not in sys.modules:
        # Tests that need none of these do not wait for their import.
        yield
        return
    import torch
    import yaml
    from accelerate.utils import imports
    from transformers import dynamic_module_utils
    from trl.scripts import _hf_argparser

    from hfllm.runs.parser import no_duplicates

    is_available, files_beside = imports._is_package_available, cache(dynamic_module_utils.get_relative_import_files)
    has_deepspeed, ours = is_available("deepspeed"), str(Path(__file__).parent.parent / "hfllm")
    load = yaml.load
    mapping_of = cache(lambda text: load(text, no_duplicates()))

    def load_once(stream, Loader):
        return deepcopy(mapping_of(stream)) if Loader.__name__ == "NoDuplicates" else load(stream, Loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load_once)
        patch.setattr(
            imports,
            "_is_package_available",
            lambda name, *others: has_deepspeed if (name, *others) == ("deepspeed",) else is_available(name, *others),
        )
        patch.setattr(
            dynamic_module_utils,
            "get_relative_import_files",
            lambda file: list((files_beside if str(file).startswith(ours) else files_beside.__wrapped__)(file)),
        )
        patch.setattr(_hf_argparser, "get_type_hints", cache(_hf_argparser.get_type_hints))
        for device in (torch.cuda, torch.xpu):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        patch.setenv("COLUMNS", "80")
        patch.setenv("LINES", "24")
        with suppress(ImportError):
            from loguru._better_exceptions import ExceptionFormatter

            patch.setattr(ExceptionFormatter, "_get_lib_dirs", staticmethod(cache(ExceptionFormatter._get_lib_dirs)))
        yield


@pytest.fixture(scope="module", autouse=True)
def imported_objects_are_not_garbage():
    """Each run of a trainer collects garbage: half of a test's time, if that looks through all imported objects."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processes(request):
    with closing(request.config.stash[PROCESSES]) as processes:
        yield processes


@pytest.fixture(scope="session")
def bare_processes():
    with closing(BARE_PROCESSES) as processes:
        yield processes


@pytest.fixture(scope="session")
def world():
    from hfllm.data.world.world import World

    return World(0)


@pytest.fixture(scope="session")
def tokenizer(world):
    from hfllm.data.tokenizer import train_tokenizer
    from hfllm.data.world.demonstrators import instruction_rows

    rows = instruction_rows(world, 500)
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows]
    return train_tokenizer(texts, vocab_size=400, model_max_length=256)


@pytest.fixture
def make_config(tokenizer):
    import hfllm

    def make(**overrides):
        values = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        return hfllm.HfllmConfig(**{**values, **overrides})

    return make


@pytest.fixture
def make_model(make_config):
    import torch

    import hfllm

    def make(seed=0, model_class=None, **overrides):
        torch.manual_seed(seed)
        return (model_class or hfllm.HfllmForCausalLM)(make_config(**overrides)).eval()

    return make


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that this process talks to, logged in as `me`; waiting before retries takes no time."""
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants

    with HubServer({TOKEN: ("me", "write"), "hf_readreadreadreadreadread": ("me", "read")}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # The functions of the module are methods of this object, which is made when it is imported.
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        # transformers keeps one of its own, with the address of when it was first needed.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="session", autouse=True)
def disk_keeps_what_is_written():
    """Tests write small files by the thousand: none waits for the disk, but those of what waits for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfllm.durable._sync", lambda path, flags: None)
        yield


@pytest.fixture(scope="session")
def saved_once():
    """Tokenizers, and the folders in which each lies with a model."""
    return {}


@pytest.fixture
def saved(make_model, tokenizer, saved_once, tmp_path, tmp_path_factory):
    """A saved language model with its tokenizer, in the folder `model`."""
    if id(tokenizer) not in saved_once:
        folder = tmp_path_factory.mktemp("saved")
        make_model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved_once[id(tokenizer)] = tokenizer, folder
    return shutil.copytree(saved_once[id(tokenizer)][1], tmp_path / "model")
