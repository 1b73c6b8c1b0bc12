"""The README of an expert: its model card for people."""

from __future__ import annotations

from pathlib import Path

from sam.experts.card import Card


def write_readme(folder: Path, card: Card) -> None:
    """Write ``README.md`` from the card."""
    recipe = card.recipe
    rows = "\n".join(f"| {d} | {card.licences.get(d, 'not stated')} | {_score(card, d)} |" for d in card.datasets)
    kind = "The unified baseline" if card.role == "unified" else f"An expert of the domain {card.domain}"
    text = f"""---
base_model: {card.base}
library_name: peft
tags: [lora, named-entity-recognition, sam]
---
# {card.name}

{kind} for named entity recognition by SaM: a LoRA adapter (r={recipe["r"]}, alpha={recipe["alpha"]}, all linear
layers, bf16) on {card.base} (fingerprint {card.base_fingerprint[:12]}).

Trained on {card.sentences} sentences, {recipe["epochs"]} epoch(s), batch {recipe["batch_size"]}, learning rate
{recipe["lr"]}, seed {recipe["seed"]}; label dropping {recipe["label_drop"]}; precision {recipe["precision"]}.

| dataset | licence of the data | held-out F1 (n) |
| --- | --- | --- |
{rows}

Entity types: {", ".join(card.types)}.

Prompt (version {card.prompt_version}): `Entity types: a, b` newline `Text: <sentence>` newline `Entities:`; the answer
is a JSON object from type to texts. Load it with PEFT, or put the folder into a pool of SaM.

Limits: a small model on a small budget; English; it extracts flat mentions of the types named in the prompt, misses
many, and invents some. The data's licences (some non-commercial) may bear on what it is used for.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _score(card: Card, dataset: str) -> str:
    found = card.scores.get("datasets", {}).get(dataset)
    return f"{100 * found['f1']:.1f} ({found['n']})" if found else "not measured"
