"""How answers are decoded, and what of it is in an answer's key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sam.decoding import DecodeSpec
from sam.decoding.packed import HALF, INT8
from sam.errors import SamError


def test_spec_from_config() -> None:
    assert DecodeSpec.from_config({"max_new_tokens": 5, "batch_size": 2, "mode": "exact"}) == DecodeSpec(5, 2, "exact")
    with pytest.raises(SamError, match=r"decode.mode=slow is unknown; allowed: exact, fast"):
        DecodeSpec.from_config({"mode": "slow"})
    for bad in ({"max_new_tokens": 0}, {"batch_size": -1}):
        with pytest.raises(SamError, match="must be at least 1"):
            DecodeSpec.from_config(bad)


@pytest.mark.parametrize(
    ("halves", "int8", "expected"),
    [(True, True, HALF), (False, True, INT8), (False, False, "float32")],
)
def test_canonical_decoding_tells_modes_apart_where_they_differ(
    monkeypatch: pytest.MonkeyPatch, halves: bool, int8: bool, expected: str
) -> None:
    fast, exact = DecodeSpec(5, 2, "fast"), DecodeSpec(5, 2, "exact")
    monkeypatch.setattr("sam.decoding.packed.compiled_in", lambda: None)
    monkeypatch.setattr("sam.decoding.packed.packs", lambda dtype: True)
    monkeypatch.setattr("sam.decoding.packed.multiplies_bf16", lambda: halves)
    monkeypatch.setattr("sam.decoding.packed.packs_int8", lambda: int8)
    monkeypatch.setattr("sam.decoding.packed.has_amx", lambda: False)
    assert fast.canonical("float32", "cpu")["dtype"] == expected
    assert exact.canonical("float32", "cpu")["dtype"] == "float32"
    for dtype, device in (("bfloat16", "cpu"), ("float32", "cuda")):
        assert fast.canonical(dtype, device) == exact.canonical(dtype, device)
    monkeypatch.setattr("sam.decoding.packed.has_amx", lambda: True)
    blocks = " in blocks" if halves else ""
    assert fast.canonical("float32", "cpu")["dtype"] == expected + blocks
    assert exact.canonical("bfloat16", "cpu")["dtype"] == "bfloat16 in blocks"
    assert exact.canonical("float32", "cpu")["dtype"] == "float32"
    monkeypatch.setattr("sam.decoding.packed.packs", lambda dtype: False)
    assert fast.canonical("float32", "cpu") == exact.canonical("float32", "cpu")


def test_canonical_decoding_holds_the_batch_size_where_rounding_depends_on_it() -> None:
    for dtype, device in (("bfloat16", "cpu"), ("float32", "cuda")):
        assert DecodeSpec(5, 2).canonical(dtype, device) != DecodeSpec(5, 9).canonical(dtype, device)


def test_canonical_decoding_leaves_out_the_batch_size() -> None:
    one: Callable[..., dict[str, Any]] = DecodeSpec(5, 2).canonical
    assert one("float32", "cpu") == DecodeSpec(5, 9).canonical("float32", "cpu")
    others = [one("float32", "cpu"), one("bfloat16", "cpu"), one("float32", "cuda:0")]
    assert DecodeSpec(6, 2).canonical("float32", "cpu") not in others
    assert one("float32", "cuda:1") == others[2] and others[0] != others[1] != others[2] != others[0]
