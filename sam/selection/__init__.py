"""Which experts to merge for a target: the rankings (``by_*``), and the selectors that use them."""

from sam.selection.by_sampling import Ask
from sam.selection.query import Query
from sam.selection.selector import Selector, uses
from sam.selection.types import Ranking, Selection

__all__ = ["Ask", "Query", "Ranking", "Selection", "Selector", "uses"]
