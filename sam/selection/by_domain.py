"""Domain similarity: cosine between the target's centroid and each expert's (the paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.encoder import Encoder, cosine
from sam.selection.types import Ranking


def rank(texts: Sequence[str], names: Sequence[str], pool: Pool, encoder: Encoder, seed: int = 0) -> Ranking:
    """Rank experts ``names`` by the similarity of their training sentences to ``texts`` (unlabelled).

    Raises SamError if an expert's centroid comes from another encoder.
    """
    own = encoder.spec.identity
    for name in names:
        other = pool.cards[name].encoder
        if other != own:
            raise SamError(
                f"expert {name!r} has a centroid by encoder {other}, not {own}; "
                f"choose encoder={other.split(':')[0].split('@')[0]} as then, or train the expert with this one"
            )
    centroid = encoder.centroid(texts, seed=seed)
    return Ranking.by({name: round(cosine(centroid, pool.cards[name].centroid), 6) for name in names}, seeds=(seed,))
