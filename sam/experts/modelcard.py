"""The README of an expert: its model card for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam.experts.card import HELDOUT_CHARACTERS, Card
from sam.experts.training.recipe import MEASURES

CURVE = 8
"""The most points of the loss curve that are shown; the card has all."""

FORM = 'from text to type, a space before either, `{" Ada":" person"}`'


def write_readme(folder: Path, card: Card) -> None:
    """Write ``README.md`` from the card."""
    recipe = card.recipe
    training = card.training
    rows = "\n".join(f"| {d} | {card.licences.get(d, 'not stated')} | {_scores(card, d)} |" for d in card.datasets)
    kind = {
        "expert": f"An expert of the domain {card.domain}",
        "unified": "The unified baseline",
        "start": "The common start, which is baked into the base model before experts are trained,",
    }[card.role]
    stated = ", ".join(f"`{k}={v}`" for k, v in recipe.items() if k not in ("hash", "precision", *MEASURES))
    text = f"""---
base_model: {card.base}
library_name: peft
tags: [lora, named-entity-recognition, sam]
---
# {card.name}

{kind} for named entity recognition by SaM: a LoRA adapter (r={recipe["r"]}, alpha={recipe["alpha"]}, all linear
layers) on {card.base} (fingerprint {card.base_fingerprint[:12]}). {training["parameters"]:,} parameters, in bf16
{2 * training["parameters"] / 1e6:.1f} MB; the paper's estimate, 18HrL, would be {training["18HrL"]:,}.

Trained on {card.sentences} sentences with precision {recipe["precision"]}: {training["steps"]} steps in
{training["seconds"]:.0f} s on {training["device"]}. The recipe (`conf/train`; `sentences` a domain): {stated}.
{_curve(training["curve"])}
Held out: sentences of at most {HELDOUT_CHARACTERS} characters whose text is not among those trained on, asked for all
types of their dataset; `expert.json` has span F1 and more.{_mean(card)}

| dataset | licence of the data | held out | P | R | F1 | unparsable | cut off |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
{rows}

{_open(card)}Entity types: {", ".join(card.types)}.

Prompt (version {card.prompt_version}): `Entity types: a, b` newline `Text: <sentence>` newline `Entities:`; the
completion is a JSON object {FORM}. Put the folder into a pool of SaM, or load it with PEFT alone{_warm_start(card)}.

Limits: a small model on a small budget; English; it extracts flat mentions of the types named in the prompt, misses
many, and invents some. The data's licences (some non-commercial) may bear on what it is used for.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _curve(points: Sequence[Sequence[float]]) -> str:
    """Some of the (step, loss), evenly spaced, the first and the last among them; nothing of no points."""
    if not points:
        return ""
    last = len(points) - 1
    shown = [points[i] for i in sorted({round(i * last / (CURVE - 1)) for i in range(CURVE)})]
    steps, losses = ([format(point[i], form) for point in shown] for i, form in ((0, "d"), (1, ".2f")))
    rule = "| --- |" + " ---: |" * len(shown)
    return f"\n| step | {' | '.join(steps)} |\n{rule}\n| loss | {' | '.join(losses)} |\n"


def _open(card: Card) -> str:
    """A table of the scores on the held-out open types; nothing if there are none."""
    scores = card.scores.get("open") or {}
    if not scores:
        return ""
    rows = [
        f"| open_types/{split} | {s['n']} | " + " | ".join(f"{100 * s[m]:.1f}" for m in ("precision", "recall", "f1"))
        for split, s in scores.items()
    ]
    head = "| held-out open types | n | P | R | F1 |\n| --- | ---: | ---: | ---: | ---: |\n"
    return head + "\n".join(f"{row} |" for row in rows) + "\n\n"


def _mean(card: Card) -> str:
    return f" Mean F1 {100 * card.scores['mean_f1']:.1f}." if card.scores.get("datasets") else ""


def _warm_start(card: Card) -> str:
    if card.base_fold is None:
        return ""
    return f"""; before it, the adapter
`start` of its pool (content hash {card.base_fold[:12]}) is merged into the base model (`merge_and_unload`)"""


def _scores(card: Card, dataset: str) -> str:
    scores = card.scores.get("datasets", {}).get(dataset)
    if scores is None:
        return "not measured | – | – | – | – | –"
    three = " | ".join(f"{100 * scores[m]:.1f}" for m in ("precision", "recall", "f1"))
    return f"{scores['n']} of {scores['split']} | {three} | {scores['unparsable']} | {scores['truncated']}"
