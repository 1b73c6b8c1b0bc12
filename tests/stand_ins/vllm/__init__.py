"""What of vLLM's API the worker uses, with transformers underneath: a request a step, in reverse order.

As vLLM it prints, keeps what it has computed until ``reset_prefix_cache``, and holds q, k and v in one tensor, which
must be loaded whole. A grammar is "obeyed" by writing it. ``STAND_IN_DIES`` in the environment: it ends in a step. The
libraries, which take seconds, are imported when they are needed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


class LLM:
    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        assert options["generation_config"] == "vllm" and 0 < options["gpu_memory_utilization"] <= 1
        self.folder, self.dtype = Path(model), dtype
        architectures = json.loads((self.folder / "config.json").read_text())["architectures"]
        if architectures != ["LlamaForCausalLM"]:
            raise ValueError(f"Model architectures {architectures}\nare not supported")
        self.llm_engine = self
        self.count = 0
        self.waiting: list[tuple[str, list[int], SamplingParams]] = []
        self.computed: dict[str, Any] = {}

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import LlamaForCausalLM

        print("Loading", self.folder)
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype))

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def enqueue(self, prompts: Sequence[Any], params: Sequence[SamplingParams], use_tqdm: bool = True) -> list[str]:
        ids = []
        for prompt, sampling in zip(prompts, params, strict=True):
            self.count += 1
            self.waiting.append((str(self.count), prompt["prompt_token_ids"], sampling))
            ids.append(f"{self.count}-1a2b3c4d")
        return ids

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, ids: Sequence[str]) -> None:
        self.waiting = [one for one in self.waiting if one[0] not in ids]

    def step(self) -> list[Any]:
        print("Processed prompts")
        if "STAND_IN_DIES" in os.environ:
            print("torch.OutOfMemoryError: CUDA out of memory", file=sys.stderr)
            os._exit(3)
        number, prompt, sampling = self.waiting.pop()
        key = str((prompt, sampling))
        if key not in self.computed:
            self.computed[key] = self._continued(prompt, sampling)
        return [SimpleNamespace(request_id=number, finished=True, outputs=[self.computed[key]])]

    def _continued(self, prompt: list[int], sampling: SamplingParams) -> Any:
        import torch

        assert sampling.temperature == 0 and sampling.logprobs == 0 and sampling.ignore_eos
        if sampling.structured_outputs is not None:
            ids = self.tokenizer(sampling.structured_outputs.grammar).input_ids[: sampling.max_tokens]
            return _output(ids, [0.0] * len(ids))
        made = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=sampling.stop_token_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = made.sequences[0, len(prompt) :].tolist()
        logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, ids, strict=True)]
        return _output(ids, logprobs)

    def collective_rpc(self, method: str, kwargs: dict[str, Iterable[tuple[str, Any]]]) -> None:
        assert method == "reload_weights"
        weights = dict(kwargs["weights_iterator"])
        if not weights:
            return
        own = self.model.state_dict()
        for name in weights:
            layer, _, part = name.partition(".self_attn.")
            rest = {n for n in own if part and n.startswith(f"{layer}.self_attn.")}
            assert rest <= set(weights), f"{rest - set(weights)} not loaded with {name}"
        assert self.model.load_state_dict(weights, strict=False).unexpected_keys == []

    def reset_prefix_cache(self) -> bool:
        self.computed.clear()
        return True


def _output(ids: Sequence[int], logprobs: Sequence[float]) -> Any:
    of = [{token: SimpleNamespace(logprob=x)} for token, x in zip(ids, logprobs, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=of)
