"""Merge methods, selectors and combine rules of a user's own, beside their configs in a folder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sam import extend
from sam.data.targets import mini
from sam.errors import SamError
from sam.experts.card import Pool
from sam.merging import AdapterDeltas, Merge, Method, factor_linear, linear, merge_modules, model_key
from sam.merging.stream import DeltaSet, Merged
from sam.models.spec import BaseSpec
from sam.ner.task import NER
from sam.results import RESULT
from sam.selection import Query, Selector, uses
from tests.test_cli import Runner, errors, make_runner
from tests.tiny import HashEncoder, one_line

MINE = """
def halve(deltas, share=0.5):
    return share * sum(deltas)


def wrong(deltas):
    return deltas[0][:3]


def last(query, count=1):
    return {"mine": list(query.names)[-count:]}


def longest(predictions, voices, least=1):
    pairs = max((p.pairs for p in predictions), key=len)
    return tuple(pair for pair in pairs if len(pair[1]) >= least)
"""
FILES = {
    "merge/mine.yaml": "_target_: mine.halve\nshare: 0.25\n",
    "merge/wrong.yaml": "_target_: mine.wrong\n",
    "merge/nowhere.yaml": "_target_: mine.nothing\n",
    "selector/mine.yaml": "_target_: mine.last\ncount: 2\n",
    "combine/mine.yaml": "_target_: mine.longest\n",
}


def halve(deltas: Sequence[Tensor], share: float = 0.5) -> Tensor:
    return share * sum(deltas, start=torch.zeros(()))


def none(*given: Any) -> None:
    return None


def read_rule(config: dict[str, Any]) -> extend.Configured:
    return extend.Configured.read(config, "combine", 2, ["rule"])


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_spec: BaseSpec, shared_pool: Pool) -> Runner:
    home = tmp_path_factory.mktemp("extend")
    for name, text in {**FILES, "mine.py": MINE}.items():
        (home / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "own" / name).write_text(text)
    return make_runner(home, tiny_spec, shared_pool)


def run(runner: Runner, name: str, *overrides: str) -> dict[str, Any]:
    folder = runner.home / name
    done = runner("--config-dir", str(runner.home / "own"), *overrides, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / RESULT).read_text()))


def test_a_merge_of_ones_own_runs_and_is_cached_under_its_source(runner: Runner) -> None:
    first = run(runner, "a", "merge=mine", "k=2")
    model = first["targets"]["mini_movie"]["models"]["sampling"]
    assert len(model["experts"]) == 2 and first["config"]["merge"]["name"] == "mine.halve"
    other = run(runner, "b", "merge=mine", "merge.share=0.5", "k=2")
    file = runner.home / "own" / "mine.py"
    file.write_text(MINE.replace("share * sum", "2 * share * sum"))
    changed = run(runner, "c", "merge=mine", "k=2")
    file.write_text(MINE)
    keys = {r["targets"]["mini_movie"]["models"]["sampling"]["model_key"] for r in (first, other, changed)}
    assert len(keys) == len({r["config_hash"] for r in (first, other, changed)}) == 3


def test_a_selector_and_a_rule_of_ones_own_run(runner: Runner) -> None:
    result = run(runner, "e", "selector=mine", "combine=mine", "k=2")
    target = result["targets"]["mini_movie"]
    assert target["models"]["mine"]["experts"] == ["social", "stem"]
    assert result["config"]["selector"]["name"] == "mine.last" and result["config"]["combine"]["rule"] == "mine.longest"
    assert target["combined"]["scores"]["n"] == 3


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["merge=wrong", "k=2"], ("merge: mine.wrong returned shape [3, ", "must return a ΔW of")),
        (["merge=nowhere"], ("merge._target_=mine.nothing cannot be imported",)),
        (["merge=mine", "+merge.speed=3"], ("merge", "speed")),
        (["merge=min"], ("merge=min is unknown", "did you mean mine?")),
    ],
)
def test_mistakes_are_one_line(runner: Runner, overrides: list[str], named: tuple[str, ...]) -> None:
    done = runner("--config-dir", str(runner.home / "own"), *overrides, f"hydra.run.dir={runner.home / 'mistake'}")
    assert done.returncode != 0
    (line,) = errors(done)
    assert all(part in line for part in named), line


def test_a_custom_merge_is_applied_to_each_module(shared_pool: Pool) -> None:
    names = ["news", "stem"]
    adapters = [AdapterDeltas.open(shared_pool.folder(name)) for name in names]
    spec = Merge(halve, {"share": 0.5}, "tests.halve")
    mean = dict(merge_modules(adapters, names, Merge(linear)))
    found = dict(merge_modules(adapters, names, spec))
    assert found.keys() == mean.keys() and all(torch.allclose(found[m], mean[m], atol=1e-7) for m in mean)
    (alone, delta), *_ = merge_modules(adapters[:1], names[:1], spec)
    assert torch.equal(delta, adapters[0][alone])
    keys = {model_key("base", adapters, names, s) for s in (spec, Merge(halve, {}, "tests.halve"), Merge(linear))}
    assert len(keys) == 3
    assert model_key("base", adapters[::-1], names[::-1], spec) in keys


@pytest.mark.parametrize(
    ("section", "config", "named"),
    [
        ("merge", {"_target_": "nowhere.f"}, ("merge._target_=nowhere.f cannot be imported",)),
        ("merge", {"_target_": "sam.merging.MERGE_VERSION"}, ("is no function",)),
        ("merge", {"_target_": "tests.test_extend.halve", "part": 1}, ("tests.test_extend.halve", "part")),
        ("selector", {"_target_": "sam.selection.nothing"}, ("selector._target_=sam.selection.nothing",)),
        ("combine", {"_target_": "combine"}, ("combine._target_=combine cannot be imported",)),
    ],
)
def test_mistakes_in_a_config_are_one_line(section: str, config: dict[str, Any], named: tuple[str, ...]) -> None:
    read: dict[str, Any] = {"merge": Merge.from_config, "selector": Selector.from_config, "combine": read_rule}
    with pytest.raises(SamError) as error:
        read[section](config)
    assert all(part in one_line(error) for part in named)


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        (None, ("returned None", "must map task models to lists of experts")),
        ({"a": 2}, ("chose 2 for a", "must be a list of: ")),
        ({"a": "news"}, ("chose 'news' for a",)),
        ({"a": (name for name in ["news"])}, ("chose <generator", "must be a list of: ")),
        ({"a": ["news", "sports"]}, ("chose ['news', 'sports'] for a", "news, ")),
    ],
)
def test_what_a_selector_returns_is_checked(
    hash_encoder: HashEncoder, shared_pool: Pool, chosen: Any, named: tuple[str, ...]
) -> None:
    query = Query(mini("movie"), shared_pool, shared_pool.names, hash_encoder, NER, none, 3, 1, 0)
    with pytest.raises(SamError) as error:
        Selector(lambda query: chosen, {}, "mine.choose").choose(query)
    assert all(part in one_line(error) for part in ("selector: mine.choose", *named))


def test_flags_of_a_selector_that_declares_what_it_uses_are_refused() -> None:
    with pytest.raises(SamError, match="selector.uses_gold: sam declares by itself what it uses"):
        Selector.from_config({"_target_": "sam.selection.selectors.sam", "uses_gold": True})


def test_what_no_selector_can_use_is_refused() -> None:
    with pytest.raises(SamError, match="sample_sise is unknown; allowed: names, k, seed, encoder, sample_size, gold"):
        uses("names", "sample_sise")


class Called:
    """An object that is called as a function."""

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        return deltas[0]


decorated, partially, called = torch.no_grad()(halve), functools.partial(halve, share=1.0), Called()


@pytest.mark.parametrize("function", [halve, decorated, partially, called, Called])
def test_a_function_is_identified_by_its_own_file(function: Any) -> None:
    found = extend.identity("mine", function, {"a": 1})
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    assert found == {"target": "mine", "source": source, "options": {"a": 1}}


def test_what_is_made_of_anothers_function_is_identified_by_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_of_ours.py").write_text(
        "import functools\nfrom sam.merging import ties\n\nsparse = functools.partial(ties, density=0.1)\n\n\n"
        "@functools.wraps(ties)\ndef double(deltas, **options):\n    return ties([2 * d for d in deltas], **options)\n"
    )
    ours = Merge.from_config({"_target_": "sam.merging.ties", "density": 0.1})
    assert ours.content() == {"name": "ties", "density": 0.1}
    for name, options in {"sparse": {}, "double": {"density": 0.1}}.items():
        merge = Merge.from_config({"_target_": f"made_of_ours.{name}", **options})
        files = [str(tmp_path / "made_of_ours.py"), str(Path(str(extend.__file__)).parent / "merging" / "methods.py")]
        source = b"".join(Path(file).read_bytes() for file in sorted(files))
        assert merge.content() == {
            "target": f"made_of_ours.{name}",
            "source": hashlib.sha256(source).hexdigest()[:16],
            "options": options,
        }


def test_an_option_that_is_null_is_not_one_that_is_left_out() -> None:
    """A function of one's own may have another default."""
    left_out, null = (Merge(halve, options, "tests.halve").content() for options in ({}, {"share": None}))
    assert left_out != null
    assert Merge(linear, {"weights": None}).content() == Merge(linear).content()


def test_a_method_of_ones_own_that_takes_names_is_keyed_by_them(shared_pool: Pool) -> None:
    @Method
    def by_name(deltas: Sequence[DeltaSet], *, names: Sequence[str]) -> Merged:
        return iter(())

    adapters = [AdapterDeltas.open(shared_pool.folder(name)) for name in ("news", "stem")]
    for function, differ in ((by_name, True), (factor_linear, False)):
        keys = {model_key("base", adapters, names, Merge(function)) for names in (["a", "b"], ["a", "c"])}
        assert len(keys) == (2 if differ else 1)


def test_what_has_no_source_is_refused() -> None:
    with pytest.raises(SamError, match="mine has no source file"):
        extend.identity("mine", len, {})


def test_a_selector_sees_gold_only_if_it_says_so(hash_encoder: HashEncoder, shared_pool: Pool) -> None:
    target = mini("movie")
    query = Query(target, shared_pool, shared_pool.names, hash_encoder, NER, none, 3, 1, 0)
    for flags, seen in (({}, False), ({"uses_gold": True}, True)):
        selector = Selector.from_config({"_target_": "tests.fakes.gold_of", "name": "mine", **flags})
        assert selector.uses == {"names"} | ({"gold"} if seen else set())
        assert set(selector.choose(query)) == {"gold" if seen else "blind"}
        assert selector.content()["target"] == "tests.fakes.gold_of"


def test_config_dirs_of_a_command_line(tmp_path: Path) -> None:
    argv = ["-m", "--config-dir", str(tmp_path), "k=1", f"--config-dir={tmp_path / 'b'}", "-cd", "c"]
    assert extend.config_dirs(argv) == [tmp_path, tmp_path / "b", Path("c").absolute()]
