"""Named entity recognition: all that knows what a mention is."""

from sam.ner.types import Mention, Pair, Prediction, Sentence, entity_types

__all__ = ["Mention", "Pair", "Prediction", "Sentence", "entity_types"]
