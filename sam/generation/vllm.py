"""Completions on an NVIDIA GPU by vLLM: continuous batching, paged attention, prefix caching.

vLLM pins other versions of our dependencies, so it runs in a process of an environment of its own
(:mod:`sam.generation.vllm_worker`), which is given token ids and weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save
from torch import Tensor

from sam.console import say
from sam.errors import SamError
from sam.generation.api import Completion, Request, completion, dtype_of, encode
from sam.generation.checkpoint import Checkpoint
from sam.models.base import tokenizer_of
from sam.models.sources import folder
from sam.models.spec import BaseSpec

WORKER = Path(__file__).with_name("vllm_worker.py")
VERSIONS = """
from importlib.metadata import packages_distributions, version
packages = packages_distributions()
print(*(version(packages[name][0]) if name in packages else "-" for name in ("vllm", "torch")))
"""


class VLLMGenerator:
    """vLLM with the base model; a merge's weights replace the base's in place, one decoder layer after the other."""

    def __init__(
        self,
        spec: BaseSpec,
        device: str,
        max_new_tokens: int,
        batch_size: int,
        precision: str,
        memory: float = 0.9,
        python: str | None = None,
    ) -> None:
        """``precision``: ``fp32``, ``bf16``, or ``auto`` for the base model's own. ``memory``: the share of the
        device's memory that vLLM may take. ``python``: of the environment that has vLLM; None for this one."""
        if not 0 < memory <= 1:
            raise SamError(f"generator.memory={memory} must be above 0 and at most 1")
        self.spec, self.device, self.max_new_tokens = spec, torch.device(device).type, max_new_tokens
        self.batch_size, self.memory = batch_size, memory
        self.python = sys.executable if python is None else str(Path(python).expanduser())
        self.dtype = dtype_of(precision, spec.dtype)
        self._worker: _Worker | None = None
        self._checkpoint: Checkpoint | None = None
        self._tokenizer: Any = None
        self._stop_ids: tuple[int, ...] = ()

    def key(self) -> dict[str, Any]:
        """See :class:`~sam.generation.api.Generator`. A completion can depend on its batch, unless vLLM is told not
        to let it (VLLM_BATCH_INVARIANT=1)."""
        invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        return {
            "generator": "vllm",
            "dtype": self.dtype,
            "weights": self.spec.dtype,
            "device": self.device,
            **({} if invariant else {"batch_size": self.batch_size}),
            "max_new_tokens": self.max_new_tokens,
            "versions": list(_versions(self.python)),
        }

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        try:
            worker, checkpoint = self._started()
            worker.send("load")
            for weights in checkpoint.replaced(deltas):
                worker.hand_over(weights)
            worker.send("load", file=None)
            worker.reply()
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See :class:`~sam.generation.api.Generator`."""
        if self._worker is None:
            self.load(())
        worker = self._worker
        assert worker is not None
        prompts, grammars = encode(self._tokenizer, requests), [r.grammar for r in requests]
        asked = {"prompts": prompts, "grammars": grammars, "max_tokens": self.max_new_tokens, "stop": self._stop_ids}
        try:
            worker.send("generate", **asked)
            while "done" not in (made := worker.reply()):
                yield made["index"], completion(self._tokenizer, made["ids"], made["logprobs"], self._stop_ids)
        except GeneratorExit:
            if worker is self._worker:
                self._stop(worker)
            raise
        except BaseException:
            self.close()
            raise

    def _stop(self, worker: _Worker) -> None:
        """Have the worker give up what it is generating."""
        try:
            worker.send("stop")
            while "done" not in worker.reply():
                pass
        except SamError:
            self.close()

    def close(self) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._checkpoint = None

    def _started(self) -> tuple[_Worker, Checkpoint]:
        """The process with the base model's checkpoint in it, and what there is in the checkpoint."""
        if self._worker is None or self._checkpoint is None:
            vllm, _ = _versions(self.python)
            path = folder(self.spec)
            self._tokenizer, self._stop_ids = tokenizer_of(self.spec)
            self._checkpoint = Checkpoint(self.spec, self.dtype)
            say(f"Starting vLLM {vllm} with {self.spec.name}")
            self._worker = _Worker(self.python)
            self._worker.send("start", device=self.device, options=self._options(path))
            self._worker.reply()
        return self._worker, self._checkpoint

    def _options(self, path: Path) -> dict[str, Any]:
        """Those of vLLM's ``LLM``."""
        return {
            "model": str(path),
            "dtype": self.dtype,
            "max_model_len": -1,  # as long as the memory allows
            "max_num_seqs": self.batch_size,
            "gpu_memory_utilization": self.memory,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # not the model's own, which may hold penalties and the like
            "structured_outputs_config": {"backend": "xgrammar"},
        }


class _Worker:
    """The process that runs vLLM. ``close`` ends it, as does the end of this one."""

    def __init__(self, python: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = _popen([python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self.close = weakref.finalize(self, _end, self._process, self._log)

    def send(self, do: str, **message: Any) -> None:
        """Ask for something; there may be several replies."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **message}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def reply(self) -> dict[str, Any]:
        """The next reply. Raises SamError for one that is an error, and if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise SamError(f"generator=vllm: {message['error']}; where vLLM cannot do it, use generator=transformers")
        return message

    def hand_over(self, weights: dict[str, Tensor]) -> None:
        """Have weights loaded, by way of a file in anonymous memory."""
        descriptor = os.memfd_create("sam-weights")
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(save(weights))
            self.send("load", file=f"/proc/{os.getpid()}/fd/{descriptor}")
            self.reply()
        finally:
            os.close(descriptor)

    def _death(self) -> SamError:
        """The error that says what the process wrote last."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return SamError(f"generator=vllm: vLLM's process has ended ({self._process.returncode}): {last}")


def _popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **options)
    except OSError as error:
        raise SamError(
            f"generator.python={command[0]} cannot be run ({error.strerror}); name the python of an environment "
            "that has vLLM, such as venv/bin/python"
        ) from None


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """End the process, which does so by itself once its stdin is closed."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    log.close()


@lru_cache
def _versions(python: str) -> tuple[str, str]:
    """The versions of vLLM and torch in the environment of ``python``."""
    out, err = _popen([python, "-c", VERSIONS], stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    vllm, torch_version = out.decode().split() or ("-", "-")
    if vllm == "-":
        raise SamError(
            f"generator=vllm: {python} has no vLLM; make an environment for it (python -m venv vllm && "
            "vllm/bin/pip install vllm) and set generator.python=vllm/bin/python"
        )
    return vllm, torch_version
