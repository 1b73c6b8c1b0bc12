"""Sentences as prompts and target completions, in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sam.experts.training.batch import Batch, Example
from sam.experts.training.detokenise import detokenised
from sam.experts.training.recipe import Recipe
from sam.ner import prompts
from sam.seeding import rng
from sam.types import Sentence


class Renderer:
    """Sentences to batches with a tokenizer; parts of a prompt are tokenised apart, as generators do."""

    def __init__(self, tokenizer: Any, stop_id: int, recipe: Recipe) -> None:
        self.tokenizer, self.stop_id, self.recipe = tokenizer, stop_id, recipe

    def __call__(
        self, sentences: Sequence[Sentence], types: Sequence[str], epoch: int, foreign: Sequence[str] = ()
    ) -> Batch:
        """The batch of ``sentences`` with the types shuffled, some dropped, some of ``foreign`` added, all drawn by
        (seed, id of the first, epoch)."""
        draw = rng(self.recipe.seed, sentences[0].id, epoch)
        shuffled = draw.sample(list(types), len(types))
        kept = [t for t in shuffled if draw.random() >= self.recipe.label_drop][: self.recipe.max_types]
        asked = kept or shuffled[:1]
        added = draw.sample(list(foreign), min(draw.randint(0, self.recipe.negatives), len(foreign)))
        if added:
            asked = (asked + added)[: self.recipe.max_types]
            draw.shuffle(asked)
        shown = [detokenised(s) if draw.random() < self.recipe.detokenise else s for s in sentences]
        prefix = self._ids(prompts.prefix(asked), special=True)
        return Batch(tuple(prefix), tuple(self.example(s, asked) for s in shown))

    def open_batch(self, sentences: Sequence[Sentence], epoch: int) -> Batch:
        """Sentences that are each asked for their own types, shuffled by (seed, id, epoch): no part is shared."""
        examples = []
        for sentence in sentences:
            types = sentence.types or ()
            asked = rng(self.recipe.seed, sentence.id, epoch).sample(types, len(types))
            example = self.example(sentence, asked)
            prefix = self._ids(prompts.prefix(asked), special=True)
            examples.append(Example((*prefix, *example.ids), example.completion))
        return Batch((), tuple(examples))

    def example(self, sentence: Sentence, asked: Sequence[str]) -> Example:
        """The sentence and its target completion where the types ``asked`` are asked for."""
        completion = self._ids(prompts.answer(sentence, asked)) + [self.stop_id]
        return Example(tuple(self._ids(prompts.suffix(sentence.text)) + completion), len(completion))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)
