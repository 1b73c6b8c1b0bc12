"""A selector as a config names it: a function, what it uses, and checks of what it is given and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sam.errors import SamError
from sam.experts.card import Pool
from sam.extend import Configured
from sam.selection.query import Query
from sam.selection.types import Selection

F = TypeVar("F", bound=Callable[..., Any])

FIELDS = ("names", "k", "seed", "encoder", "sample_size", "gold")


def uses(*fields: str) -> Callable[[F], F]:
    """Declare what a selector uses of the query beside the target's texts, and ``gold`` for the target's mentions.

    Mentions are hidden from a selector that does not declare ``gold``, and what is not declared is left out of a
    result's hash. Raises SamError for what is not one of :data:`FIELDS`.
    """
    if unknown := [field for field in fields if field not in FIELDS]:
        raise SamError(f"sam.selection.uses: {unknown[0]} is unknown; allowed: {', '.join(FIELDS)}")

    def declare(function: F) -> F:
        function.uses = frozenset(fields)  # type: ignore[attr-defined]
        return function

    return declare


@dataclass(frozen=True)
class Selector(Configured):
    """What chooses the experts of each task model. ``flags``: ``k`` and ``gold`` for a function without :func:`uses`,
    which is taken to use all the rest."""

    flags: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Selector:
        """From a ``conf/selector`` file; ``uses_k`` and ``uses_gold`` are the flags of a function of one's own."""
        flags = {"k": config.get("uses_k", False), "gold": config.get("uses_gold", False)}
        selector = cls.read(config, "selector", 1, ("name", "uses_k", "uses_gold"))
        given = frozenset(name for name, value in flags.items() if value)
        if given and selector.declared:
            raise SamError(f"selector.uses_{min(given)}: {selector.shown} declares by itself what it uses; remove it")
        return replace(selector, flags=given)

    @property
    def declared(self) -> bool:
        """Whether the function states what it uses."""
        return hasattr(self.function, "uses")

    @property
    def uses(self) -> frozenset[str]:
        """See :func:`uses`."""
        return self.function.uses if self.declared else self.flags | {"names"}  # type: ignore[attr-defined,no-any-return]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that the option ``experts`` names."""
        names = self.options.get("experts") or ()
        return tuple(names) if isinstance(names, list | tuple) else (str(names),)

    def content(self) -> dict[str, Any]:
        """What identifies the selector, with its flags."""
        return {**super().content(), **({"flags": sorted(self.flags)} if self.flags else {})}

    def check(self, k: Any, sample_size: Any, names: Sequence[str], pool: Pool) -> None:
        """Refuse a selection that cannot be made, before anything is loaded."""
        if "k" in self.uses and not (type(k) is int and 1 <= k <= len(names)):
            raise SamError(f"k={k} must be an integer in 1..{len(names)}, the size of the pool ({', '.join(names)})")
        if "sample_size" in self.uses and not (type(sample_size) is int and sample_size >= 1):
            raise SamError(f"sample_size={sample_size} must be an integer of at least 1")
        if "experts" in self.options and not self.experts:
            raise SamError(f"selector={self.name} needs selector.experts=[…]; the pool holds: {', '.join(pool.cards)}")
        for expert in self.experts:
            pool.folder(expert)

    def choose(self, query: Query) -> dict[str, Selection]:
        """Task model -> the experts to merge for it. Unless it uses gold, the query's target has no mentions.

        Raises SamError for what is no mapping from names to lists of experts of the pool.
        """
        if "gold" not in self.uses and query.target.scored:
            blind = tuple(replace(s, mentions=None) for s in query.target.sentences)
            query = replace(query, target=replace(query.target, sentences=blind))
        chosen = self.function(query, **self.options)
        if not isinstance(chosen, Mapping) or not chosen:
            raise SamError(f"selector: {self.shown} returned {chosen!r}; it must map task models to lists of experts")
        return {str(model): self._checked(str(model), experts, query) for model, experts in chosen.items()}

    def _checked(self, model: str, chosen: Any, query: Query) -> Selection:
        selection = chosen if isinstance(chosen, Selection) else None
        experts = selection.experts if selection else chosen
        allowed = [*query.names, *self.experts]
        if not isinstance(experts, list | tuple) or not all(expert in allowed for expert in experts):
            raise SamError(
                f"selector: {self.shown} chose {experts!r} for {model}; it must be a list of: {', '.join(allowed)}"
            )
        return selection or Selection(self.shown, tuple(experts), {})
