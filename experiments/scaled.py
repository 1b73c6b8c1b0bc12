"""A copy of an expert whose ΔW is multiplied by λ: ``python -m experiments.scaled EXPERT λ --out POOL/NAME``.

Between the base model (0) and the trained one (1) a model often forgets less than it loses (Wortsman et al., Robust
fine-tuning of zero-shot models, arXiv 2109.01903). Only the adapter's ``lora_alpha`` changes; the card says so, and has
no scores: ``python run.py target=heldout selector=named 'selector.experts=[NAME]'`` measures the copy.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sam.errors import SamError
from sam.experts.card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, Card
from sam.experts.modelcard import write_readme
from sam.merging import AdapterDeltas
from sam.paths import staged


def scaled(expert: Path, scale: float, out: Path) -> Card:
    """Write the copy into ``out``, a new folder; returns its card. Raises SamError if it cannot be made."""
    if not (scale > 0 and math.isfinite(scale)):
        raise SamError(f"λ={scale} must be a number above 0")
    if out.exists():
        raise SamError(f"{out} is there already; name another folder")
    card = Card.read(expert)
    AdapterDeltas.open(expert)  # refuses what is missing, damaged, or no plain LoRA
    config = json.loads((expert / CONFIG_FILE).read_text(encoding="utf-8"))
    config["lora_alpha"] *= scale
    # Without the recipe's hash: by no recipe can it be trained.
    recipe = {k: v for k, v in card.recipe.items() if k != "hash"} | {"alpha": config["lora_alpha"], "scaled": scale}
    card = replace(card, name=out.name, recipe=recipe, scores={"datasets": {}, "mean_f1": 0.0})
    with staged(out) as stage:
        shutil.copyfile(expert / WEIGHTS_FILE, stage / WEIGHTS_FILE)
        (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_readme(stage, card)
        card.write(stage)
    return card


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scaled", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("expert", type=Path, help=f"the expert's folder, with its {CARD_FILE}")
    parser.add_argument("scale", type=float, metavar="λ")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the copy, which is named as it")
    args = parser.parse_args(argv)
    try:
        scaled(args.expert, args.scale, args.out)
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
