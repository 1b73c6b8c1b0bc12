"""The selectors: from rankings to the selections that are merged, one a task model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sam.data.targets import Target
from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.encoder import Encoder
from sam.seeding import rng
from sam.selection import domain, oracle, sampling
from sam.selection.sampling import Ask
from sam.selection.types import Ranking, Selection
from sam.task import Task


@dataclass
class Query:
    """All that a selector sees; rankings are made when asked for, once."""

    target: Target
    pool: Pool
    names: Sequence[str]
    encoder: Encoder
    task: Task
    ask: Ask
    k: int
    sample_size: int
    seed: int
    experts: Sequence[str] = ()

    @cached_property
    def domain(self) -> Ranking:
        """By domain similarity."""
        return domain.rank(self.target.unlabelled, self.names, self.pool, self.encoder, self.seed)

    @cached_property
    def sampling(self) -> Ranking:
        """By sampling evaluation."""
        texts = self.target.unlabelled
        ids = sampling.draw(texts, self.sample_size, self.seed, self.target.name)
        if not ids:
            raise SamError(f"target {self.target.name} has no unlabelled sentence to sample; give at least one")
        return sampling.rank(texts, ids, self.names, self.ask, (self.seed, self.target.name))


def _sam(query: Query) -> dict[str, Selection]:
    return {**_domain(query), **_sampling(query)}


def _domain(query: Query) -> dict[str, Selection]:
    return {"domain": Selection.top("domain", query.domain, query.k)}


def _sampling(query: Query) -> dict[str, Selection]:
    return {"sampling": Selection.top("sampling", query.sampling, query.k)}


def _sameco(query: Query) -> dict[str, Selection]:
    """Our reading of SaMeco (the paper's section 4.4 names one model at one inference): mean of the two ranks.

    Equal experts of a ranking share a rank; equal means go to the better one by domain similarity.
    """
    by_domain, by_sampling = query.domain.ranks, query.sampling.ranks
    ranks = {name: (by_domain[name] + by_sampling[name]) / 2 for name in query.names}
    order = tuple(sorted(ranks, key=lambda name: (ranks[name], query.domain.experts.index(name))))
    details = {**query.sampling.details, "by": "mean rank"}
    details |= {"domain": query.domain.scores, "sampling": query.sampling.scores}
    ranking = Ranking(order, {name: -ranks[name] for name in order}, details)
    return {"sameco": Selection.top("sameco", ranking, query.k)}


def _drawn(query: Query, selector: str) -> Selection:
    drawn = rng(selector, query.seed, query.target.name).sample(sorted(query.names), query.k)
    return Selection(selector, tuple(drawn), {})


def _random(query: Query) -> dict[str, Selection]:
    return {"random": _drawn(query, "random")}


def _random_pair(query: Query) -> dict[str, Selection]:
    """The control for sam: two models as well, of experts drawn by chance; the first is that of random."""
    return {**_random(query), "random_second": _drawn(query, "random_pair")}


def _all(query: Query) -> dict[str, Selection]:
    return {"all": Selection("all", tuple(query.names), {})}


def _each(query: Query) -> dict[str, Selection]:
    return {name: Selection("each", (name,), {}) for name in query.names}


def _all_each(query: Query) -> dict[str, Selection]:
    return {**_all(query), **_each(query)}


def _none(query: Query) -> dict[str, Selection]:
    return {"none": Selection("none", (), {})}


def _named(query: Query) -> dict[str, Selection]:
    return {"named": Selection("named", tuple(query.experts), {})}


def _oracle(query: Query) -> dict[str, Selection]:
    ranking = oracle.rank(query.target.scored, query.names, query.ask, query.task, (query.seed, query.target.name))
    return {"oracle": Selection.top("oracle", ranking, query.k)}


@dataclass(frozen=True)
class Selector:
    """``choose`` names the task models and their experts; ``uses``: the fields of the query that it depends on beside
    the target's texts, and ``gold`` for the target's mentions."""

    choose: Callable[[Query], dict[str, Selection]]
    uses: frozenset[str]


_TOP = frozenset({"names", "k", "seed"})
_POOL = frozenset({"names"})

SELECTORS: dict[str, Selector] = {
    "sam": Selector(_sam, _TOP | {"encoder", "sample_size"}),
    "sameco": Selector(_sameco, _TOP | {"encoder", "sample_size"}),
    "domain": Selector(_domain, _TOP | {"encoder"}),
    "sampling": Selector(_sampling, _TOP | {"sample_size"}),
    "random": Selector(_random, _TOP),
    "random_pair": Selector(_random_pair, _TOP),
    "all": Selector(_all, _POOL),
    "each": Selector(_each, _POOL),
    "all_each": Selector(_all_each, _POOL),
    "named": Selector(_named, frozenset({"experts"})),
    "none": Selector(_none, frozenset()),
    "oracle": Selector(_oracle, _TOP | {"gold"}),
}


def selector_of(name: str) -> Selector:
    """The built-in selector ``name``."""
    if name not in SELECTORS:
        raise SamError(f"selector={name} is unknown; allowed: {', '.join(SELECTORS)}")
    return SELECTORS[name]


def check(
    name: str, selector: Selector, k: int, sample_size: int, names: Sequence[str], pool: Pool, experts: Sequence[str]
) -> None:
    """Refuse a selection that cannot be made, before anything is loaded."""
    if "k" in selector.uses and not (type(k) is int and 1 <= k <= len(names)):
        raise SamError(f"k={k} must be an integer in 1..{len(names)}, the size of the pool ({', '.join(names)})")
    if "sample_size" in selector.uses and not (type(sample_size) is int and sample_size >= 1):
        raise SamError(f"sample_size={sample_size} must be an integer of at least 1")
    if experts and "experts" not in selector.uses:
        raise SamError(f"selector={name} does not use selector.experts; choose selector=named or remove it")
    if "experts" in selector.uses:
        if not experts:
            raise SamError(f"selector={name} needs selector.experts=[…]; the pool holds: {', '.join(pool.cards)}")
        for expert in experts:
            pool.folder(expert)


def custom(
    target: str, function: Callable[..., object], options: Mapping[str, object], uses_k: bool, uses_gold: bool
) -> Selector:
    """A selector by a function that is not ours: of the query and of ``options``, it returns task model name -> the
    names of the experts to merge for it. Unless it ``uses_gold``, the query's target has no mentions."""

    def choose(query: Query) -> dict[str, Selection]:
        if not uses_gold and query.target.scored:
            blind = tuple(replace(s, mentions=None) for s in query.target.sentences)
            query = replace(query, target=replace(query.target, sentences=blind))
        chosen = function(query, **options)
        if not isinstance(chosen, Mapping) or not chosen:
            raise SamError(f"selector: {target} returned {chosen!r}; it must map task models to lists of experts")
        for model, experts in chosen.items():
            if isinstance(experts, str) or not set(experts) <= set(query.names):
                raise SamError(
                    f"selector: {target} chose {experts!r} for {model}; the pool holds: {', '.join(query.names)}"
                )
        return {str(model): Selection(target, tuple(experts), {}) for model, experts in chosen.items()}

    return Selector(choose, _POOL | ({"k"} if uses_k else set()) | ({"gold"} if uses_gold else set()))
