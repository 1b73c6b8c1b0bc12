"""Which experts to merge for a target: one file a way of ranking or choosing them."""

from sam.selection.select import SELECTORS, Query, check, select
from sam.selection.types import Ranking, Selection

__all__ = ["SELECTORS", "Query", "Ranking", "Selection", "check", "select"]
