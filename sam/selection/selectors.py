"""The selectors: each a function of a query, which ``conf/selector/NAME.yaml`` names by ``_target_``.

A selector maps the names of task models to the experts that are merged for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sam.seeding import rng
from sam.selection import by_gold
from sam.selection.query import Query
from sam.selection.selector import uses
from sam.selection.types import Ranking, Selection


@uses("names", "k", "seed", "encoder", "sample_size")
def sam(query: Query) -> dict[str, Selection]:
    """The paper's: one model by domain similarity and one by sampling evaluation."""
    return {**domain(query), **sampling(query)}


@uses("names", "k", "seed", "encoder")
def domain(query: Query) -> dict[str, Selection]:
    """The first k by domain similarity."""
    return {"domain": Selection.top("domain", query.domain, query.k)}


@uses("names", "k", "seed", "sample_size")
def sampling(query: Query) -> dict[str, Selection]:
    """The first k by sampling evaluation."""
    return {"sampling": Selection.top("sampling", query.sampling, query.k)}


@uses("names", "k", "seed", "encoder", "sample_size")
def sameco(query: Query) -> dict[str, Selection]:
    """Our reading of SaMeco (the paper's section 4.4 names one model at one inference): mean of the two ranks.

    Equal experts of a ranking share a rank; equal means go to the better one by domain similarity.
    """
    first, second = query.domain.ranks, query.sampling.ranks
    ranks = {name: (first[name] + second[name]) / 2 for name in query.names}
    order = tuple(sorted(ranks, key=lambda name: (ranks[name], query.domain.experts.index(name))))
    details = {**query.sampling.details, "by": "mean rank"}
    details |= {"domain": query.domain.scores, "sampling": query.sampling.scores}
    ranking = Ranking(order, {name: -ranks[name] for name in order}, details)
    return {"sameco": Selection.top("sameco", ranking, query.k)}


@uses("names", "k", "seed")
def random(query: Query) -> dict[str, Selection]:
    """k experts drawn by seed and target."""
    return {"random": _drawn(query, "random")}


@uses("names", "k", "seed")
def random_pair(query: Query) -> dict[str, Selection]:
    """What sam is to be compared with: two models as well, of experts drawn by chance; the first is that of random."""
    return {**random(query), "random_second": _drawn(query, "random_pair")}


def _drawn(query: Query, selector: str) -> Selection:
    drawn = rng(selector, query.seed, query.target.name).sample(sorted(query.names), query.k)
    return Selection(selector, tuple(drawn), {})


@uses("names")
def all(query: Query) -> dict[str, Selection]:
    """The whole pool in one model."""
    return {"all": Selection("all", tuple(query.names), {})}


@uses("names")
def each(query: Query) -> dict[str, Selection]:
    """One model per expert."""
    return {name: Selection("each", (name,), {}) for name in query.names}


@uses("names")
def all_each(query: Query) -> dict[str, Selection]:
    """The whole pool in one model, and one model per expert."""
    return {**all(query), **each(query)}


@uses()
def none(query: Query) -> dict[str, Selection]:
    """The base model with its warm start, and no expert."""
    return {"none": Selection("none", (), {})}


@uses()
def named(query: Query, experts: str | Sequence[str]) -> dict[str, Selection]:
    """The given experts in one model."""
    return {"named": Selection("named", (experts,) if isinstance(experts, str) else tuple(experts), {})}


@uses("names", "k", "seed", "gold")
def oracle(query: Query) -> dict[str, Selection]:
    """The first k by F1 on the target's gold labels: an upper reference for analysis, not a method."""
    ranking = by_gold.rank(query.target.scored, query.names, query.ask, query.task, (query.seed, query.target.name))
    return {"oracle": Selection.top("oracle", ranking, query.k)}
