"""Recipes in miniature: the same code on a world of a few hundred rows."""

import shutil

import pytest
import sft
from peft import AutoPeftModelForCausalLM
from tiny_stages import write_settings


@pytest.fixture(scope="session")
def drawn_plot(tmp_path_factory):
    from hfllm.outputs.report import Bars

    drawn = tmp_path_factory.mktemp("plots") / "plot.png"
    assert Bars("Title", "x", {"a": 1.0}).draw(drawn)
    return drawn


# Of each module of this folder alone: what comes after it in the same process draws.
@pytest.fixture(scope="module", autouse=True)
def plots_are_copies(drawn_plot):
    """One plot is drawn, and is copied for the hundreds of all reports; what is drawn is what tests/outputs tests."""
    from hfllm.outputs.report import Bars, Heatmap, Plot

    def draw_lines(plot, path):
        lines = [*plot.lines.values(), *plot.points.values()]
        assert all(len(x) == len(y) for x, y in lines), plot.title
        return any(len(x) for x, _ in lines) and bool(shutil.copy(drawn_plot, path))

    def draw_table(table, path):
        assert len(table.values) == len(table.rows), table.title
        assert all(len(row) == len(table.columns) for row in table.values), table.title
        return bool(table.rows and table.columns) and bool(shutil.copy(drawn_plot, path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "draw", draw_lines)
        patch.setattr(Heatmap, "draw", draw_table)
        patch.setattr(Bars, "draw", lambda bars, path: bool(bars.values) and bool(shutil.copy(drawn_plot, path)))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_held_out_documents():
    """Models that read a few hundred documents are measured on fewer, as a thousand take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfllm.data.loading.NUM_HELD_OUT_DOCUMENTS", 150)
        yield


@pytest.fixture(autouse=True)
def the_fast_decoder_takes_what_recipes_set(monkeypatch):
    """Only another family, an adapter, quantized weights or stop strings leave `generate` a text of the world."""
    from hfllm.generation import responses
    from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
    from hfllm.trainers.ppo import sampling

    def refuse(model, reason):
        is_known = any(words in reason for words in ("PEFT", "not a plain linear layer", "stop strings", "has hooks"))
        assert is_known or not isinstance(model, HfllmForCausalLM), reason

    for module in (responses, sampling):
        monkeypatch.setattr(module, "warn_of_generate", refuse)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of tiny YAML configs, by stage."""
    return write_settings(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def base(tiny, tmp_path_factory):
    """The folder of a tiny pretrained model."""
    import pretrain

    folder = tmp_path_factory.mktemp("base")
    pretrain.main(*pretrain.parse(["--config", tiny["pretrain"], "--output_dir", str(folder)]))
    return folder


@pytest.fixture
def learns_on(tmp_path):
    """Fine-tune an adapter on a saved model by the recipe; it is loaded again, on the model, and has learned."""

    def check(folder):
        flags = ["--model_name_or_path", str(folder), "--num_examples", "40", "--use_peft", "--max_steps", "2"]
        flags += ["--save_strategy", "no", "--output_dir", str(tmp_path / "adapter")]
        sft.main(*sft.parse(flags))
        weights = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").state_dict()
        learned = [value for name, value in weights.items() if "lora_B" in name]
        assert learned and all(value.abs().max() > 0 for value in learned)

    return check


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory):
    """A folder with a tiny vision-language model, and its processor, in `model`."""
    from seeing_rows import make_model, make_processor

    folder = tmp_path_factory.mktemp("seeing")
    make_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    return folder
