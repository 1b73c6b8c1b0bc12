"""Each generator against ``generate`` on one prompt at a time: merged models, prompts that share, errors, grammars."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import Auto, DecodeSpec, Generator, build, check_constrained
from sam.generation.openvino import OpenVINOGenerator
from sam.generation.transformers import TransformersGenerator
from sam.merging import AdapterDeltas, Merge, linear, merge_modules, merged
from sam.models.base import Base, load
from sam.models.spec import BaseSpec
from sam.ner import grammar, parsing
from tests.generation.models import LIMIT, TEXTS, TYPES, completions, generated, oracle, requests, write_model
from tests.tiny import one_line, write_adapter, write_base

pytest.importorskip("openvino_genai")
LINEAR = Merge(linear)
UP = "model.layers.0.mlp.up_proj"

Make = Callable[..., Generator]


@pytest.fixture(params=["openvino", "transformers"])
def make(request: pytest.FixtureRequest, tiny_spec: BaseSpec) -> Iterator[Make]:
    """A generator in fp32, of the tiny base model unless told otherwise."""
    made: list[Generator] = []

    def one(spec: BaseSpec = tiny_spec, limit: int = LIMIT, batch_size: int = 3) -> Generator:
        kind = OpenVINOGenerator if request.param == "openvino" else TransformersGenerator
        made.append(kind(spec, "cpu", limit, batch_size, "fp32"))
        return made[-1]

    yield one
    for generator in made:
        generator.close()


def test_completions_are_those_of_generate(make: Make, tiny: Base) -> None:
    asked = requests()
    found = completions(make(), asked)
    assert [(c.text, c.truncated) for c in found] == [oracle(tiny, r) for r in asked]
    assert len({c.text for c in found}) > 3


def test_completions_of_merges_are_those_of_generate_with_their_weights(
    make: Make, tiny: Base, shared_pool: Pool
) -> None:
    generator, asked = make(), requests()
    for names in (["news", "stem"], ["news"], ["social", "stem", "news"], []):
        adapters = [AdapterDeltas.open(shared_pool.folder(name)) for name in names]
        with merged(tiny.model, merge_modules(adapters, names, LINEAR)):
            by_hand = [oracle(tiny, r) for r in asked]
        found = completions(generator, asked, merge_modules(adapters, names, LINEAR))
        assert [(c.text, c.truncated) for c in found] == by_hand, names


def test_the_warm_start_is_part_of_the_base(
    make: Make, tiny: Base, tiny_spec: BaseSpec, shared_pool: Pool, tmp_path: Path
) -> None:
    write_adapter(tmp_path, tiny.model, seed=9)
    spec = BaseSpec(**{**vars(tiny_spec), "fold": str(tmp_path)})
    started, adapter = load(spec, "cpu"), AdapterDeltas.open(shared_pool.folder("news"))
    generator, asked = make(spec), requests()
    for deltas in ([adapter], []):
        with merged(started.model, merge_modules(deltas, ["news"][: len(deltas)], LINEAR)):
            by_hand = [oracle(started, r)[0] for r in asked]
        found = completions(generator, asked, merge_modules(deltas, ["news"][: len(deltas)], LINEAR))
        assert [c.text for c in found] == by_hand


def test_prompts_that_share_a_long_prefix_do_not_change_one_another(make: Make, tiny: Base) -> None:
    types = [f"kind number {i}" for i in range(9)]
    asked = [r for texts in (TEXTS, TEXTS[::-1]) for r in requests(texts, types)] + requests(TEXTS[:2])
    found = completions(make(batch_size=4), asked)
    assert [c.text for c in found] == [oracle(tiny, r)[0] for r in asked]


def test_log_probabilities_are_those_of_the_model(make: Make, tiny: Base) -> None:
    (asked,) = requests(TEXTS[:1])
    (found,) = completions(make(), [asked])
    ids = generated(tiny, asked, LIMIT)
    logits = tiny.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = [float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(found.logprobs), len(ids))]
    assert list(found.logprobs) == pytest.approx(by_hand, abs=2e-3)
    assert len(found.logprobs) == len(found.ends) > 3
    assert list(found.ends) == sorted(found.ends) and found.ends[-1] == len(found.text)
    assert all(-50 < x <= 0 for x in found.logprobs) and not any(map(math.isnan, found.logprobs))


def test_stop_tokens_end_a_completion(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    """The stop tokens of the generation config count as well as the tokenizer's."""
    spec = BaseSpec("tiny", "local", location=str(write_base(tmp_path)))
    base = load(spec, "cpu")
    asked = requests()
    free = [oracle(base, r)[0] for r in asked]
    ids = [base.tokenizer(text, add_special_tokens=False).input_ids for text in free]
    config = base.model.generation_config
    config.eos_token_id = [base.stop_ids[0], ids[0][5], ids[2][9]]
    config.save_pretrained(str(tmp_path))
    again = load(spec, "cpu")
    found = completions(make(spec), asked)
    assert [(c.text, c.truncated) for c in found] == [oracle(again, r) for r in asked]
    assert not all(c.truncated for c in found)


def test_penalties_of_the_model_are_not_applied(make: Make, tiny: Base, tmp_path: Path) -> None:
    spec = BaseSpec("tiny", "local", location=str(write_base(tmp_path)))
    config = load(spec, "cpu").model.generation_config
    config.repetition_penalty = 5.0
    config.save_pretrained(str(tmp_path))
    assert load(spec, "cpu").model.generation_config.repetition_penalty == 5.0
    asked = requests()
    assert [c.text for c in completions(make(spec), asked)] == [oracle(tiny, r)[0] for r in asked]


def test_openvino_leaves_nothing_behind(tiny_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generator = OpenVINOGenerator(tiny_spec, "cpu", 8, 64, "fp32")
    generator.load(())
    assert len(list(tmp_path.iterdir())) == 1
    generator.close()
    assert list(tmp_path.iterdir()) == []
    generator.load(())
    del generator
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    other = dataclasses.replace(tiny_spec, fold=str(tmp_path / "fold"))
    write_adapter(
        tmp_path / "fold",
        load(BaseSpec("x", "local", location=str(write_model(tmp_path / "x", "qwen2"))), "cpu").model,
        1,
    )
    with pytest.raises(SamError):
        OpenVINOGenerator(other, "cpu", 8, 64, "fp32").load(())
    assert not list(tmp_path.glob("sam-openvino-*"))


def test_openvino_refuses_deltas_of_weights_that_it_keeps_once(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    base = load(BaseSpec("tiny", "local", location=str(folder)), "cpu")
    first, second = (base.model.model.layers[n].mlp.up_proj.weight.data for n in (0, 1))
    second.copy_(first)
    base.model.save_pretrained(str(folder))
    generator = OpenVINOGenerator(BaseSpec("tiny", "local", location=str(folder)), "cpu", 8, 64, "fp32")
    with pytest.raises(SamError, match="has the same weight as another one"):
        generator.load(deltas(UP))


def test_nothing_to_ask_is_no_error(make: Make) -> None:
    assert completions(make(), []) == []


def deltas(*names: str, shape: tuple[int, int] = (112, 64)) -> Iterator[tuple[str, Tensor]]:
    return ((name, torch.zeros(shape)) for name in names)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: deltas("model.layers.7.mlp.up_proj"), ("layers.7", "another base")),
        (lambda: deltas(UP, shape=(3, 64)), ("[3, 64]", "[112, 64]")),
        (lambda: deltas(UP, UP), ("comes twice",)),
        (lambda: deltas("model.embed_tokens", shape=(400, 64)), ("model.embed_tokens", "shares its weight")),
    ],
)
def test_deltas_that_do_not_fit_are_refused(make: Make, tiny: Base, wrong: Any, named: tuple[str, ...]) -> None:
    generator, asked = make(), requests(TEXTS[:2])
    with pytest.raises(SamError) as error:
        generator.load(wrong())
    assert all(part in one_line(error) for part in named)
    assert [c.text for c in completions(generator, asked)] == [oracle(tiny, r)[0] for r in asked]


def test_an_error_within_a_merge_leaves_the_base(make: Make, tiny: Base) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield UP, torch.ones(112, 64)
        raise RuntimeError("half way")

    generator, asked = make(), requests(TEXTS[:2])
    with pytest.raises(RuntimeError, match="half way"):
        generator.load(breaks())
    assert [c.text for c in completions(generator, asked)] == [oracle(tiny, r)[0] for r in asked]


def test_a_generator_can_be_left_half_way_and_closed(make: Make, tiny: Base) -> None:
    generator, asked = make(batch_size=1), requests()
    generator.load(())
    run = generator.generate(asked)
    next(run)
    del run
    assert [c.text for c in completions(generator, asked)] == [oracle(tiny, r)[0] for r in asked]
    generator.close()
    assert [c.text for c in completions(generator, asked)] == [oracle(tiny, r)[0] for r in asked]


@pytest.mark.parametrize("seed", [1, 2])
def test_constrained_completions_are_in_the_language(make: Make, tmp_path: Path, seed: int) -> None:
    """Of a random model, which by itself writes nothing of the kind; those that reach the limit are cut, not wrong."""
    spec = BaseSpec("tiny", "local", location=str(write_base(tmp_path, seed)))
    texts = [*TEXTS, 'He said "C:\\temp".', "", "Cafe\u0301 e\u0301te\u0301", "née à Fès, bébé éclair"]
    asked = [grammar.request(TYPES, text, True) for text in texts]
    found = completions(make(spec, limit=80), asked)
    free = completions(make(spec, limit=80), [grammar.request(TYPES, text, False) for text in texts])
    assert [c.text for c in found] != [c.text for c in free]
    read = [parsing.predict(text, c.text, TYPES, c.truncated) for text, c in zip(texts, found, strict=True)]
    assert all((p.unparsable, p.not_in_sentence, p.not_asked) == (False, 0, 0) for p in read)
    assert sum(len(p.pairs) for p in read) > 5 and not all(c.truncated for c in found)


def test_generators_agree_on_constrained_completions(tiny_spec: BaseSpec) -> None:
    asked = [grammar.request(TYPES, text, True) for text in TEXTS]
    one = completions(OpenVINOGenerator(tiny_spec, "cpu", LIMIT, 64, "fp32"), asked)
    other = completions(TransformersGenerator(tiny_spec, "cpu", LIMIT, 16, "fp32"), asked)
    assert [c.text for c in one] == [c.text for c in other]
    assert [c.logprobs for c in one] != [()] * len(one)


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "qwen2", "qwen3"])
def test_openvino_takes_other_architectures(tmp_path: Path, kind: str) -> None:
    spec = BaseSpec(kind, "local", location=str(write_model(tmp_path, kind)))
    base, asked = load(spec, "cpu"), requests()
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    change = [(n, 0.2 * torch.randn(base.model.get_submodule(n).weight.shape)) for n in names]
    generator = Auto(spec, "cpu", LIMIT, 4, "fp32")
    assert isinstance(generator.chosen, OpenVINOGenerator)
    for given in (change, []):
        with merged(base.model, copy.deepcopy(given)):
            by_hand = [oracle(base, r)[0] for r in asked]
        assert [c.text for c in completions(generator, asked, given)] == by_hand


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_openvino_refuses_prompts_beyond_a_sliding_window(tmp_path: Path, kind: str) -> None:
    options = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3" else {}
    spec = BaseSpec(kind, "local", location=str(write_model(tmp_path, kind, sliding_window=60, **options)))
    base, (short, long) = load(spec, "cpu"), requests(["x", TEXTS[2] * 2])
    generator = OpenVINOGenerator(spec, "cpu", 8, 64, "fp32")
    assert completions(generator, [short])[0].text == oracle(base, short, 8)[0]
    with pytest.raises(SamError) as error:
        completions(generator, [short, long])
    assert all(part in one_line(error) for part in ("sliding window of 60", "generator=transformers"))


def test_openvino_leaves_other_models_to_transformers(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(str(tmp_path))
    with caplog.at_level("INFO"):
        found = Auto(BaseSpec("other", "local", location=str(tmp_path)), "cpu", 8, 4, "auto")
        assert isinstance(found.chosen, TransformersGenerator)
    assert [m for m in caplog.messages if "gpt2" in m and "transformers" in m]


@pytest.mark.parametrize(
    ("kind", "window", "chosen"), [("mistral", 512, False), ("gemma3", 512, False), ("gemma3", 4096, True)]
)
def test_auto_leaves_a_short_sliding_window_to_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, window: int, chosen: bool
) -> None:
    spec = BaseSpec(f"{kind}_{window}", "local", location=str(write_model(tmp_path, kind, sliding_window=window)))
    with caplog.at_level("INFO"):
        assert isinstance(Auto(spec, "cpu", 8, 4, "auto").chosen, OpenVINOGenerator) is chosen
    assert [f"sliding window of {window}" in message for message in caplog.messages] == ([] if chosen else [True])


def test_a_missing_grammar_package_is_noticed_before_a_model_is_loaded(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config

    monkeypatch.setitem(sys.modules, "xgrammar", None)
    spec, constrained = BaseSpec("x", "local", location=str(tmp_path / "nowhere")), DecodeSpec(8, True)
    config = {"_target_": "sam.generation.transformers.TransformersGenerator", "batch_size": 4, "precision": "auto"}
    with pytest.raises(SamError) as error:
        build(config, spec, "cpu", constrained)
    assert "needs xgrammar; install it with: pip install 'sam-ner[grammar]'" in one_line(error)
    build(config, spec, "cpu", DecodeSpec(8, False))
    auto = {**config, "_target_": "sam.generation.Auto"}
    GPT2Config().save_pretrained(str(tmp_path / "gpt2"))
    (tmp_path / "gpt2" / "model.safetensors").touch()
    other = build(auto, BaseSpec("x", "local", location=str(tmp_path / "gpt2")), "cpu", constrained)
    with pytest.raises(SamError, match="needs xgrammar"):
        check_constrained(other)
    check_constrained(build(auto, BaseSpec("tiny", "local", location=str(tiny_base)), "cpu", constrained))


def test_keys_hold_what_can_change_a_completion(tiny_spec: BaseSpec) -> None:
    keys = [
        OpenVINOGenerator(tiny_spec, "cpu", 8, 64, "fp32").key(),
        OpenVINOGenerator(tiny_spec, "cpu", 9, 64, "fp32").key(),
        OpenVINOGenerator(tiny_spec, "cpu", 8, 64, "bf16").key(),
        OpenVINOGenerator(tiny_spec, "cpu", 8, 32, "bf16").key(),
        TransformersGenerator(tiny_spec, "cpu", 8, 16, "fp32").key(),
        TransformersGenerator(tiny_spec, "cpu", 8, 16, "bf16").key(),
        TransformersGenerator(tiny_spec, "cpu", 8, 4, "fp32").key(),
        TransformersGenerator(tiny_spec, "cuda", 8, 16, "fp32").key(),
        *(
            kind(dataclasses.replace(tiny_spec, dtype="bfloat16"), "cpu", 8, 16, "fp32").key()
            for kind in (OpenVINOGenerator, TransformersGenerator)
        ),
    ]
    assert len({str(key) for key in keys}) == len(keys)
    # In fp32 paged attention sums up in the same order whatever the batch.
    assert OpenVINOGenerator(tiny_spec, "cpu", 8, 32, "fp32").key() == keys[0]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"precision": "int4"}, ("generator.precision=int4", "fp32, bf16")),
        ({"batch_size": 0}, ("generator.batch_size=0", "at least 1")),
        ({"batch_size": True}, ("generator.batch_size=True",)),
        ({"speed": 3}, ("generator", "speed")),
        ({"_target_": "sam.generation.nothing"}, ("generator._target_=sam.generation.nothing",)),
    ],
)
def test_mistakes_in_the_config_are_one_line(
    tiny_spec: BaseSpec, config: dict[str, Any], named: tuple[str, ...]
) -> None:
    usual = {"batch_size": 64, "precision": "auto"}
    given = {"_target_": "sam.generation.openvino.OpenVINOGenerator", **usual, **config}
    with pytest.raises(SamError) as error:
        build(given, tiny_spec, "cpu", DecodeSpec(8, False))
    assert all(part in one_line(error) for part in named)


def test_openvino_refuses_a_gpu(tiny_spec: BaseSpec) -> None:
    with pytest.raises(SamError, match="runs on a CPU"):
        OpenVINOGenerator(tiny_spec, "cuda", 8, 64, "auto")


@pytest.mark.slow
def test_openvino_agrees_with_generate_on_a_real_model(smollm: Base, smollm_spec: BaseSpec) -> None:
    """In fp32 all completions of 12 sentences, in bf16 nearly all tokens of their beginnings."""
    from sam.data.targets import mini

    target = mini("movie")
    asked = requests([s.text for s in target.sentences[:12]], target.types)
    reference = completions(TransformersGenerator(smollm_spec, "cpu", 24, 16, "fp32"), asked)
    exact = completions(OpenVINOGenerator(smollm_spec, "cpu", 24, 64, "fp32"), asked)
    rough = completions(OpenVINOGenerator(smollm_spec, "cpu", 24, 64, "bf16"), asked)
    assert [c.text for c in exact] == [c.text for c in reference]
    assert sum(a.text == b.text for a, b in zip(rough, reference, strict=True)) >= 8
