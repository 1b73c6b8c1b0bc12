from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StructuredOutputsParams:
    grammar: str


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool
    structured_outputs: StructuredOutputsParams | None
