"""The oracle: experts ranked by F1 on the target's gold labels. For analysis; not a method."""

from __future__ import annotations

from collections.abc import Sequence

from sam.errors import SamError
from sam.selection.by_sampling import Ask
from sam.selection.types import Ranking
from sam.task import Task
from sam.types import Sentence


def rank(
    sentences: Sequence[Sentence], names: Sequence[str], ask: Ask, task: Task, seeds: Sequence[object] = ()
) -> Ranking:
    """Rank experts ``names`` by F1 on ``sentences``, which must have gold; ``seeds`` draw the order of equal ones."""
    if not sentences:
        raise SamError("selector=oracle ranks by gold labels, and the target has none; choose another selector")
    texts = [s.text for s in sentences]
    scores = {name: round(task.score(sentences, ask(name, texts)).f1, 6) for name in names}
    return Ranking.by(scores, {"by": "F1 on the target's gold labels"}, seeds)
