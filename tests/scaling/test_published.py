"""Published numbers, each computed by the library; its source and the tolerance stand beside it."""

import pytest

from hfllm.models.family.presets import preset
from hfllm.scaling import speed as speed_module
from hfllm.scaling.memory import PRECISIONS, korthikanti_activations, zero_state_bytes
from hfllm.scaling.shapes import NAMED_SHAPES, Shape

GB = 1e9
A100 = 312e12


def shape(name):
    return Shape.from_config(NAMED_SHAPES[name] if name in NAMED_SHAPES else preset(name))


def states(parameters, data, stage):
    return sum(zero_state_bytes(parameters, data, stage, PRECISIONS["bf16"]).values()) / GB


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_zero_figure_1(stage, gigabytes):
    """Rajbhandari et al. 2019, arXiv:1910.02054, figure 1: 7.5B parameters on 64 devices; to its three digits."""
    assert states(7.5e9, 64, stage) == pytest.approx(gigabytes, rel=0.003)


@pytest.mark.parametrize(
    ("devices", "stage", "gigabytes"),
    [(64, 1, 4187), (64, 2, 2218), (64, 3, 250), (1024, 1, 4011), (1024, 2, 2013), (1024, 3, 15.6)],
)
def test_zero_table_1(devices, stage, gigabytes):
    """arXiv:1910.02054, table 1, a trillion parameters; 0.2%."""
    assert states(1e12, devices, stage) == pytest.approx(gigabytes, rel=0.002)


MEGATRON = {
    **{"megatron-1.7b": 1.7, "megatron-3.6b": 3.6, "megatron-7.5b": 7.5, "megatron-18b": 18.4, "megatron-39b": 39.1},
    **{"megatron-76b": 76.1, "megatron-145b": 145.6, "megatron-310b": 310.1, "megatron-530b": 529.6},
    "gpt3-1t": 1008.0,
}


@pytest.mark.parametrize(("name", "billions"), MEGATRON.items())
def test_megatron_sizes(name, billions):
    """Narayanan et al. 2021, arXiv:2104.04473, equation 2 and table 1; to the digit printed."""
    one = shape(name)
    formula = speed_module.megatron_parameters(one.num_hidden_layers, one.hidden_size, 51200, 2048)
    assert round(formula / 1e9, 1) == billions
    # The formula has no final norm.
    assert one.num_parameters() - 2 * one.hidden_size == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize(
    ("parameters", "tokens", "devices", "achieved", "days"),
    [(175e9, 300e9, 1024, 140e12, 33.9), (1.008e12, 450e9, 3072, 163e12, 83.9)],
)
def test_megatron_days(parameters, tokens, devices, achieved, days):
    """arXiv:2104.04473, section 5.1: 34 days for GPT-3, 84 for the trillion; 0.2%."""
    assert speed_module.training_days(parameters, tokens, devices, achieved) == pytest.approx(days, rel=0.002)
    assert speed_module.training_days(parameters, tokens, devices, achieved, recompute=False) == pytest.approx(
        days * 6 / 8, rel=0.002
    )


def test_pipeline_bubble():
    """arXiv:2104.04473, section 2.2: (p-1)/m; the trillion's 64 stages and 512 micro-batches give 0.123."""
    assert speed_module.pipeline_bubble(64, 512) == pytest.approx(0.123, abs=5e-4)
    assert speed_module.pipeline_bubble(64, 512, interleave=4) == pytest.approx(0.123 / 4, abs=5e-4)
    assert speed_module.pipeline_bubble(1, 8) == 0


@pytest.mark.parametrize(
    ("parameters", "sizes", "speed", "chips", "peak", "without", "whole"),
    [
        (540.35e9, (118, 48, 256), 238.3e3, 6144, 275e12, 45.7, 46.2),
        (530e9, (105, 128, 160), 65.43e3, 2240, A100, 29.7, 30.2),
    ],
)
def test_palm_utilization(parameters, sizes, speed, chips, peak, without, whole):
    """Chowdhery et al. 2022, arXiv:2204.02311, table 3 and appendix B: PaLM 540B and MT-NLG 530B; 0.1 points."""
    for attention, percent in ((False, without), (True, whole)):
        per_token = speed_module.palm_flops_per_token(parameters, *sizes, 2048, attention)
        assert 100 * speed_module.utilization(speed, per_token, chips, peak) == pytest.approx(percent, abs=0.1)


def test_palm_preset_has_those_sizes():
    palm = shape("palm-540b")
    assert (palm.num_hidden_layers, palm.num_attention_heads, palm.head_dim) == (118, 48, 256)
    assert palm.num_parameters() == pytest.approx(540.35e9, rel=1e-4)


@pytest.mark.parametrize(("name", "scores", "saved"), [("gpt3-175b", 80, 70), ("megatron-530b", 64, 65)])
def test_korthikanti_activations(name, scores, saved):
    """Korthikanti et al. 2022, arXiv:2205.05198, section 5: 5as/h, and what selective recomputation saves; 0.5%."""
    one = shape(name)
    h, a, s = one.hidden_size, one.num_attention_heads, 2048
    whole = korthikanti_activations(s, 1, h, a)
    assert whole == s * h * (34 + scores)
    selective = korthikanti_activations(s, 1, h, a, recompute="selective")
    assert 100 * (1 - selective / whole) == pytest.approx(saved, abs=0.5)
    # Equations 2 and 4: ten of the 34 are whole under tensor parallelism alone.
    assert korthikanti_activations(s, 1, h, a, tensor=8) == pytest.approx(s * h * (10 + (24 + scores) / 8))
    assert korthikanti_activations(s, 1, h, a, tensor=8, sequence_parallel=True) == pytest.approx(whole / 8)
    assert korthikanti_activations(s, 1, h, a, recompute="full") == 2 * s * h


@pytest.mark.parametrize(("name", "percent"), [("gpt3-175b", 2.7), ("megatron-530b", 1.6)])
def test_korthikanti_overhead(name, percent):
    """arXiv:2205.05198, section 5: FLOPs that selective recomputation adds; 0.05 points."""
    one = shape(name)
    sizes = one.num_hidden_layers, one.hidden_size, 51200, 2048, 1
    per_batch = speed_module.megatron_flops_per_batch
    more = per_batch(*sizes, recompute="selective") / per_batch(*sizes)
    assert 100 * (more - 1) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(
    ("layers", "hidden", "batch", "devices", "seconds", "mfu", "hfu"),
    [
        (48, 6144, 4, 8, 1.10, 41.5, 43.7),
        (96, 12288, 64, 64, 13.75, 51.4, 52.8),
        (105, 20480, 280, 280, 37.83, 56.0, 57.0),
        (128, 25600, 512, 512, 71.49, 56.3, 57.0),
    ],
)
def test_korthikanti_utilization(layers, hidden, batch, devices, seconds, mfu, hfu):
    """arXiv:2205.05198, table 5, from its times of a step; 0.2 points, since 1.10 s has three digits."""
    for recompute, percent in (("none", mfu), ("selective", hfu)):
        work = speed_module.megatron_flops_per_batch(layers, hidden, 51200, 2048, batch, recompute)
        per_token = work / (batch * 2048)
        reached = speed_module.utilization(batch * 2048 / seconds, per_token, devices, A100)
        assert 100 * reached == pytest.approx(percent, abs=0.2)


def test_full_recomputation_is_four_passes_of_the_layers():
    """arXiv:2104.04473, equation 3: 96 B s l h^2 (1 + s/(6h) + V/(16lh))."""
    layers, h, v, s, b = 96, 12288, 51200, 2048, 7
    equation = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert speed_module.megatron_flops_per_batch(layers, h, v, s, b, "full") == pytest.approx(equation, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "per_token"), [("llama-7b", 524_288), ("llama-13b", 819_200), ("llama-2-70b", 327_680)]
)
def test_key_value_bytes(name, per_token):
    """2 l K D values of 2 bytes, exact; LLaMA-2 70B's at 4,096 tokens are 1.25 GiB, 10 without grouped queries."""
    one = shape(name)
    assert one.kv_bytes_per_token() == per_token
    if name == "llama-2-70b":
        assert per_token * 4096 == 1.25 * 2**30
        ungrouped = Shape.from_config(preset(name) | {"num_key_value_heads": 64})
        assert ungrouped.kv_bytes_per_token() * 4096 == 10 * 2**30


def test_gpt3_training_flops():
    """Brown et al. 2020, arXiv:2005.14165, table D.1: 3.14e23 for 300B tokens; 0.2%."""
    assert speed_module.training_flops(shape("gpt3-175b").num_parameters(), 300e9) == pytest.approx(3.14e23, rel=0.002)


def test_llama_days():
    """Touvron et al. 2023, arXiv:2302.13971, section 2.4: 380 tokens/s on each of 2,048 A100, 1.4T tokens, 21 days."""
    assert speed_module.days_at_speed(1.4e12, 380 * 2048) == pytest.approx(20.8, abs=0.05)


def test_palm_batch_ramp():
    """arXiv:2204.02311, section 5: 512, 1024 and 2048 sequences until steps 50k, 115k and 255k; 776B tokens; 0.1%."""
    tokens = speed_module.ramp_tokens([(512, 50_000), (1024, 115_000), (2048, 255_000)], 2048)
    assert tokens == pytest.approx(776e9, rel=0.001)
