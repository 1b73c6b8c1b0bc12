"""Named entity recognition as a :class:`~sam.task.Task`."""

from __future__ import annotations

from sam.ner import grammar, parsing, prompts, scoring
from sam.ner.combine import combine
from sam.task import Task

NER = Task(
    version=prompts.PROMPT_VERSION,
    request=grammar.request,
    parse=parsing.predict,
    combine=combine,
    score=scoring.score,
)
