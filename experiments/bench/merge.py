"""Merging six experts from their factors to merged ΔW: ours and PEFT's merge functions on the same ΔW; and, where it is
installed (``pip install -c constraints.txt mergekit==0.1.5``), mergekit's, in memory, on a base of zeros.

Workloads: the shipped experts on all modules of SmolLM2-135M, and three modules of a decoder layer of Qwen2.5-7B with
random rank-16 adapters, the largest among them; a note scales our time to the whole model by entries. Both sides
stream: a module's merged delta is dropped before the next module. Neither has a global trim, so that ours runs alone.
On the first layers of SmolLM2-135M our TIES with the tensor trim is compared with theirs, entry by entry.

PEFT's ``ties_svd`` (``add_weighted_adapter``) is timed once on a few modules: it adds a full SVD of each merged ΔW.
The memory bandwidth is that of a large copy, reads and writes counted, in the same run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from experiments.bench.harness import PEAK, Contestant, Options, Report, compete, joined, measured
from sam.errors import SamError
from sam.merging import AdapterDeltas, Factors, Merge, dare, linear, merge_modules, ties

EXPERTS = Path("experiments/experts/smollm2_135m")
NAMES = ("biomedical", "legal", "news", "social", "stem", "traffic")
DENSITY = 0.2
QWEN_SHAPES = {"mlp.gate_proj": (18944, 3584), "self_attn.k_proj": (512, 3584), "self_attn.q_proj": (3584, 3584)}
"""(out, in) of the modules of Qwen2.5-7B that are timed."""
QWEN_ENTRIES = 28 * (3 * 18944 * 3584 + 2 * 3584 * 3584 + 2 * 512 * 3584)
"""Entries of all linear modules of its 28 layers."""
COMPARED = 42
"""Modules of SmolLM2-135M (six layers) whose merge is compared with the peers'."""

PeerMerge = Callable[[list[Tensor]], Tensor]


def _ties(scope: str) -> Merge:
    return Merge(ties, {"density": DENSITY, "trim_scope": scope})


SPECS = {
    "ties, tensor trim": _ties("tensor"),
    "ties, global trim": _ties("global"),
    "dare": Merge(dare, {"density": 0.5, "seed": 0}),
    "linear": Merge(linear),
}


@dataclass(frozen=True)
class Workload:
    """Experts to merge, ``rounds`` times."""

    name: str
    adapters: list[AdapterDeltas]
    rounds: int

    @property
    def entries(self) -> list[int]:
        """Entries of ΔW, module by module."""
        return [math.prod(self.adapters[0].shape(module)) for module in self.adapters[0].modules()]

    @property
    def k_deltas_mb(self) -> float:
        """All experts' deltas of the largest module, fp32, in MiB: the unit of the memory goal."""
        return len(self.adapters) * max(self.entries) * 4 / 2**20


def run(options: Options) -> Report:
    """A case for each workload and merge, and the identity, bandwidth and ``ties_svd`` figures as notes."""
    loads = [_shipped(options), _qwen(options)]
    _drain(_merged(loads[0], SPECS["linear"]))  # so that no contestant pays for the libraries' first use
    reports = [_case(load, label, spec) for load in loads for label, spec in SPECS.items()]
    bandwidth = copy_bandwidth(1 << 22 if options.quick else 1 << 26)
    notes: dict[str, object] = {"copy bandwidth": f"{bandwidth / 1e9:.1f} GB/s"}
    for load, report in zip([load for load in loads for _ in SPECS], reports, strict=True):
        notes |= _shares(load, report, bandwidth)
    for library, merges in peers(len(loads[0].adapters)).items():
        notes[f"ties, tensor trim, against {library}"] = differences(loads[0], merges["ties"])
    seconds = reports[len(SPECS) + list(SPECS).index("ties, global trim")].cases[0].medians("SaM")["seconds"]
    whole = seconds * QWEN_ENTRIES / sum(loads[1].entries)
    notes["all of Qwen2.5-7B, ties, global trim, scaled by entries"] = f"{whole:.0f} s"
    notes["PEFT ties_svd"] = _ties_svd(1 if options.quick else 3)
    notes["mergekit"] = importlib.metadata.version("mergekit") if _has_mergekit() else "not installed, not measured"
    return joined(reports, notes)


def peft_merges(count: int) -> dict[str, PeerMerge]:
    """PEFT's functions by the name of our merge, with the weights that make them the same thing."""
    from peft.utils import merge_utils

    ones, mean = torch.ones(count), torch.full((count,), 1 / count)
    return {
        "ties": lambda deltas: merge_utils.ties(deltas, ones, DENSITY),
        "dare": lambda deltas: merge_utils.dare_linear(deltas, mean, 0.5),
        "linear": lambda deltas: merge_utils.task_arithmetic(deltas, mean),
    }


def mergekit_merges(count: int) -> dict[str, PeerMerge]:
    """As :func:`peft_merges`, of mergekit. Its DARE scales a tensor to the absolute sum that it had before, in place of
    1 / density."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    def merge(method: str, **parameters: float) -> PeerMerge:
        run = registry.get(method)

        def merged(deltas: list[Tensor]) -> Tensor:
            group = TensorGroup.from_tensors([torch.zeros_like(deltas[0]), *deltas], base_index=0)
            (found,) = run([group], parameters=parameters)
            return found

        return merged

    return {
        "ties": merge("ties", weight=1.0, density=DENSITY),
        "dare": merge("dare_linear", weight=1 / count, density=0.5),
        "linear": merge("task_arithmetic", weight=1 / count),
    }


def peers(count: int) -> dict[str, dict[str, PeerMerge]]:
    """The functions of each library that is there."""
    found = {"PEFT": peft_merges(count)}
    return found | {"mergekit": mergekit_merges(count)} if _has_mergekit() else found


def _has_mergekit() -> bool:
    return importlib.util.find_spec("mergekit") is not None


def differences(load: Workload, merge: PeerMerge) -> str:
    """How far our TIES (tensor trim) is from a peer's, entry by entry.

    They may differ where the definitions do: PEFT and mergekit keep ``int(density * n)`` entries and we round, they
    read a tied sum as +, and of entries equal to the threshold, where not all fit, they keep any and we the first.
    Weights of 1.
    """
    differing, total, largest = 0, 0, 0.0
    for module, ours in islice(_merged(load, SPECS["ties, tensor trim"]), COMPARED):
        theirs = merge([adapter.delta(module) for adapter in load.adapters])
        distance = (ours - theirs).abs()
        apart = distance > 1e-6 * theirs.abs().clamp(min=ours.abs().max() * 1e-3)
        differing, total = differing + int(apart.sum()), total + ours.numel()
        largest = max(largest, float(distance.masked_fill(apart, 0).max() / ours.abs().max()))
    return f"{differing} of {total} entries differ, all others by at most {largest:.1g} of their module's largest"


def copy_bandwidth(entries: int) -> float:
    """Bytes a second, read and written, that copying ``entries`` fp32 values reaches; the best of five."""
    source, target = torch.ones(entries), torch.ones(entries)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def least_bytes(load: Workload) -> int:
    """What a streaming merge has to move: each expert's ΔW written and read once, the merged one written."""
    return sum(load.entries) * 4 * (2 * len(load.adapters) + 1)


def _shipped(options: Options) -> Workload:
    names = NAMES[:3] if options.quick else NAMES
    adapters = [AdapterDeltas.open(EXPERTS / name) for name in names]
    if options.quick:
        layer = adapters[0].modules()[:7]
        adapters = [AdapterDeltas(one.folder, {m: one.factors(m) for m in layer}) for one in adapters]
    return Workload("SmolLM2-135M", adapters, options.rounds)


def _qwen(options: Options) -> Workload:
    generator, smaller = torch.Generator().manual_seed(0), 16 if options.quick else 1
    shapes = {m: (out // smaller, into // smaller) for m, (out, into) in QWEN_SHAPES.items()}

    def expert(number: int) -> AdapterDeltas:
        draw = partial(torch.randn, generator=generator)
        factors = {m: Factors(draw(16, into), draw(out, 16), 1.0, False) for m, (out, into) in shapes.items()}
        return AdapterDeltas(Path(f"random{number}"), factors)

    return Workload("Qwen2.5-7B, three modules", [expert(n) for n in range(len(NAMES))], options.rounds)


def _case(load: Workload, label: str, spec: Merge) -> Report:
    contestants = [Contestant("SaM", measured(lambda: _drain(_merged(load, spec))), ours=True)]
    if spec.options.get("trim_scope") != "global":
        contestants += [
            Contestant(f"{library} {spec.name}", measured(partial(_drain_peer, load, merges[spec.name])))
            for library, merges in peers(len(load.adapters)).items()
        ]
    return compete(contestants, load.rounds, "seconds", False, case=f"{load.name}: {label}", device="cpu")


def _merged(load: Workload, spec: Merge) -> Iterator[tuple[str, Tensor]]:
    return merge_modules(load.adapters, [str(n) for n in range(len(load.adapters))], spec)


def _drain_peer(load: Workload, merge: PeerMerge) -> None:
    for module in load.adapters[0].modules():
        merge([adapter.delta(module) for adapter in load.adapters])


def _drain(stream: Iterator[tuple[str, Tensor]]) -> None:
    deque(stream, maxlen=0)  # in a loop, one module's delta would live until the next is there


def _shares(load: Workload, report: Report, bandwidth: float) -> dict[str, object]:
    """Of the bandwidth, that :func:`least_bytes` in our median time take; and our peak memory in k deltas."""
    (case,) = report.cases
    ours = case.medians("SaM")
    reached = least_bytes(load) / ours["seconds"] / bandwidth
    notes: dict[str, object] = {f"{case.name}, share of the bandwidth": f"{reached:.0%}"}
    if PEAK in ours:
        notes[f"{case.name}, memory in k deltas of the largest module"] = f"{ours[PEAK] / load.k_deltas_mb:.2f}"
    return notes


def _ties_svd(modules: int) -> str:
    """One timing of ``add_weighted_adapter(combination_type="ties_svd")`` on ``modules`` attention projections."""
    from peft import PeftModel
    from torch import nn

    adapters = [AdapterDeltas.open(EXPERTS / name) for name in NAMES]
    chosen = [f"model.layers.{i}.self_attn.q_proj" for i in range(modules)]
    model = nn.Module()
    for module in chosen:
        out, into = adapters[0].shape(module)
        _put(model, module, nn.Linear(into, out, bias=False))
    peft_model: PeftModel | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            part = _restricted(EXPERTS / name, Path(folder) / name, chosen)
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, str(part), adapter_name=name)  # type: ignore[arg-type]
            else:
                peft_model.load_adapter(str(part), name)
    if peft_model is None:
        raise SamError(f"no experts under {EXPERTS}")
    start = time.perf_counter()
    peft_model.add_weighted_adapter(list(NAMES), [1.0] * len(NAMES), "merged", "ties_svd", density=DENSITY)
    theirs = time.perf_counter() - start
    parts = [AdapterDeltas(one.folder, {m: one.factors(m) for m in chosen}) for one in adapters]
    start = time.perf_counter()
    _drain(_merged(Workload("", parts, 1), SPECS["ties, tensor trim"]))
    ours = time.perf_counter() - start
    return (
        f"{theirs:.2f} s for {modules} of 210 modules (576 × 576), once; our ties on them {ours:.4f} s, without an SVD"
    )


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, torch.nn.Module())
        model = getattr(model, parent)
    model.add_module(last, module)


def _restricted(source: Path, target: Path, modules: list[str]) -> Path:
    """A copy of an adapter folder with only ``modules``."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules, "task_type": None}))
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if any(f".{m}.lora_" in n for m in modules)}
    save_file(kept, target / "adapter_model.safetensors")
    return target
