"""Sections of the config as dataclasses: what is refused, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from sam.errors import SamError
from sam.options import options
from tests.tiny import one_line


@dataclass(frozen=True)
class Cake:
    flavour: str
    layers: int = 2
    height: float = 1.5
    iced: bool = False
    weights: tuple[float, ...] | None = None


def test_values_are_taken() -> None:
    assert options(Cake, {"flavour": "lemon"}, "cake") == Cake("lemon")
    given = {"flavour": "plum", "layers": 3, "height": 2, "iced": True, "weights": [1, 0.5]}
    found = options(Cake, given, "cake")
    assert found == Cake("plum", 3, 2.0, True, (1.0, 0.5))
    assert repr(found) == repr(Cake("plum", 3, 2.0, True, (1.0, 0.5)))  # numbers are floats where the option is one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flavor": "plum"}, "cake.flavor is unknown; allowed: flavour, height, iced, layers, weights"),
        ({"layers": 3}, "cake.flavour is missing; cake needs flavour"),
        ({"flavour": None}, "cake.flavour=null must be text"),
        ({"flavour": 7}, "cake.flavour=7 must be text"),
        ({"flavour": "a", "layers": 8.5}, "cake.layers=8.5 must be an integer"),
        ({"flavour": "a", "layers": True}, "cake.layers=True must be an integer"),
        ({"flavour": "a", "layers": None}, "cake.layers=null must be an integer"),
        ({"flavour": "a", "height": "high"}, "cake.height=high must be a number"),
        ({"flavour": "a", "height": True}, "cake.height=True must be a number"),
        ({"flavour": "a", "iced": "no"}, "cake.iced=no must be true or false"),
        ({"flavour": "a", "weights": 0.5}, "cake.weights=0.5 must be a list with a number in each place or null"),
        ({"flavour": "a", "weights": ["x"]}, "cake.weights=['x'] must be a list with a number in each place or null"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SamError) as error:
        options(Cake, given, "cake")
    assert one_line(error) == message
