"""Bytes between organisations: round trips, and whatever a hostile or broken sender may send."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import BASE
from safetensors.torch import save

from hfllm.errors import InputError
from hfllm.federation.updates import (
    ErrorFeedback,
    Expected,
    Update,
    dequantize,
    from_bytes,
    quantize,
    read_update,
    size_limit,
    to_bytes,
    weights_from_bytes,
    weights_to_bytes,
)


def make_update(**overrides):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "w": torch.randn(4, 3, generator=generator),
        "v": torch.randn(5, generator=generator).double(),
        "c": torch.randn(2, 2, 3, generator=generator).bfloat16(),
    }
    fields = {"organisation": "clinic ü", "tensors": tensors, "num_tokens": 70, "num_rows": 7, "base_sha256": BASE}
    return Update(**fields | overrides)


UPDATE = make_update()
EXPECTED = Expected.of(UPDATE.tensors, BASE)
LIMIT = size_limit(EXPECTED)


def test_an_update_returns_bit_by_bit(tmp_path):
    data = to_bytes(UPDATE)
    path = tmp_path / "update"
    path.write_bytes(data)
    for back in (from_bytes(data, LIMIT, EXPECTED, "clinic ü"), read_update(path, LIMIT, EXPECTED)):
        assert all(torch.equal(back.tensors[name], value) for name, value in UPDATE.tensors.items())
        assert (back.organisation, back.num_tokens, back.num_rows) == ("clinic ü", 70, 7)
    assert all(
        torch.equal(value, UPDATE.tensors[name])
        for name, value in weights_from_bytes(weights_to_bytes(UPDATE.tensors)).items()
    )


def test_int8_is_off_by_half_a_step_at_most():
    back = from_bytes(to_bytes(UPDATE, "int8"), LIMIT, EXPECTED).tensors
    assert {name: value.dtype for name, value in back.items()} == {n: v.dtype for n, v in UPDATE.tensors.items()}
    rows, step = UPDATE.tensors["w"], UPDATE.tensors["w"].abs().amax(1, keepdim=True) / 127
    assert (back["w"] - rows).abs().le(step * 0.5001).all() and not torch.equal(back["w"], rows)
    large = make_update(tensors={"w": torch.randn(256, 256)})
    assert len(to_bytes(large, "int8")) < 0.27 * len(to_bytes(large))


def test_int8_keeps_zeros_and_small_rows_finite():
    tensors = {"w": torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1e38, -1e30]]), "empty": torch.zeros(0, 3)}
    back = dequantize(quantize(tensors), {"w": torch.float32, "empty": torch.float32})
    assert back["w"][0].tolist() == [0, 0] and back["w"].isfinite().all() and back["empty"].shape == (0, 3)


def test_error_feedback_loses_nothing_over_rounds():
    value = torch.tensor([[1.0, 0.003, -0.002]])
    update = make_update(tensors={"w": value})
    expected = Expected.of(update.tensors, BASE)

    def total(feedback):
        sent = [from_bytes(to_bytes(feedback(update), "int8"), LIMIT, expected).tensors["w"] for _ in range(50)]
        return torch.stack(sent).double().sum(0)

    kept = ErrorFeedback()
    # One step is 1/127: without feedback, the two small values would never travel.
    assert total(lambda each: each)[0, 1:].tolist() == [0, 0]
    assert (total(kept.corrected) - 50 * value.double()).abs().max() < 0.5 / 127 * 1.01
    with pytest.raises(InputError, match="other tensors"):
        kept.corrected(UPDATE)


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewritten(change):
    header, rest = header_of(to_bytes(UPDATE))
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def meta(**fields):
    return rewritten(lambda header: header["__metadata__"].update(fields))


def entry(name, **fields):
    return rewritten(lambda header: header[name].update(fields))


def of(**overrides):
    """Bytes of an update whose sender checks nothing."""
    update = make_update(**overrides)
    counts = {
        "num_tokens": str(update.num_tokens),
        "num_rows": str(update.num_rows),
        "base_sha256": update.base_sha256,
    }
    about = {"format": "hfllm.federation.1", "compression": "none", "organisation": update.organisation}
    return save(update.tensors, {**about, **counts})


TENSORS = UPDATE.tensors
HOSTILE = {
    "nothing": (b"", "0 bytes are too few"),
    "truncated": (to_bytes(UPDATE)[:-1], "not an update"),
    "cut in the header": (to_bytes(UPDATE)[:40], "a header of"),
    "huge header": ((1 << 62).to_bytes(8, "little") + b"{}", "a header of 4,611"),
    "no JSON": ((5).to_bytes(8, "little") + b"hello", "not an update"),
    "deep JSON": ((60_000).to_bytes(8, "little") + b"[" * 60_000, "not an update"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "not an update"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00.", "not an update"),
    "other format": (meta(format="x"), "format 'x'"),
    "other compression": (meta(compression="zip"), "compression 'zip'"),
    "another's name": (meta(organisation="bank"), "in the name of 'bank'"),
    "no number": (meta(num_tokens="1e9"), "num_tokens is '1e9'"),
    "long number": (meta(num_tokens="9" * 5000), "num_tokens is '9999"),
    "no tokens": (meta(num_tokens="0"), "num_tokens is 0"),
    "other base": (meta(base_sha256="f" * 64), "another base model"),
    "unknown type": (entry("w", dtype="F8_E4M3"), "type 'F8_E4M3'"),
    "wrong type": (of(tensors={**TENSORS, "w": TENSORS["w"].half()}), r"w as float16 \[4, 3\]; expected float32"),
    "wrong shape": (of(tensors={**TENSORS, "w": TENSORS["w"].T.contiguous()}), r"w as float32 \[3, 4\]"),
    "endless shape": (entry("w", shape=[math.inf, 3]), "not an update"),
    "false offsets": (entry("w", data_offsets=[0, 1 << 50]), "not an update"),
    "wrong name": (of(tensors={**TENSORS, "x": torch.zeros(1)}), "sent 'x'"),
    "missing": (of(tensors={"w": TENSORS["w"]}), "sent no v"),
    "infinite": (of(tensors={**TENSORS, "w": torch.full((4, 3), -math.inf)}), "w with NaN or infinite"),
    "no round": (meta(round="one"), "round is 'one'"),
    "NaN": (of(tensors={**TENSORS, "w": torch.full((4, 3), math.nan)}), "w with NaN"),
    "too large": (b"\0" * (LIMIT + 1), f"sent {LIMIT + 1:,} bytes; at most {LIMIT:,}"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_in_one_line(case):
    data, message = HOSTILE[case]
    with pytest.raises(InputError, match=message) as raised:
        from_bytes(data, LIMIT, EXPECTED, "clinic ü")
    assert "organisation 'clinic ü'" in str(raised.value) and "\n" not in str(raised.value)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 700), value=st.integers(0, 255), cut=st.integers(0, 700))
def test_any_damage_is_an_input_error_or_nothing(place, value, cut):
    data = bytearray(to_bytes(UPDATE))
    data[place % len(data)] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        with suppress(InputError):
            assert from_bytes(damaged, LIMIT, EXPECTED).tensors.keys() == TENSORS.keys()


def test_a_file_of_ten_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "update"
    with path.open("wb") as file:
        # A hole, which takes no disk.
        file.truncate(10_000_000_000)
    with pytest.raises(InputError, match="'a' sent 10,000,000,000 bytes; at most"):
        read_update(path, LIMIT, EXPECTED, "a")


def test_int8_with_scales_that_overflow_is_refused():
    header, rest = header_of(to_bytes(UPDATE, "int8"))
    begin, end = header["w.scale"]["data_offsets"]
    rest = rest[:begin] + b"\xff" * (end - begin) + rest[end:]
    text = json.dumps(header).encode()
    with pytest.raises(InputError, match="w with NaN"):
        from_bytes(len(text).to_bytes(8, "little") + text + rest, LIMIT, EXPECTED)


def test_an_update_says_which_round_it_answers():
    expected = replace(EXPECTED, round=7)
    assert from_bytes(to_bytes(UPDATE, round=7), LIMIT, expected).round == 7
    # What an update says itself is not written over.
    for sent, found in ((to_bytes(make_update(round=6), round=7), "of round 6"), (to_bytes(UPDATE), "of no round")):
        with pytest.raises(InputError, match=f"'clinic ü' sent an update {found}; expected one of round 7"):
            from_bytes(sent, LIMIT, expected, "clinic ü")


def test_a_sender_refuses_what_diverged():
    with pytest.raises(InputError, match="training diverged"):
        to_bytes(make_update(tensors={"w": torch.tensor([math.inf])}))
    with pytest.raises(InputError, match="compression is 'zip'"):
        to_bytes(UPDATE, "zip")
    with pytest.raises(InputError, match="not weights"):
        weights_from_bytes(b"junk")
