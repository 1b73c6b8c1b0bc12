"""An expert's card (``expert.json``) and the pool: a folder of experts.

Adding an expert to a pool is adding a folder; nothing is retrained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sam.errors import SamError
from sam.models.identity import CARD_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
ROLES = ("expert", "unified", "start")

HELDOUT_CHARACTERS = 600
"""Longer sentences than this are not among those that a finished expert is scored on."""


@dataclass(frozen=True)
class Card:
    """What is known of an expert without loading it.

    ``base_fold`` is the content hash of the adapter that was baked into the base (its fingerprint covers it).
    ``centroid`` is the normalised mean embedding of its training sentences by ``encoder``
    (:attr:`sam.models.encoder.EncoderSpec.identity`); ``scores`` are on held-out sentences of its own datasets. Cards
    of role ``unified`` (the baseline) and ``start`` (baked into the base before all others are trained) are never
    selected by rank.
    """

    name: str
    role: str
    domain: str
    datasets: tuple[str, ...]
    types: tuple[str, ...]
    base: str
    base_fingerprint: str
    prompt_version: str
    encoder: str
    centroid: tuple[float, ...]
    recipe: dict[str, Any]
    sentences: int
    base_fold: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``expert.json`` into ``folder``."""
        (folder / CARD_FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card in ``folder``; raises SamError where it is missing or not a card."""
        path = folder / CARD_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            card = cls(**{**raw, **{key: tuple(raw[key]) for key in ("datasets", "types", "centroid")}})
        except FileNotFoundError:
            raise SamError(f"{folder} has no {CARD_FILE}; an expert folder is written by `run.py task=train`") from None
        except (ValueError, TypeError, KeyError) as error:
            raise SamError(f"{path} is not an expert card ({error}); train the expert again") from None
        if card.role not in ROLES:
            raise SamError(f"{path}: role {card.role!r} is unknown; allowed: {', '.join(ROLES)}")
        return card


class Pool:
    """The experts in a folder, by name; cards are read, weights are not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise SamError(f"experts.path={path} is not a folder; train experts into it with `run.py task=train`")

    @cached_property
    def cards(self) -> dict[str, Card]:
        """All cards, of every role, by folder name, sorted."""
        shown = (f for f in self.path.iterdir() if not f.name.startswith("."))
        folders = sorted(f for f in shown if (f / CARD_FILE).is_file() or (f / CONFIG_FILE).is_file())
        cards = {f.name: Card.read(f) for f in folders}
        for name, card in cards.items():
            if card.name != name:
                raise SamError(f"{self.path / name}: the card says {card.name!r}; an expert's folder bears its name")
            if name == "combined":
                raise SamError(f"{self.path / name}: results call the united predictions so; rename the expert")
        if not cards:
            raise SamError(f"experts.path={self.path} holds no expert; {self._instead()}")
        return cards

    def _instead(self) -> str:
        if (self.path / CARD_FILE).is_file():
            return f"it is one itself: give its parent, {self.path.parent}"
        pools = sorted({str(card.parent.parent) for card in self.path.glob(f"*/*/{CARD_FILE}")})
        return f"it holds pools: {', '.join(pools)}" if pools else "train some with `run.py task=train`"

    @property
    def names(self) -> list[str]:
        """The names that a selector ranks: every card of role ``expert``."""
        return [name for name, card in self.cards.items() if card.role == "expert"]

    def folder(self, name: str) -> Path:
        """The folder of expert ``name``."""
        if name not in self.cards:
            raise SamError(f"expert {name!r} is not in {self.path}; it holds: {', '.join(self.cards)}")
        return self.path / name

    def check(self, fingerprint: str, prompt_version: str, names: Iterable[str] | None = None) -> None:
        """Refuse, before anything is loaded, experts of another base or prompt, and corrupt or missing weights."""
        from safetensors import SafetensorError, safe_open

        for name in self.names if names is None else names:
            path, card = self.folder(name), self.cards[name]
            if card.base_fingerprint != fingerprint:
                baked = f" with an adapter baked in ({card.base_fold[:12]})" if card.base_fold else ""
                start = next((self.path / n for n, c in self.cards.items() if c.role == "start"), None)
                fold = start if card.base_fold and start else "what it was trained with" if card.base_fold else "null"
                raise SamError(
                    f"expert {name!r} was trained on base {card.base}{baked} ({card.base_fingerprint[:12]}), not on "
                    f"this one ({fingerprint[:12]}); choose base={card.base} and base.fold={fold}, or a pool trained "
                    "on this base"
                )
            if card.prompt_version != prompt_version:
                raise SamError(
                    f"expert {name!r} was trained with prompt version {card.prompt_version}, this is {prompt_version}; "
                    "train it again"
                )
            if not (path / CONFIG_FILE).is_file():
                raise SamError(f"{path} has no {CONFIG_FILE}; train the expert again")
            try:
                with safe_open(path / WEIGHTS_FILE, framework="pt") as handle:
                    handle.keys()
            except (SafetensorError, OSError) as error:
                raise SamError(
                    f"{path / WEIGHTS_FILE} is missing or corrupt ({error}); fetch or train it again"
                ) from None
