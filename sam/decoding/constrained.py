"""Holding greedy decoding to a language, given as an automaton over bytes: of the tokens that the automaton lets
through, the likeliest is taken.

The likeliest token of all is tried first, so that a model that writes the language by itself costs next to nothing;
only where it is refused are the allowed ones looked for, in the vocabulary and the automaton at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor

from sam.base import Base
from sam.errors import SamError


class Automaton(Protocol):
    """A language over bytes. States are immutable values."""

    start: Any

    def step(self, state: Any, byte: int) -> Any | None:
        """The state after ``byte``; None if it is refused."""

    def final(self, state: Any) -> bool:
        """Whether the text can end here."""


class _Node:
    """The tokens that begin with the same bytes: those that end there, and the nodes a byte further."""

    def __init__(self, low: int, high: int, depth: int) -> None:
        self.low, self.high, self.depth = low, high, depth
        self.tokens: list[int] = []
        self.children: dict[int, _Node] | None = None


class Vocabulary:
    """The bytes that each token writes, and a trie of them that grows where it is walked; special tokens write none."""

    def __init__(self, pieces: dict[int, bytes], stops: Collection[int]) -> None:
        self.pieces = {token: piece for token, piece in pieces.items() if piece and token not in stops}
        self.stops = frozenset(stops)
        order = sorted((piece, token) for token, piece in self.pieces.items())
        self._sorted, self._tokens = [piece for piece, _ in order], [token for _, token in order]
        self._root = _Node(0, len(order), 0)

    def step(self, automaton: Automaton, state: Any, token: int) -> Any | None:
        """The state after a token that is no stop token; None if it is refused."""
        piece = self.pieces.get(token)
        if piece is None:
            return None
        for byte in piece:
            state = automaton.step(state, byte)
            if state is None:
                return None
        return state

    def allowed(self, automaton: Automaton, state: Any) -> list[int]:
        """The tokens that ``automaton`` lets through in ``state``, ascending; stop tokens where it is final."""
        found = list(self.stops) if automaton.final(state) else []
        open_nodes = [(self._root, state)]
        while open_nodes:
            node, reached = open_nodes.pop()
            found += self._grown(node).tokens
            for byte, child in (node.children or {}).items():
                after = automaton.step(reached, byte)
                if after is not None:
                    open_nodes.append((child, after))
        return sorted(found)

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens write; half a character, as in an answer that was cut, becomes U+FFFD."""
        return b"".join(self.pieces.get(token, b"") for token in tokens).decode(errors="replace")

    def _grown(self, node: _Node) -> _Node:
        if node.children is None:
            # Whole before it is seen: another thread may come to the same node, and grows the same.
            tokens: list[int] = []
            children: dict[int, _Node] = {}
            low = node.low
            while low < node.high and len(self._sorted[low]) == node.depth:
                tokens.append(self._tokens[low])
                low += 1
            while low < node.high:
                byte = self._sorted[low][node.depth]
                following = self._sorted[low][: node.depth] + bytes([byte + 1]) if byte < 255 else None
                high = bisect_left(self._sorted, following, low, node.high) if following else node.high
                children[byte] = _Node(low, high, node.depth + 1)
                low = high
            node.tokens, node.children = tokens, children
        return node


class Walk:
    """Where one answer stands in its language."""

    def __init__(self, vocabulary: Vocabulary, automaton: Automaton) -> None:
        self._vocabulary, self._automaton = vocabulary, automaton
        self._state: Any = automaton.start

    def possible(self, draft: Sequence[int]) -> list[int]:
        """The guessed tokens up to the first that is refused, or that ends the answer."""
        state = self._state
        for count, token in enumerate(draft):
            if token in self._vocabulary.stops:
                return list(draft[: count + self._automaton.final(state)])
            state = self._vocabulary.step(self._automaton, state, token)
            if state is None:
                return list(draft[:count])
        return list(draft)

    def choose(self, draft: Sequence[int], likeliest: Sequence[int], logits: Tensor) -> list[int]:
        """The tokens that follow: those of ``draft`` that are right, and one more, unless the draft ended the answer.

        ``likeliest`` of all tokens and ``logits`` [1 + len(draft), vocabulary]: of the successor of each token fed.
        """
        chosen: list[int] = []
        for place, token in enumerate(likeliest):
            chosen.append(self._take(token, logits[place]))
            if chosen[-1] in self._vocabulary.stops or place == len(draft) or chosen[-1] != draft[place]:
                break
        return chosen

    def text(self, made: Sequence[int]) -> str:
        """What the tokens of the answer write, as the automaton read it: no tokenizer tidies it up."""
        return self._vocabulary.text(made)

    def _take(self, token: int, logits: Tensor) -> int:
        """``token`` if it is allowed, else the likeliest that is; steps over it."""
        state = self._step(token)
        if state is None:
            allowed = self._vocabulary.allowed(self._automaton, self._state)
            if not allowed:
                raise SamError(
                    "decode.constrained=true: the base model has no token for a character of a sentence or type; "
                    "take the character out, or use decode=fast"
                )
            token = allowed[int(logits[allowed].argmax())]
            state = self._step(token)
        self._state = state
        return token

    def _step(self, token: int) -> Any | None:
        if token in self._vocabulary.stops:
            return self._state if self._automaton.final(self._state) else None
        return self._vocabulary.step(self._automaton, self._state, token)


def walks(base: Base, automata: Sequence[Automaton]) -> list[Walk]:
    """One at the start of each automaton."""
    vocabulary = _vocabulary(base.tokenizer, base.stop_ids)
    return [Walk(vocabulary, automaton) for automaton in automata]


@lru_cache(maxsize=1)  # seconds for the largest vocabularies; one base model is at work at a time
def _vocabulary(tokenizer: Any, stops: tuple[int, ...]) -> Vocabulary:
    """Raises SamError for a tokenizer that is neither byte-level (GPT-2) nor of sentencepiece's form."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    form = decoder.__getstate__().decode() if decoder is not None else ""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    pieces = {token: piece for piece, token in tokenizer.get_vocab().items() if token not in special}
    if '"ByteLevel"' in form:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        return Vocabulary({token: _byte_level(piece, alphabet) for token, piece in pieces.items()}, stops)
    if "▁" in form:
        fallback = '"ByteFallback"' in form
        return Vocabulary({token: _sentencepiece(piece, fallback) for token, piece in pieces.items()}, stops)
    raise SamError(
        "decode.constrained=true reads vocabularies that are byte-level or sentencepiece's, and the base model's is "
        "neither; use decode=fast"
    )


def _byte_level(piece: str, alphabet: dict[str, int]) -> bytes:
    """The bytes of a byte-level piece; a token that was added stands there as plain text."""
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _sentencepiece(piece: str, fallback: bool) -> bytes:
    """The bytes of a piece in which ▁ is a space and, with ``fallback``, ``<0xE6>`` a byte."""
    if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
