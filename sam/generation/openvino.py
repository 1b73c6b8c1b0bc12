"""Completions on a CPU by OpenVINO GenAI: continuous batching, paged attention and prefix caching."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam.errors import SamError
from sam.generation import openvino_ir
from sam.generation.api import Completion, Request, check_precision, completion, encode
from sam.merging import AdapterDeltas
from sam.models.base import config_of, tokenizer_of
from sam.models.device import multiplies_bf16, threads
from sam.models.spec import BaseSpec

BLOCK = 32
"""Tokens of a block of keys and values on a CPU. Of a block that is not full, GenAI 2026.4 reuses wrong values."""
TOKENS = 1024
"""The most prompt tokens in one forward pass."""


class OpenVINOGenerator:
    """The IR of the base model with the weights of one merged model at a time.

    The merged weights file is anonymous memory (``memfd``), which the system frees however the process ends; a process
    that is killed leaves a temporary folder of links.
    """

    def __init__(self, spec: BaseSpec, device: str, max_new_tokens: int, batch_size: int, precision: str) -> None:
        """``precision``: ``fp32``, ``bf16``, or ``auto``: bf16 where the processor has it, else fp32."""
        check_precision(precision)
        if torch.device(device).type != "cpu":
            raise SamError("generator=openvino runs on a CPU; choose trainer=cpu, or another generator")
        self.spec, self.max_new_tokens, self.batch_size = spec, max_new_tokens, batch_size
        auto = "bf16" if multiplies_bf16() else "f32"
        self.precision = {"auto": auto, "fp32": "f32", "bf16": "bf16"}[precision]
        self._tokenizer: Any = None
        self._stop_ids: tuple[int, ...] = ()
        self._window: int | None = None
        self._pipeline: Any = None
        self._merged: _Merged | None = None

    def key(self) -> dict[str, Any]:
        """See :class:`~sam.generation.api.Generator`. In bf16 a completion can depend on its batch."""
        batch = {} if self.precision == "f32" else {"batch_size": self.batch_size}
        return {
            "generator": "openvino",
            "precision": self.precision,
            "weights": self.spec.dtype,
            **batch,
            "max_new_tokens": self.max_new_tokens,
            "ir": openvino_ir.IR_VERSION,
            "versions": [version("openvino-genai")],
        }

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        self._pipeline = None  # before its weights are overwritten
        if self._merged is None:
            self._tokenizer, self._stop_ids = tokenizer_of(self.spec)
            config = config_of(self.spec).get_text_config()
            self._window = openvino_ir.sliding_window(config)
            self._merged = _Merged(self.spec, tied=bool(config.tie_word_embeddings))
        try:
            self._merged.write(deltas)
            self._compiled()
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See :class:`~sam.generation.api.Generator`."""
        if self._merged is None:
            self.load(())
        # A prefix of several requests is computed before they are: side by side none of them would find it computed.
        counts = Counter(r.prefix for r in requests)
        shared = [list(self._tokenizer(prefix).input_ids) for prefix, count in counts.items() if count > 1]
        whole = [ids[: len(ids) // BLOCK * BLOCK] for ids in shared]
        for _ in self._run([(ids, self._config(None, 1)) for ids in whole if ids]):
            pass
        prompts = encode(self._tokenizer, requests)
        self._check_lengths(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the last to end are short
        asked = [(prompts[i], self._config(requests[i].grammar, self.max_new_tokens)) for i in order]
        for number, ids, logprobs in self._run(asked):
            yield order[number], completion(self._tokenizer, ids, logprobs, self._stop_ids)

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        """GenAI attends to all that came before: the same only within a sliding window."""
        window = self._window
        longest = max(map(len, prompts), default=0) + self.max_new_tokens
        if window is not None and longest > window:
            raise SamError(
                f"a prompt and its completion can take {longest} tokens, more than base={self.spec.name}'s sliding "
                f"window of {window}, which generator=openvino does not have; use generator=transformers"
            )

    def close(self) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        self._pipeline = None
        if self._merged is not None:
            self._merged.close()
            self._merged = None

    def _compiled(self) -> Any:
        """The pipeline of the weights as they are now."""
        if self._pipeline is None:
            import openvino_genai

            assert self._merged is not None
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.cache_size = 0  # grows as it is needed
            scheduler.enable_prefix_caching = True
            scheduler.max_num_seqs = self.batch_size
            scheduler.max_num_batched_tokens = TOKENS
            settings = {
                "INFERENCE_PRECISION_HINT": self.precision,
                "KV_CACHE_PRECISION": self.precision,
                "INFERENCE_NUM_THREADS": threads(),
                "ENABLE_CPU_PINNING": False,
            }
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                str(self._merged.folder), scheduler, "CPU", settings
            )
        return self._pipeline

    def _config(self, grammar: str | None, max_new_tokens: int) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.apply_chat_template = max_new_tokens, False, False
        config.eos_token_id, config.stop_token_ids = self._stop_ids[0], set(self._stop_ids)
        config.logprobs = 1
        if grammar is not None:
            config.structured_output_config = openvino_genai.StructuredOutputConfig(grammar=grammar)
        return config

    def _run(self, asked: Sequence[tuple[list[int], Any]]) -> Iterator[tuple[int, list[int], list[float]]]:
        """(index, token ids, their log-probabilities) of each (prompt, config) as it is done."""
        import openvino
        from openvino_genai.py_openvino_genai import GenerationStatus

        pipeline, waiting = self._compiled(), list(enumerate(asked))[::-1]
        running: dict[int, Any] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.batch_size:
                    number, (ids, config) = waiting.pop()
                    tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
                    running[number] = pipeline.add_request(number, tensor, config)
                pipeline.step()
                for number, handle in list(running.items()):
                    status = handle.get_status()
                    if status == GenerationStatus.RUNNING:
                        continue
                    del running[number]
                    if status != GenerationStatus.FINISHED:
                        raise SamError(
                            f"OpenVINO GenAI gave up a prompt of {len(asked[number][0])} tokens ({status.name}); it "
                            "may need more memory: lower generator.batch_size"
                        )
                    (output,) = handle.read_all()
                    yield number, list(output.generated_ids), list(output.generated_log_probs)
        except BaseException:
            self._pipeline = None  # with the requests that still run in it
            raise


class _Merged:
    """The folder that a pipeline is compiled from: the base's IR, and its weights file with merged weights in it."""

    def __init__(self, spec: BaseSpec, tied: bool) -> None:
        """``tied``: input and output embeddings are one weight."""
        source = openvino_ir.converted(spec)
        self._weights = openvino_ir.weights(source / openvino_ir.MODEL)
        # Never written to, but torch warns of what is not writable.
        self._base = np.memmap(source / openvino_ir.WEIGHTS, dtype=np.uint8, mode="c")
        self._fold = None if spec.fold is None else AdapterDeltas.open(Path(spec.fold).expanduser())
        self._changed: set[str] = set()
        self._places = Counter(weight.offset for weight in self._weights.values())
        self._shared = {"model.embed_tokens", "lm_head"} if tied else set()
        descriptor = os.memfd_create("sam-weights")
        self.folder = Path(tempfile.mkdtemp(prefix="sam-openvino-"))
        self.close = weakref.finalize(self, _free, descriptor, self.folder)  # at the end of the process at the latest
        try:
            os.ftruncate(descriptor, len(self._base))
            self._data = mmap.mmap(descriptor, len(self._base))
            np.frombuffer(self._data, dtype=np.uint8)[:] = self._base
            for file in source.iterdir():
                if file.name != openvino_ir.WEIGHTS:
                    (self.folder / file.name).symlink_to(file)
            (self.folder / openvino_ir.WEIGHTS).symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
            for name in self._fold or ():
                self._set(name, None)
        except BaseException:
            self.close()
            raise

    def write(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """Make the weights those of the base model plus ``deltas``."""
        before, self._changed = self._changed, set()
        for name, delta in deltas:
            if name in self._changed:
                raise SamError(f"module {name!r} comes twice in one merge; give one delta a module")
            self._changed.add(name)
            self._set(name, delta)
            del delta  # before the next is made
        for name in before - self._changed:
            self._set(name, None)

    def _set(self, name: str, delta: Tensor | None) -> None:
        """The base's weight plus the warm start's delta, rounded, plus ``delta``, rounded."""
        weight = self._weights.get(name)
        if name in self._shared:
            raise SamError(
                f"module {name!r} shares its weight with {', '.join(self._shared - {name})}, which the delta would "
                "change too; train the expert without it"
            )
        if weight is None:
            raise SamError(f"the base model has no module {name!r}; the expert was trained on another base model")
        if self._places[weight.offset] > 1:
            raise SamError(
                f"module {name!r} has the same weight as another one of the base model, which OpenVINO keeps once; use "
                "generator=transformers"
            )
        merged = weight.view(self._base).float()
        for part in (self._fold[name] if self._fold is not None and name in self._fold else None, delta):
            if part is not None:
                if part.shape != merged.shape:
                    raise SamError(
                        f"the delta of {name!r} has shape {list(part.shape)}, the base model's weight "
                        f"{list(merged.shape)}; the expert was trained on another base model"
                    )
                merged = (merged + part).to(weight.dtype).float()
        weight.view(np.frombuffer(self._data, dtype=np.uint8)).copy_(merged)


def _free(descriptor: int, folder: Path) -> None:
    """Give up the weights' memory (freed with the last view of it) and delete the folder."""
    os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
