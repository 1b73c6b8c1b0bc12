"""Answers from a model: batched greedy decoding (``greedy.decode``), and the store that keeps them."""

from sam.decoding.spec import DecodeSpec
from sam.decoding.store import AnswerStore

__all__ = ["AnswerStore", "DecodeSpec"]
