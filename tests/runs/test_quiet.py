"""What is kept out of a recipe's output, word for word as the libraries say it, and that all else comes through."""

import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import AutoModelForSequenceClassification

from hfllm.errors import InputError
from hfllm.models.loading.adapters import load_scorer
from hfllm.runs import output as output_module
from hfllm.runs.command_line import run
from hfllm.runs.output import HUB_BARS, NEW_HEAD, UNHELPFUL, hide_unhelpful_bars, hide_unhelpful_output

# Where each library says what is dropped.
SAID_IN = {
    "bitsandbytes.backends.cpu.ops": ("bitsandbytes", "backends/cpu/ops.py"),
    "DeepSpeed": ("deepspeed", "accelerator/real_accelerator.py"),
    "datasets.arrow_dataset": ("datasets", "arrow_dataset.py"),
}


@pytest.fixture
def hidden(monkeypatch):
    """The output with what is unhelpful hidden, as in a run of a recipe."""
    monkeypatch.setattr(output_module.os, "environ", {})
    with warnings.catch_warnings():
        hide_unhelpful_output()
        hide_unhelpful_bars()
        yield output_module.os.environ
    enable_progress_bars()
    for each in UNHELPFUL:
        logging.getLogger(each.logger).removeFilter(each)
    logging.getLogger("transformers.modeling_utils").removeFilter(NEW_HEAD)


@pytest.fixture
def said(monkeypatch):
    """What a logger lets through, by its name."""
    messages, levels = {}, []

    def listen(name):
        logger, messages[name] = logging.getLogger(name), []
        handler = logging.Handler()
        handler.emit = lambda record: messages[name].append(record.getMessage())
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "propagate", False)
        # By its own function, which forgets what the logger knows of the level before.
        levels.append((logger, logger.level))
        logger.setLevel(logging.WARNING)
        return messages[name]

    yield listen
    for logger, level in reversed(levels):
        logger.setLevel(level)


@pytest.mark.parametrize("each", UNHELPFUL, ids=lambda each: each.logger)
def test_what_is_unhelpful_is_dropped_and_nothing_else(each, hidden, said):
    heard, logger = said(each.logger), logging.getLogger(each.logger)
    logger.warning(f"{each.message}: %s", "something")
    assert not heard
    logger.warning("Your data is broken. %s", each.message)
    assert heard == [f"Your data is broken. {each.message}"]
    others = said(f"{each.logger}.other")
    logging.getLogger(f"{each.logger}.other").warning(each.message)
    assert others == [each.message]


@pytest.mark.parametrize("each", UNHELPFUL, ids=lambda each: each.logger)
def test_the_libraries_still_say_so(each):
    library, path = SAID_IN[each.logger]
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"needs {library}")
    assert each.message in Path(spec.submodule_search_locations[0], path).read_text()


def load_report(said, load):
    heard = said("transformers.modeling_utils")
    load()
    return heard


def test_the_new_head_of_a_scorer_is_no_news(saved, said, hidden):
    assert not load_report(said, lambda: load_scorer(str(saved)))
    logging.getLogger("transformers.modeling_utils").removeFilter(NEW_HEAD)
    (report,) = load_report(said, lambda: load_scorer(str(saved)))
    assert "score.weight" in report and "MISSING" in report


def test_other_missing_weights_are_news(make_model, saved, said, hidden):
    state = make_model().state_dict()
    lost = "model.layers.1.mlp.up_proj.weight"
    make_model().save_pretrained(saved, state_dict={name: value for name, value in state.items() if name != lost})
    with pytest.raises(
        InputError, match=r"1 weight is of the HfllmForSequenceClassification not in its files.*up_proj"
    ):
        load_scorer(str(saved))
    # A head of several labels that does not fit is not a new one either.
    make_model(model_class=AutoModelForSequenceClassification.from_config, num_labels=3).save_pretrained(saved)
    loaded = {"num_labels": 1, "ignore_mismatched_sizes": True}
    (report,) = load_report(said, lambda: AutoModelForSequenceClassification.from_pretrained(saved, **loaded))
    assert "MISMATCH" in report


def again(name, path):
    """A second copy of a library's module, as it would be imported now."""
    spec = importlib.util.spec_from_file_location(f"{name}_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bars_of_loading_and_saving_are_off_and_downloads_keep_theirs(hidden, monkeypatch):
    import datasets.config
    import transformers.utils.logging

    assert not again("transformers.utils.logging", transformers.utils.logging.__file__).is_progress_bar_enabled()
    assert not are_progress_bars_disabled("huggingface_hub.http_get")
    for value, expected in (("1", True), ("0", False)):
        assert hidden["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
        monkeypatch.setattr("os.environ", {"HF_DATASETS_DISABLE_PROGRESS_BARS": value})
        assert again("datasets.config", datasets.config.__file__).HF_DATASETS_DISABLE_PROGRESS_BARS is expected


def test_the_user_has_the_last_word(monkeypatch):
    monkeypatch.setattr(output_module.os, "environ", {"HF_DATASETS_DISABLE_PROGRESS_BARS": "0", HUB_BARS: "0"})
    monkeypatch.setattr(output_module, "UNHELPFUL", ())
    with warnings.catch_warnings():
        hide_unhelpful_output()
        hide_unhelpful_bars()
    assert output_module.os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0"
    assert not are_progress_bars_disabled()
    logging.getLogger("transformers.modeling_utils").removeFilter(NEW_HEAD)


def test_warnings_of_old_names_are_dropped_and_others_are_not(hidden):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_unhelpful_output()
        hide_unhelpful_bars()
        where = {"filename": "c10d_logger.py", "lineno": 1}
        old = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."
        warnings.warn_explicit(old, FutureWarning, module="torch.distributed.c10d_logger", **where)
        assert not caught
        warnings.warn_explicit(old, FutureWarning, module="mine", **where)
        warnings.warn_explicit(old, UserWarning, module="torch.distributed.c10d_logger", **where)
        assert len(caught) == 2


def test_every_recipe_is_quiet_but_for_its_help(monkeypatch):
    called = []
    monkeypatch.setattr("hfllm.runs.command_line.hide_unhelpful_output", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--help"])
    run(lambda: None, lambda argv: ())
    assert not called
    monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", "1"])
    run(lambda: None, lambda argv: ())
    assert called
