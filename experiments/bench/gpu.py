"""On an NVIDIA GPU: vLLM beside transformers on the same prompts, and a merge of three experts of a 7B model.

``SAM_VLLM_PYTHON`` names the Python of an environment that has vLLM. The model is that of ``decode``; a round loads its
weights first, which is not counted, so that no prompt's prefix is computed yet. The experts are random LoRA factors of
rank 16 on all linear modules of Qwen2.5-7B, merged by TIES with a global trim, module by module, on the GPU.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.bench.decode import LIMIT, RATE, agreement, sample
from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined
from experiments.bench.merge import DENSITY
from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import Completion, Generator, Request
from sam.generation.transformers import TransformersGenerator
from sam.generation.vllm import VLLMGenerator
from sam.launch import compose
from sam.merging import AdapterDeltas, Factors, Merge, linear, merge_modules, ties
from sam.models.spec import BaseSpec
from sam.ner import grammar

SENTENCES = 50
EXPERTS = 3
LAYERS = 28
QWEN = {
    "self_attn.q_proj": (3584, 3584),
    "self_attn.k_proj": (512, 3584),
    "self_attn.v_proj": (512, 3584),
    "self_attn.o_proj": (3584, 3584),
    "mlp.gate_proj": (18944, 3584),
    "mlp.up_proj": (18944, 3584),
    "mlp.down_proj": (3584, 18944),
}
"""(out, in) of the linear modules of a decoder layer of Qwen2.5-7B."""


class OnDevice(Mapping[str, Tensor]):
    """The deltas of random factors of rank 16, computed where the factors are each time they are asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], layers: int, device: str, seed: int) -> None:
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
        self._factors = {
            f"model.layers.{n}.{module}": Factors(draw(16, into), draw(out, 16), 1.0, False)
            for n in range(layers)
            for module, (out, into) in shapes.items()
        }

    def __getitem__(self, module: str) -> Tensor:
        return self._factors[module].product()

    def __contains__(self, module: object) -> bool:
        return module in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def run(options: Options) -> Report:
    """A case per precision, one of the merge, and how far the completions agree as notes."""
    if not torch.cuda.is_available():
        raise SamError(
            "the benchmark gpu needs an NVIDIA GPU, and torch finds none here; decode and merge run on a CPU"
        )
    config = compose("experts=shipped")
    asked, source = sample(8 if options.quick else SENTENCES)
    requests = [grammar.request(types, s.text, False) for types, s in asked]
    spec = BaseSpec.from_config(config["base"])
    adapter = AdapterDeltas.open(Pool(config["experts"]["path"]).folder("unified"))
    made: dict[str, list[Completion]] = {}
    reports = []
    for precision in ("fp32", "bf16"):
        everyone: dict[str, Generator] = {
            "vllm": VLLMGenerator(spec, "cuda", LIMIT, 256, precision, 0.5, os.environ.get("SAM_VLLM_PYTHON")),
            "transformers": TransformersGenerator(spec, "cuda", LIMIT, 16, precision),
        }
        contestants = [
            Contestant(name, partial(generate, name, one, adapter, requests, made), ours=name.startswith("vllm"))
            for name, one in ((f"{kind} {precision}", one) for kind, one in everyone.items())
        ]
        reports.append(compete(contestants, options.rounds, RATE, True, case=f"{precision}, {len(asked)} sentences"))
        for one in everyone.values():
            one.close()
    reports.append(merge_case("cuda", QWEN, 1 if options.quick else LAYERS, options.rounds))
    return joined(reports, {"sentences": source, **agreement(made, asked)})


def generate(
    name: str,
    generator: Generator,
    adapter: AdapterDeltas,
    requests: Sequence[Request],
    made: dict[str, list[Completion]],
) -> Figures:
    """A round: the completions, into ``made[name]``, and how many there were a second."""
    generator.load(merge_modules([adapter], ["unified"], Merge(linear)))
    start = time.perf_counter()
    done = dict(generator.generate(requests))
    seconds = time.perf_counter() - start
    made[name] = [done[i] for i in range(len(requests))]
    return {"seconds": seconds, RATE: len(requests) / seconds}


def merge_case(device: str, shapes: Mapping[str, tuple[int, int]], layers: int, rounds: int) -> Report:
    """The seconds that a TIES merge of random experts takes on ``device``, their products included."""
    experts = [OnDevice(shapes, layers, device, seed) for seed in range(EXPERTS)]

    def once() -> Figures:
        start = time.perf_counter()
        deque(merged(experts), maxlen=0)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start}

    name = f"TIES of {EXPERTS} experts, {len(experts[0])} modules"
    return compete([Contestant("SaM", once, ours=True)], rounds, "seconds", False, case=name, warmup=1, device=device)


def merged(experts: Sequence[OnDevice]) -> Iterator[tuple[str, Tensor]]:
    """(module, merged delta), where the experts are."""
    return ties.stream(experts, density=DENSITY, trim_scope="global")
