"""The main comparison from made-up runs: figures worked by hand, and what may not leave with it."""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import bootstrap, pairs
from experiments.collect import MEAN, load_jobs
from experiments.comparison import Comparison, Outcome, Row, compare
from experiments.main_table import latex, main, markdown, published, textless, write
from sam.errors import SamError
from sam.types import Mention, Sentence
from tests.tiny import one_line

TEXT = "Ada met Bob in Bath."
GOLD: list[list[Any]] = [["person", 0, 3], ["person", 8, 11], ["place", 15, 19]]
PAIRS = [["person", "Ada"], ["person", "Bob"], ["place", "Bath"]]


def write_run(
    root: Path, name: str, found: dict[str, dict[str, int]], seed: int = 0, ids: str = "s", **more: Any
) -> None:
    """A job of selector ``name`` whose models found the first n of the gold pairs in both sentences of each target.

    ``found``: target -> model -> n; the combination is that of the last model.
    """
    experts = more.get("experts")
    targets, lines = {}, []
    for target, models in found.items():
        combined = list(models.values())[-1]
        targets[target] = {
            "labels_used_for_selection": name == "oracle",
            "selections": {
                m: {"experts": experts or [m], "scores": {m: 0.5}, "details": {"by": "votes", "pseudo_labels": 2}}
                for m in models
            },
            "models": {
                m: {
                    "experts": experts or [m],
                    "model_key": m,
                    "scores": scores(n),
                    "seconds": {"merge": 1.0, "generate": 2.0},
                    "generated": 0.5,
                }
                for m, n in models.items()
            },
            "combined": {"scores": scores(combined)},
        }
        for i in range(2):
            extra = [["place", "Nowhere"]] if name == "sam" else []
            lines.append(
                {
                    "target": target,
                    "id": f"{ids}/{i}",
                    "text": TEXT,
                    "gold": GOLD,
                    "models": {m: {"pairs": PAIRS[:n], "mentions": []} for m, n in models.items()},
                    "combined": {"pairs": PAIRS[:combined] + extra, "mentions": []},
                }
            )
    rule = more.get("rule", "union")
    config = {"selector": {"name": name}, "combine": {"rule": rule}, "k": 3, "seed": seed, "base": {"name": "tiny"}}
    result = {"schema": 1, "config": config, "git_commit": "c0ffee", "targets": targets, "overrides": []}
    folder = root / f"{name}-{'-'.join(experts or [])}{'' if rule == 'union' else rule}{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def scores(n: int) -> dict[str, Any]:
    f1 = 2 * n / (n + 3)
    counts = {"n": 2, "predicted": 2 * n, "unparsable": 1, "not_in_sentence": 0}
    # The first two of the gold pairs of both sentences are of a type that the sources have.
    types = {"person": {"gold": 4, "tp": 2 * min(n, 2)}, "elf": {"gold": 2, "tp": 2 * max(n - 2, 0)}}
    return {"precision": 1.0, "recall": n / 3, "f1": f1, "span_f1": f1, "per_type": types, **counts}


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    root = tmp_path / "sweep"
    write_run(root, "named", {"a": {"named": 1}, "b": {"named": 2}}, experts=["unified"])
    write_run(root, "named", {"a": {"named": 1}, "b": {"named": 1}}, experts=["unified_small"])
    write_run(root, "each", {"a": {"news": 1, "stem": 3}, "b": {"news": 2, "stem": 1}})
    write_run(root, "each", {"a": {"news": 1, "stem": 2}, "b": {"news": 2, "stem": 1}}, rule="vote")
    write_run(root, "random", {"a": {"random": 1}, "b": {"random": 1}}, seed=0)
    write_run(root, "random", {"a": {"random": 3}, "b": {"random": 3}}, seed=1)
    write_run(root, "random_pair", {"a": {"random": 1, "second": 3}, "b": {"random": 1, "second": 3}}, seed=0)
    write_run(root, "sam", {"a": {"domain": 1, "sampling": 3}, "b": {"domain": 1, "sampling": 2}})
    write_run(root, "oracle", {"a": {"oracle": 3}, "b": {"oracle": 3}})
    return root


def test_rows_and_their_figures(sweep: Path) -> None:
    found = compare(sweep)
    assert list(found.rows) == [
        *("unified", "unified, one expert's budget", "expert news", "expert stem", "experts, mean", "experts, best"),
        *("experts, union of all", "experts, two votes", "random 3", "union of two random 3"),
        *("SaM", "top k by gold F1"),
    ]

    def f1(row: str, target: str) -> float:
        return found.f1(found.rows[row], target).value

    assert f1("unified", "a") == pytest.approx(0.5) and f1("unified", "b") == pytest.approx(0.8)
    assert f1("unified", MEAN) == pytest.approx(0.65)
    assert f1("expert stem", "a") == pytest.approx(1.0)
    assert f1("experts, mean", "b") == pytest.approx((0.8 + 0.5) / 2)
    assert f1("experts, best", MEAN) == pytest.approx((1.0 + 0.8) / 2)
    assert f1("random 3", "a") == pytest.approx((0.5 + 1.0) / 2)  # two seeds
    assert f1("SaM", "a") == pytest.approx(6 / 7)  # three found, one made up
    assert [seed for _, seed in found.rows["random 3"].runs] == [0, 1]
    absolute, relative = found.against(found.rows["SaM"], found.rows["unified"], "a")
    assert absolute.value == pytest.approx(6 / 7 - 0.5) and relative.value == pytest.approx((6 / 7 - 0.5) / 0.5)
    assert [row.label for row in found.rows.values() if row.gold] == ["experts, best", "top k by gold F1"]
    assert found.figure(found.rows["unified"], MEAN, "unparsable") == 0.5
    assert found.figure(found.rows["unified"], MEAN, "silent") == 0.0
    assert found.figure(found.rows["SaM"], "a", "seconds") == 10.0  # two models: 1 s, and 2 s for half of the answers


def test_a_model_that_two_rankings_chose_takes_its_seconds_once_and_whole(tmp_path: Path) -> None:
    write_run(tmp_path, "named", {"a": {"named": 1}}, experts=["unified"])
    write_run(tmp_path, "sam", {"a": {"domain": 2, "sampling": 2}})

    def alike(result: dict[str, Any]) -> None:
        for model in result["targets"]["a"]["models"].values():
            model.update(model_key="same", seconds={"merge": 0.5, "generate": 1.0})

    edit(tmp_path / "sam-0", alike)
    found = compare(tmp_path)
    assert found.figure(found.rows["SaM"], "a", "seconds") == 5.0  # 1 s, and 2 s for half of the answers


def test_silence_is_counted_where_there_is_something_to_find() -> None:
    outcome = Outcome()
    outcome.add(("t", 0), np.array([[0, 0, 1, 0], [0, 2, 1, 0], [1, 2, 1, 0]], dtype=float), {})
    assert outcome.mean("silent") == pytest.approx(1 / 3)


def test_text_of_the_corpora_stays_behind(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out)]) == 0 and "main_table.md" in capsys.readouterr().out
    (out / "predictions" / "mine.txt").write_text("kept")
    (out / "predictions" / "old.jsonl.xz").write_text("of another sweep")
    assert main([str(sweep), "--out", str(out)]) == 0
    assert (out / "predictions" / "mine.txt").is_file() and not (out / "predictions" / "old.jsonl.xz").exists()
    lines = [json.loads(x) for x in lzma.decompress((out / "predictions" / "sam-0.jsonl.xz").read_bytes()).splitlines()]
    assert lines[0]["combined"] == [
        ["person", 0, 3],
        ["person", 8, 11],
        ["place", 15, 19],
        ["place", hashed("Nowhere")],
    ]
    assert lines[0]["models"]["domain"]["pairs"] == [["person", 0, 3]] and lines[0]["id"] == "s/0"
    everything = b"".join(
        lzma.decompress(p.read_bytes()) if p.suffix == ".xz" else p.read_bytes() for p in out.rglob("*.*")
    )
    assert b"Ada" not in everything and b"met" not in everything.replace(b"method", b"")
    assert b"Nowhere" not in everything  # what a model made up may be the sentence, altered
    assert "sam-0,a,sampling,sampling,sampling 0.500,votes,2\n" in (out / "selections.csv").read_text()
    with (out / "main_table.csv").open() as file:
        records = list(csv.DictReader(file))
    (ours,) = (r for r in records if (r["system"], r["target"]) == ("SaM", "a"))
    assert float(ours["f1"]) == pytest.approx(6 / 7, abs=1e-6) and float(ours["f1_low"]) <= float(ours["f1"])
    assert json.loads((out / "main_table.json").read_text())["sentences"] == {"a": ["s/0", "s/1"], "b": ["s/0", "s/1"]}


def test_markdown_and_latex_name_all_rows_and_mark_gold(sweep: Path) -> None:
    found = compare(sweep)
    text = markdown(found)
    assert "| SaM minus SaM" not in text and "| SaM minus random 3 | 1.2 [-23.8, 26.2] |" in text
    assert "| top k by gold F1 † minus random 3 |" in text and "| SaM minus experts, union of all |" in text
    assert "| SaM minus union of two random 3 |" in text
    assert "| system | known (8 pairs) | new (4 pairs) |" in text and "| top k by gold F1 † | 100.0 | 100.0 |" in text
    assert "| unified | 75.0 | 0.0 |" in text and "| experts, mean | 75.0 | 25.0 |" in text
    assert "| top k by gold F1 † |" in text and "| SaM | 85.7 |" in text and "| GNER-T5-base | 248M |" in text
    assert r"unified, one expert's budget & 50.0" in latex(found) and r"$^\dagger$" in latex(found)


def test_what_does_not_compare_is_refused(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, said in {
        "ids": "scored other sentences of a",
        "k": "differ in k;",
        "one": "have other targets",
        "twice": "two jobs of all merged with one pool and seed",
        "expert": "legal is no row of the main comparison",
        "trained": "had other weights of expert news; run both anew",
        "unsaid": "does not say its experts' weights",
    }.items():
        root = Path(shutil.copytree(sweep, tmp_path / change))
        both = {"a": {"all": 1}, "b": {"all": 1}}
        write_run(root, "all", {"a": {"all": 1}} if change == "one" else both, ids=change if change == "ids" else "s")
        if change == "k":
            edit(root / "all-0", lambda result: result["config"].update(k=2))
        if change == "trained":
            for path in root.glob("*/result.json"):
                news = "3" * 8 if path.parent.name == "sam-0" else "1" * 8
                edit(path.parent, lambda result, news=news: result.update(experts={"news": news, "stem": "2" * 8}))
        if change == "unsaid":
            edit(root / "sam-0", lambda result: result.update(experts={"news": "1" * 8}))
        if change == "twice":
            shutil.copytree(root / "all-0", root / "again")
        if change == "expert":
            write_run(root, "named", both, experts=["legal"])
        with pytest.raises(SamError) as error:
            compare(root)
        assert said in one_line(error)
    (sweep / "sam-0" / "predictions.jsonl").unlink()
    with pytest.raises(SamError, match=r"predictions\.jsonl is missing"):
        compare(sweep)
    write_run(tmp_path / "few", "sam", {"a": {"domain": 1}})
    assert main([str(tmp_path / "few")]) == 2
    assert "no job of unified" in capsys.readouterr().err


def test_bootstrap_is_paired_and_covers(sweep: Path) -> None:
    rng = np.random.default_rng(0)
    n, truth, covered = 150, 0.6, 0
    weights = bootstrap.resamples(n, "t")
    assert weights.shape == (bootstrap.ROUNDS, n) and set(weights.sum(axis=1)) == {n}
    assert np.array_equal(weights, bootstrap.resamples(n, "t")) and not np.array_equal(
        weights, bootstrap.resamples(n, "u")
    )
    for _ in range(60):
        tp = rng.binomial(4, truth, n).astype(float)
        counts = np.stack([tp, np.full(n, 4.0), np.full(n, 4.0)])  # F1 is then the share of the four that are found
        found = bootstrap.interval(bootstrap.f1(counts), bootstrap.f1_of(counts, weights))
        covered += found.low <= truth <= found.high
    better = counts + np.array([[0.2], [0.0], [0.0]])  # a little better on every sentence: certain only in pairs
    a, b = bootstrap.f1_of(better, weights), bootstrap.f1_of(counts, weights)
    assert bootstrap.interval(0.05, a - b).low > 0 > bootstrap.interval(0.05, a - b[::-1]).low
    assert 51 <= covered <= 60  # 95 % of 60 is 57
    assert (
        bootstrap.f1(np.zeros((3, 4))) == 0.0
        and not bootstrap.f1_of(np.zeros((3, 4)), bootstrap.resamples(4, "z")).any()
    )


def test_runs_of_other_seeds_are_drawn_too_and_in_pairs() -> None:
    runs = np.array([[0.2] * bootstrap.ROUNDS, [0.4] * bootstrap.ROUNDS, [0.6] * bootstrap.ROUNDS])
    found = bootstrap.redrawn([runs], "t")
    assert set(np.unique(found.round(6))) <= {round(x / 3, 6) for x in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8)}
    # The mean of three draws from three values, each a run's: variance (0.4 ** 2 / 6) / 3.
    assert found.mean() == pytest.approx(0.4, abs=0.01) and found.std() == pytest.approx((0.16 / 18) ** 0.5, rel=0.05)
    assert np.allclose(bootstrap.redrawn([runs + 0.1], "t") - found, 0.1)
    assert not np.array_equal(bootstrap.redrawn([runs], "u"), found)


def test_trainings_are_drawn_and_of_each_its_seeds() -> None:
    steady, spread = [np.full(20_000, 0.2)] * 2, [np.full(20_000, 0.4), np.full(20_000, 0.8)]
    drawn = bootstrap.redrawn([steady, spread], "t")
    # Two trainings of means 0.2 and 0.6, of which the second's mean of two seeds is 0.4, 0.6 or 0.8.
    # With S that mean (variance 0.02) and K ~ Bin(2, 1/2) draws of the second: 0.2 + K / 2 (S - 0.2).
    variance = (0.4**2 + 0.02) / 8 + 0.02 / 4
    assert drawn.mean() == pytest.approx(0.4, abs=0.01)
    assert set(np.unique(drawn.round(6))) == {0.2, 0.3, 0.4, 0.5, 0.6, 0.8}
    assert drawn.var() == pytest.approx(variance, rel=0.05)
    # A training that is drawn twice comes with the same seeds, so that pairs stay pairs.
    assert np.allclose(bootstrap.redrawn([[r + 0.1 for r in steady], [r + 0.1 for r in spread]], "t") - drawn, 0.1)


def test_a_training_is_drawn_for_all_targets_at_once() -> None:
    runs = [[np.full(20_000, 0.4)], [np.full(20_000, 0.5)]]
    mean = bootstrap.mean([bootstrap.redrawn(runs, target) for target in "abcdefg"])
    assert set(np.unique(mean.round(6))) == {0.4, 0.45, 0.5}  # were it drawn by target, all between would come


@pytest.fixture
def second_pool(sweep: Path) -> Path:
    """The sweep with all its systems run with another pool, too, on which SaM alone does otherwise."""
    for path in sorted(sweep.iterdir()):
        copy = sweep / f"{path.name}-other"
        shutil.copytree(path, copy)
        edit(copy, lambda r: r["config"].update(experts={"path": "other"}))
        edit(copy, lambda r: r.update(base={"name": "tiny", "fingerprint": "another start"}))
    lines = (sweep / "sam-0-other" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = "".join(json.dumps({**row, "combined": {"pairs": PAIRS[:1], "mentions": []}}) + "\n" for row in rows)
    (sweep / "sam-0-other" / "predictions.jsonl").write_text(text)
    return sweep


def test_pools_of_several_trainings_are_runs_of_one_system(second_pool: Path, tmp_path: Path) -> None:
    both = compare(second_pool)
    ours, theirs = both.rows["SaM"], both.rows["unified"]
    assert [seed for _, seed in ours.runs] == [0, 0] and len({training for training, _ in ours.runs}) == 2
    # Three of three found and one made up; one of three found and none made up.
    assert both.f1(ours, "a").value == pytest.approx((6 / 7 + 0.5) / 2)
    assert both.f1(theirs, "a").value == pytest.approx(0.5)
    interval = both.f1(ours, "a")
    assert interval.low == pytest.approx(0.5) and interval.high == pytest.approx(6 / 7)
    assert "2 trainings" in markdown(both)
    assert main([str(second_pool), "--out", str(tmp_path / "out")]) == 0
    head = json.loads((tmp_path / "out" / "main_table.json").read_text())
    assert {said["training"] for said in head["predictions"]} == {0, 1}


def test_a_row_of_fewer_pools_is_refused(second_pool: Path) -> None:
    shutil.rmtree(second_pool / "sam-0-other")
    with pytest.raises(SamError) as error:
        compare(second_pool)
    assert "SaM was not run with the same pools as unified; run it with all of them" in one_line(error)


def test_values_weigh_trainings_and_not_runs() -> None:
    outcome = Outcome()
    for training, seed, tp in (("a", 0, 0.0), ("a", 1, 0.0), ("a", 2, 0.0), ("b", 0, 4.0)):
        outcome.add((training, seed), np.array([[tp], [4.0], [4.0]]), {})
    row = Row("x", "sam", {"t": outcome})
    interval = Comparison({"x": row}, ["t"], {"t": ["s"]}, []).f1(row, "t")
    assert interval.value == pytest.approx(0.5) and (interval.low, interval.high) == (0.0, 1.0)


def test_the_base_alone_is_a_row_though_it_has_no_experts(sweep: Path) -> None:
    write_run(sweep, "none", {"a": {"none": 1}, "b": {"none": 1}})
    for path in sweep.iterdir():
        weights = {} if path.name.startswith("none") else {"news": "1234"}
        edit(path, lambda r, weights=weights: r.update(experts=weights))
    comparison = compare(sweep)
    assert next(iter(comparison.rows)) == "warm start alone"
    assert comparison.f1(comparison.rows["warm start alone"], "a").value == pytest.approx(0.5)


def test_published_rows_have_sizes_sources_and_means() -> None:
    for row in published():
        assert row["size"] and row["source"] and 0 < float(row["mean"]) < 100
        cells = [float(v) for k, v in row.items() if k.startswith(("mit", "crossner")) and v]
        assert len(cells) in (0, 7)
        assert not cells or sum(cells) / 7 == pytest.approx(float(row["mean"]), abs=0.15), row["model"]


def test_a_pair_is_placed_as_spans_are(tmp_path: Path) -> None:
    write_run(tmp_path, "sam", {"a": {"domain": 0}})
    path = tmp_path / "sam-0" / "predictions.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    line |= {
        "text": "a category: cat  food",
        "combined": {"pairs": [["pet", "cat"], ["meal", "cat food"], ["x", "dog"]]},
    }
    path.write_text(json.dumps(line) + "\n")
    (job,) = load_jobs(tmp_path)
    (found,) = textless(job)
    assert found["combined"] == [["pet", 12, 15], ["meal", 12, 21], ["x", hashed("dog")]]


def test_predictions_that_no_seed_changes_are_kept_once(sweep: Path, tmp_path: Path) -> None:
    write_run(sweep, "sam", {"a": {"domain": 1, "sampling": 3}, "b": {"domain": 1, "sampling": 2}}, seed=1)
    assert main([str(sweep), "--out", str(tmp_path / "out")]) == 0
    head = json.loads((tmp_path / "out" / "main_table.json").read_text())
    kept = {said["job"]: said["file"] for said in head["predictions"]}
    assert kept["sam-0"] == kept["sam-1"] == "predictions/sam-0.jsonl.xz"
    assert all((tmp_path / "out" / path).is_file() for path in kept.values())
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == len(set(kept.values())) < len(kept)


def test_kept_predictions_say_of_a_pair_what_the_sweep_says(sweep: Path, tmp_path: Path) -> None:
    """Text is not kept, nor needed but for gold."""
    expected = write(sweep, tmp_path / "out")
    sentences = [Sentence(f"s/{i}", TEXT, tuple(Mention(a, b, kind) for kind, a, b in GOLD)) for i in range(2)]
    found = pairs.kept(tmp_path / "out", {t: {s.id: s for s in sentences} for t in ("a", "b")})
    rows = {row.kind: row for row in expected.rows.values()}
    assert {"sam", "random", "each, vote", "unified_small", "oracle"} <= set(found.rows)
    for one, other in (("sam", "unified_small"), ("random", "sam"), ("each, vote", "random_pair")):
        for target in ("a", "b", MEAN):
            mine = found.against(found.rows[one], found.rows[other], target)
            assert mine == expected.against(rows[one], rows[other], target)
    assert found.f1(found.rows["sam"], "a") == expected.f1(rows["sam"], "a")


def test_systems_of_two_comparisons_are_paired(sweep: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    expected = write(sweep, tmp_path / "one")
    write_run(sweep, "sam", {"a": {"domain": 0, "sampling": 1}, "b": {"domain": 0, "sampling": 1}}, seed=1)
    changed = write(sweep, tmp_path / "two")
    sentences = [Sentence(f"s/{i}", TEXT, tuple(Mention(a, b, kind) for kind, a, b in GOLD)) for i in range(2)]
    gold = {t: {s.id: s for s in sentences} for t in ("a", "b")}
    comparison, one, other = pairs.chosen((tmp_path / "one", tmp_path / "two"), ("sam", "sam"), gold)
    before, after = (found.f1(found.rows["SaM"], "a").value for found in (expected, changed))
    assert comparison.against(one, other, "a")[0].value == pytest.approx(before - after) != 0
    heads = [tmp_path / name / "main_table.json" for name in ("one", "two")]
    for path in heads:
        path.write_text(json.dumps({**json.loads(path.read_text()), "sentences": {"mini_movie": []}}))
    assert "two has no 'x'; it has 'each'" in said(tmp_path / "one", "sam", "x", "--of", tmp_path / "two")
    heads[1].write_text(json.dumps({**json.loads(heads[1].read_text()), "sentences": {"mini_ai": []}}))
    assert "hold other targets or sentences" in said(tmp_path / "one", "sam", "sam", "--of", tmp_path / "two")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``python -m experiments.pairs`` says of a mistake, which is one line."""

    def once(*argv: object) -> str:
        assert pairs.main([str(word) for word in argv]) == 2
        found = capsys.readouterr().err
        assert found.startswith("error: ") and found.count("\n") == 1
        return found

    return once


def test_what_the_kept_predictions_do_not_have(sweep: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    assert "main_table.json is missing" in said(tmp_path, "sam", "unified")
    write(sweep, tmp_path)
    head = json.loads((tmp_path / "main_table.json").read_text())
    for change, wrong in (
        ({"predictions": {"job": "predictions/job.jsonl.xz"}}, "does not say which system"),
        ({"sentences": {"mini_ai": ["dev/0"]}}, "mini_ai has no sentence dev/0"),
        ({"sentences": {"mini_ai": [], "mini_movie": []}}, "has no 'sam2'; it has 'each'"),
    ):
        (tmp_path / "main_table.json").write_text(json.dumps({**head, **change}))
        assert wrong in said(tmp_path, "sam2", "unified")
