"""Greedy decoding: our engine against ``transformers`` ``generate`` at the best of its settings.

The same prompts, weights and limit of tokens for all; the model is the shipped unified expert, folded into the base.
The sentences are mixed from CrossNER and MIT where those corpora can be read, else from the mini benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from experiments import bootstrap
from experiments.bench.harness import Case, Contestant, Figures, Options, Report, compete, joined, measured
from experiments.comparison import counts_of
from sam import grammar, prompts
from sam.base import Base, BaseSpec, load
from sam.decoding import DecodeSpec
from sam.decoding.compiled import weights_of
from sam.decoding.greedy import Answer, decode_prompts
from sam.errors import SamError
from sam.experts.card import Pool
from sam.launch import compose
from sam.merging import AdapterDeltas, MergeSpec, merge_modules, merged
from sam.ner import Sentence
from sam.scoring import gold_pairs
from sam.targets import load_targets

SENTENCES = 200
REAL = ("ai", "literature", "music", "politics", "science")
LIMIT = 160
"""Most new tokens an answer."""
DTYPES = ("float32", "bfloat16")
SIZES = (8, 16, 32, 64)

SCOUTED = 64
HOPELESS = 0.5
"""Below this share of the others' best speed a dtype is not tried in more sizes."""
NEAR = 0.9
"""From this share of the best speed on, one round of scouting does not tell which setting is the best."""
RATE = "sentences_per_s"

Parts = Sequence[tuple[str, str]]
Work = Callable[[], list[Answer]]
Asked = tuple[tuple[str, ...], Sentence]


def run(options: Options) -> Report:
    """A scouting case with the peer's settings, then each of our modes against the best settings that it has to meet.

    ``exact`` meets fp32 ``generate`` at its best batch sizes, ``fast`` the best of all settings; ``constrained``, which
    asks for another answer, has ``fast`` beside it.
    """
    config = compose("experts=shipped")
    asked, source = sample(24 if options.quick else SENTENCES)
    base = load(BaseSpec.from_config(config["base"]), "auto")
    adapter = AdapterDeltas.open(Pool(config["experts"]["path"]).folder("unified"))
    answers: dict[str, list[Answer]] = {}

    def modules() -> Iterator[tuple[str, torch.Tensor]]:
        return merge_modules([adapter], ["unified"], MergeSpec("linear"))

    parts = [(prompts.prefix(types), prompts.suffix(s.text)) for types, s in asked]
    models = _copies(base, modules)
    count = 8 if options.quick else SCOUTED  # which the sizes divide
    few = parts[:: max(1, len(parts) // count)][:count]
    sizes = SIZES[1:2] if options.quick else SIZES
    settings = {_name(dtype, size): (dtype, size) for dtype in DTYPES for size in sizes}
    timed: dict[str, list[Figures]] = {}

    def rate(name: str) -> float:
        dtype, size = settings[name]
        peer = Contestant(name, _rated(_peer(base, models[dtype], few, size), len(few)))
        timed.update(compete([peer], 1, RATE, True, case="scouting").cases[0].rounds)
        return timed[name][0][RATE]

    scout(rate, sizes)
    case = Case(f"scouting, {len(few)} sentences", RATE, True, timed, None)
    rates = {name: case.medians(name)[RATE] for name in timed}
    reports = [Report((case,))]
    for mode, dtypes in {"exact": DTYPES[:1], "fast": DTYPES}.items():
        ours = _keeping(_ours(base, mode, parts, modules), answers, f"sam {mode}")
        everyone = [Contestant(f"sam {mode}", _rated(ours, len(parts)), ours=True)]
        for name in near({name: value for name, value in rates.items() if settings[name][0] in dtypes}):
            dtype, size = settings[name]
            peer = _keeping(_peer(base, models[dtype], parts, size), answers, name)
            everyone.append(Contestant(name, _rated(peer, len(parts))))
        reports.append(compete(everyone, options.rounds, RATE, True, case=f"{mode}, {len(parts)} sentences"))
    held = [
        Contestant(name, _rated(_keeping(work, answers, name), len(parts)), ours=name == "sam constrained")
        for name, work in {
            "sam constrained": _ours(base, "fast", parts, modules, asked),
            "sam fast": _ours(base, "fast", parts, modules),
        }.items()
    ]
    reports.append(compete(held, options.rounds, RATE, True, case=f"constrained, {len(parts)} sentences"))
    left = {"not tried, as far behind": ", ".join(name for name in settings if name not in timed)}
    return joined(
        reports, {"sentences": source, **(left if len(timed) < len(settings) else {}), **agreement(answers, asked)}
    )


def scout(rate: Callable[[str], float], sizes: Sequence[int]) -> None:
    """Try the peer's settings, all but the other sizes of a dtype that is far behind at the best size so far."""
    rates: dict[int, float] = {}  # the best of each size
    for dtype in DTYPES:
        fastest = max(rates.values(), default=0.0)
        first, *others = sorted(sizes, key=lambda size: rates.get(size, 0.0) < fastest)
        found = rate(_name(dtype, first))
        if found < HOPELESS * fastest:
            continue
        for size, value in [(first, found), *((size, rate(_name(dtype, size))) for size in others)]:
            rates[size] = max(rates.get(size, 0.0), value)


def near(rates: dict[str, float]) -> list[str]:
    """The fastest and those that may be as fast, the fastest first."""
    ranked = sorted(rates, key=lambda name: -rates[name])
    return [name for name in ranked if rates[name] >= NEAR * rates[ranked[0]]]


def _name(dtype: str, size: int) -> str:
    return f"generate {dtype} batch {size}"


def sample(count: int) -> tuple[list[Asked], str]:
    """``count`` (types, sentence), in equal shares of the seven real targets, or of the mini ones; and which."""
    names = [f"crossner_{n}" for n in REAL] + ["mit_movie", "mit_restaurant"]
    share = -(-count // len(names))
    try:
        targets = load_targets(compose(f"target=[{','.join(names)}]")["target"], share)
        source = "CrossNER and MIT, test"
    except SamError:
        targets = load_targets(compose("target=mini")["target"], share)
        source = "mini benchmark"
    return [(t.types, s) for t in targets for s in t.sentences][:count], source


def agreement(answers: dict[str, list[Answer]], asked: Sequence[Asked]) -> dict[str, Any]:
    """Of each contestant: the share of answers that equal fp32 ``generate``'s, micro F1 over the sentences, and, where
    not all are equal, that minus the F1 of fp32 ``generate``, with its 95 % bootstrap interval over the sentences."""
    reference = next(name for name in answers if name.startswith("generate float32"))
    draws = bootstrap.resamples(len(asked), "decoding")
    counts = {name: _counts(found, asked) for name, found in answers.items()}
    notes: dict[str, Any] = {}
    for name, found in answers.items():
        same = sum(a.text == b.text for a, b in zip(found, answers[reference], strict=True)) / len(asked)
        value, of_reference = bootstrap.f1(counts[name]), bootstrap.f1(counts[reference])
        spread = bootstrap.f1_of(counts[name], draws) - bootstrap.f1_of(counts[reference], draws)
        more = bootstrap.interval(value - of_reference, spread)
        notes[name] = f"{100 * same:.1f} % of answers as fp32 generate, F1 {100 * value:.1f}" + (
            f" ({100 * more.value:+.1f}, {100 * more.low:+.1f} to {100 * more.high:+.1f})" if same < 1 else ""
        )
    return notes


def _counts(answers: Sequence[Answer], asked: Sequence[Asked]) -> bootstrap.Counts:
    return counts_of(
        (gold_pairs(s), set(prompts.predict(s.text, answer.text, types, answer.truncated).pairs))
        for answer, (types, s) in zip(answers, asked, strict=True)
    )


def _ours(base: Base, mode: str, parts: Parts, modules: Callable[[], Any], held: Sequence[Asked] | None = None) -> Work:
    """``held``: what is asked, where only answers to it can be written (``decode=constrained``)."""
    weights = weights_of(base, mode, constrained=held is not None)
    spec = DecodeSpec(max_new_tokens=LIMIT, mode=mode, constrained=held is not None)

    def work() -> list[Answer]:
        with weights:
            weights.apply(modules())
            automata = grammar.automata((types, s.text) for types, s in held) if held else None
            return decode_prompts(base, parts, spec, automata=automata)

    return work


def _copies(base: Base, modules: Callable[[], Any]) -> dict[str, Any]:
    """The merged model for the peer, in each dtype."""
    with merged(base.model, modules()):
        state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    models = {}
    for dtype in DTYPES:
        model = type(base.model)(base.model.config).to(getattr(torch, dtype))
        model.load_state_dict(state)
        model.generation_config = base.model.generation_config
        models[dtype] = model.eval().to(base.device)
    return models


def _peer(base: Base, model: Any, parts: Parts, size: int) -> Work:
    """Batches of ``size`` sentences of similar length."""

    def work() -> list[Answer]:
        rows = [
            base.tokenizer(prefix).input_ids + base.tokenizer(suffix, add_special_tokens=False).input_ids
            for prefix, suffix in parts
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        out: dict[int, Answer] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            out.update(zip(chosen, _generate(base, model, [rows[i] for i in chosen]), strict=True))
        return [out[i] for i in range(len(rows))]

    return work


def _keeping(work: Work, answers: dict[str, list[Answer]], name: str) -> Work:
    def kept() -> list[Answer]:
        answers[name] = work()
        return answers[name]

    return kept


def _generate(base: Base, model: Any, rows: list[list[int]]) -> list[Answer]:
    """One left-padded batch."""
    width, pad = max(map(len, rows)), base.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=base.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=base.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=list(base.stop_ids),
        pad_token_id=pad,
    )[:, width:].tolist()
    answers = []
    for made in out:
        end = next((n for n, token in enumerate(made) if token in base.stop_ids), None)
        answers.append(Answer(base.tokenizer.decode(made[:end], skip_special_tokens=True), end is None))
    return answers


def _rated(work: Work, sentences: int) -> Callable[[], Figures]:
    once = measured(work)

    def rated() -> Figures:
        figures = once()
        return {**figures, RATE: sentences / figures["seconds"]}

    return rated
