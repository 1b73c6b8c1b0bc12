"""Which experts to merge for a target: one file per way of ranking or choosing them."""

from sam.selection.sampling import Ask
from sam.selection.select import Query, Selector, check, custom, selector_of
from sam.selection.types import Ranking, Selection

__all__ = ["Ask", "Query", "Ranking", "Selection", "Selector", "check", "custom", "selector_of"]
