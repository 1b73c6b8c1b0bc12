"""Completions by ``transformers``' ``generate``: any model on any device; the reference for other generators."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sam.errors import SamError
from sam.generation.api import Completion, Request, completion, dtype_of, encode
from sam.merging import MergedWeights
from sam.models.base import Base, load
from sam.models.spec import BaseSpec


class TransformersGenerator:
    """Left-padded batches of prompts of similar length; the merged weights replace the base model's in place."""

    def __init__(self, spec: BaseSpec, device: str, max_new_tokens: int, batch_size: int, precision: str) -> None:
        """``precision``: ``fp32``, ``bf16``, or ``auto`` for the base model's own."""
        self.spec, self.device = spec, device
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.dtype = dtype_of(precision, spec.dtype)
        self._base: Base | None = None
        self._weights: MergedWeights | None = None

    def key(self) -> dict[str, Any]:
        """See :class:`~sam.generation.api.Generator`. Padding changes roundings, so the batch size counts."""
        import transformers

        return {
            "generator": "transformers",
            "dtype": self.dtype,
            "weights": self.spec.dtype,
            "device": torch.device(self.device).type,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "versions": [torch.__version__.split("+")[0], transformers.__version__],
        }

    @property
    def base(self) -> Base:
        """The base model, loaded when it is first needed."""
        if self._base is None:
            self._base = load(self.spec, self.device)
            self._base.model.to(getattr(torch, self.dtype))
            # Not the model's own, which may hold penalties and the like; its stop tokens are read already.
            self._base.model.generation_config = GenerationConfig()
            self._weights = MergedWeights(self._base.model)
        return self._base

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        _ = self.base
        assert self._weights is not None
        self._weights.undo()
        self._weights.apply(deltas)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See :class:`~sam.generation.api.Generator`."""
        prompts = encode(self.base.tokenizer, requests)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            made = self._batch([prompts[i] for i in batch], [requests[i].grammar for i in batch])
            yield from zip(batch, made, strict=True)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]], grammars: Sequence[str | None]) -> list[Completion]:
        from transformers import LogitsProcessorList

        base, width, pad = self.base, max(map(len, prompts)), self.base.stop_ids[0]
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=base.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=base.device)
        record = _Recorder()
        held = [_Grammars(base, grammars, width)] if any(grammars) else []
        made = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(base.stop_ids),
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([*held, record]),
        )[:, width:].tolist()
        logprobs = torch.stack(record.logprobs, 1).tolist()
        return [
            completion(base.tokenizer, row, scores, base.stop_ids) for row, scores in zip(made, logprobs, strict=True)
        ]

    def close(self) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        self._base = self._weights = None


def check_grammars() -> None:
    """Raise SamError where the package that holds completions to a grammar is not installed."""
    if importlib.util.find_spec("xgrammar") is None:
        raise SamError(
            "decode.constrained=true with generator=transformers needs xgrammar; install it with: "
            "pip install 'sam-ner[grammar]', or use generator=openvino"
        )


class _Recorder:
    """Keeps the log-probability of the most likely token, which greedy decoding takes: one [batch] tensor per step."""

    def __init__(self) -> None:
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs.append(scores.float().log_softmax(-1).amax(-1).cpu())
        return scores


class _Grammars:
    """Masks the tokens that no sentence of a row's grammar goes on with."""

    def __init__(self, base: Base, grammars: Sequence[str | None], width: int) -> None:
        """``width``: length of the padded prompts."""
        import xgrammar

        self._xgrammar, self._width = xgrammar, width
        size = base.model.config.get_text_config().vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(
            base.tokenizer, vocab_size=size, stop_token_ids=list(base.stop_ids)
        )
        compiler = xgrammar.GrammarCompiler(info)
        self._matchers = [g and xgrammar.GrammarMatcher(compiler.compile_grammar(g)) for g in grammars]
        self._mask = xgrammar.allocate_token_bitmask(len(grammars), size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = []
        for row, matcher in enumerate(self._matchers):
            if not matcher or matcher.is_terminated():
                continue
            if input_ids.shape[1] > self._width:
                matcher.accept_token(int(input_ids[row, -1]))
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(self._mask, row)
                rows.append(row)
        if rows:
            self._xgrammar.apply_token_bitmask_inplace(scores, self._mask.to(scores.device), indices=rows)
        return scores
