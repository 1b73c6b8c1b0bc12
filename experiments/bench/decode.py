"""Generating the completions of 200 prompts with a merged model: each generator, loading the weights included.

The same prompts, weights and limit of tokens for all; the model is the shipped unified expert on its warm start. The
sentences are mixed from CrossNER and MIT where those corpora can be read, else from the mini benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments import bootstrap
from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined, measured
from experiments.comparison import counts_of
from sam.data.targets import load_targets
from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import Completion, Generator
from sam.generation.openvino import OpenVINOGenerator
from sam.generation.transformers import TransformersGenerator
from sam.launch import compose
from sam.merging import AdapterDeltas, Merge, linear, merge_modules
from sam.models.spec import BaseSpec
from sam.ner import grammar, parsing
from sam.ner.scoring import gold_pairs
from sam.types import Sentence

SENTENCES = 200
REAL = ("ai", "literature", "music", "politics", "science")
LIMIT = 160
"""The most new tokens of a completion."""
BATCH = 64
"""OpenVINO's sequences at a time."""
RATE = "sentences_per_s"
REFERENCE = "transformers fp32"

Asked = tuple[tuple[str, ...], Sentence]


def run(options: Options) -> Report:
    """A case per precision, free, and one with the grammar: OpenVINO beside transformers at several batch sizes."""
    config = compose("experts=shipped")
    asked, source = sample(24 if options.quick else SENTENCES)
    spec = BaseSpec.from_config(config["base"])
    adapter = AdapterDeltas.open(Pool(config["experts"]["path"]).folder("unified"))
    made: dict[str, list[Completion]] = {}
    sizes = (16,) if options.quick else (8, 16, 32)
    reports = []
    for precision in ("fp32", "bf16"):
        ours = OpenVINOGenerator(spec, "cpu", LIMIT, BATCH, precision)
        everyone = [_contestant(f"openvino {precision}", ours, adapter, asked, False, made, ours=True)]
        for size in sizes:
            peer = TransformersGenerator(spec, "cpu", LIMIT, size, precision)
            name = f"transformers {precision}" + (f" batch {size}" if size != 16 else "")
            everyone.append(_contestant(name, peer, adapter, asked, False, made))
        reports.append(compete(everyone, options.rounds, RATE, True, case=f"{precision}, {len(asked)} sentences"))
    ours = OpenVINOGenerator(spec, "cpu", LIMIT, BATCH, "auto")
    held = [
        _contestant("openvino constrained", ours, adapter, asked, True, made, ours=True),
        _contestant("openvino free", ours, adapter, asked, False, made),
    ]
    reports.append(compete(held, options.rounds, RATE, True, case=f"constrained, {len(asked)} sentences"))
    return joined(reports, {"sentences": source, **agreement(made, asked)})


def _contestant(
    name: str,
    generator: Generator,
    adapter: AdapterDeltas,
    asked: Sequence[Asked],
    constrained: bool,
    made: dict[str, list[Completion]],
    ours: bool = False,
) -> Contestant:
    requests = [grammar.request(types, s.text, constrained) for types, s in asked]

    def work() -> None:
        generator.load(merge_modules([adapter], ["unified"], Merge(linear)))
        done = dict(generator.generate(requests))
        made[name] = [done[i] for i in range(len(requests))]
        generator.close()

    return Contestant(name, _rated(work, len(asked)), ours)


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


def agreement(made: dict[str, list[Completion]], asked: Sequence[Asked]) -> dict[str, Any]:
    """Of each contestant: the share of completions equal to the reference's, micro F1 over the sentences, and, where
    not all are equal, its difference from the reference's F1 with the 95 % bootstrap interval over the sentences."""
    draws = bootstrap.resamples(len(asked), "decoding")
    counts = {name: _counts(found, asked) for name, found in made.items()}
    notes: dict[str, Any] = {}
    for name, found in made.items():
        same = sum(a.text == b.text for a, b in zip(found, made[REFERENCE], strict=True)) / len(asked)
        value, of_reference = bootstrap.f1(counts[name]), bootstrap.f1(counts[REFERENCE])
        spread = bootstrap.f1_of(counts[name], draws) - bootstrap.f1_of(counts[REFERENCE], draws)
        more = bootstrap.interval(value - of_reference, spread)
        notes[name] = f"{100 * same:.1f} % of completions as {REFERENCE}, F1 {100 * value:.1f}" + (
            f" ({100 * more.value:+.1f}, {100 * more.low:+.1f} to {100 * more.high:+.1f})" if same < 1 else ""
        )
    return notes


def _counts(made: Sequence[Completion], asked: Sequence[Asked]) -> bootstrap.Counts:
    return counts_of(
        (gold_pairs(s), set(parsing.predict(s.text, one.text, types, one.truncated).pairs))
        for one, (types, s) in zip(made, asked, strict=True)
    )


def _rated(work: Callable[[], None], sentences: int) -> Callable[[], Figures]:
    once = measured(work)

    def rated() -> Figures:
        figures = once()
        return {**figures, RATE: sentences / figures["seconds"]}

    return rated
