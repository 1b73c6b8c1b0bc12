"""Which experts to merge for a target: one file per way of ranking or choosing them."""

from sam.selection.sampling import Ask
from sam.selection.select import SELECTORS, Query, check, select
from sam.selection.types import Ranking, Selection

__all__ = ["SELECTORS", "Ask", "Query", "Ranking", "Selection", "check", "select"]
