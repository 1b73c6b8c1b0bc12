"""Tables of made-up sweeps: every expected number is worked by hand from the scores that the test writes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from experiments.collect import load_jobs, natural_key, score, score_frame, selection_frame
from experiments.render import csv_text, escape, latex, markdown
from experiments.tables import Spec, build_table, main, tables_per_target
from sam.errors import SamError
from tests.sweeps import composed, make_sweep, write_job, write_status


def job(root: Path, name: str, f1: float, **config: object) -> Path:
    """A finished job with one target."""
    return write_job(root / name, dict(config), {"mini_ai": f1})


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def table_text(root: Path, **spec: object) -> list[str]:
    return rows_of(markdown(build_table(load_jobs(root), Spec(**spec))))  # type: ignore[arg-type]


def test_mean_and_sample_std_over_seeds(tmp_path: Path) -> None:
    for seed, f1 in enumerate((0.50, 0.56, 0.53)):
        job(tmp_path, f"s{seed}", f1, seed=seed)
    table = build_table(load_jobs(tmp_path), Spec())
    cell = table.cell(("ties",), ("3",))
    assert cell.mean == pytest.approx(53.0)
    assert cell.std == pytest.approx(3.0)  # sqrt((9 + 9 + 0) / 2)
    assert "| ties | 53.0 ± 3.0 |" in markdown(table)
    assert "mean ± sample standard deviation over seed (n=3)" in table.caption


def test_merge_seed_is_a_seed_and_smaller_cells_say_so(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, merge={"name": "dare", "seed": 0})
    job(tmp_path, "b", 0.6, merge={"name": "dare", "seed": 1})
    job(tmp_path, "c", 0.7, merge={"name": "ties", "seed": 0})
    assert table_text(tmp_path)[2:] == [f"| dare | 55.0 ± {10 / math.sqrt(2):.1f} |", "| ties | 70.0 (n=1) |"]


def test_failed_running_and_absent_cells(tmp_path: Path) -> None:
    make_sweep(tmp_path, merges=("linear", "ties"), ks=(1, 10, 2), failed=[("ties", 10)])
    write_status(tmp_path / "k=2,merge=dare", "running", ["k=2", "merge=dare"])
    table = build_table(load_jobs(tmp_path), Spec())
    text = markdown(table)
    assert rows_of(text) == [
        "| merge | k=1 | k=2 | k=10 |",
        "| --- | ---: | ---: | ---: |",
        "| dare | – | … | – |",
        "| linear | 48.0 | 49.0 | **57.0** |",
        "| ties | 44.0 | **45.0** | failed |",
    ]
    assert "- failed: k=10,merge=ties: CUDA out of memory" in text
    assert "% failed: k=10,merge=ties: CUDA out of memory" in latex(table)


def test_an_unfinished_job_has_the_config_of_its_status(tmp_path: Path) -> None:
    write_job(tmp_path / "a", {"k": 1}, {"mini_ai": 0.5}, ["k=1"])
    write_status(tmp_path / "b", "failed", ["merge=dare", "merge.density=0.4", "k=6"], "no\nmemory")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "status.json").write_text(
        json.dumps({"state": "failed", "error": "k has no value", "config": None})
    )
    with_config, without = (j for j in load_jobs(tmp_path) if j.state == "failed")
    assert [with_config.config[p] for p in ("merge.name", "merge.density", "k", "base.name")] == [
        "dare",
        0.4,
        6,
        "tiny",
    ]
    assert with_config.error == "no memory" and without.config == {}


def test_conflict_names_the_differing_paths(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, merge={"name": "ties", "density": 0.2})
    job(tmp_path, "b", 0.6, merge={"name": "ties", "density": 0.4}, seed=1)
    with pytest.raises(SamError, match=r"^2 jobs in the cell ties x 3 differ in merge\.density; add it to --rows"):
        build_table(load_jobs(tmp_path), Spec())
    columns = ("k", "merge.density")
    assert table_text(tmp_path, columns=columns)[0] == "| merge | k=3, merge.density=0.2 | k=3, merge.density=0.4 |"
    assert "| ties | 55.0 ± 7.1 |" in table_text(tmp_path, over=("seed", "merge.density"))


def test_same_job_twice_is_refused(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5)
    job(tmp_path, "b", 0.5)
    with pytest.raises(SamError, match="the same job in the cell ties x 3"):
        build_table(load_jobs(tmp_path), Spec())


def test_config_that_cannot_change_a_result_is_no_conflict(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, seed=0, sweep="monday", logger={"name": "csv"})
    job(tmp_path, "b", 0.6, seed=1, sweep="tuesday", logger={"name": "wandb"})
    assert table_text(tmp_path)[2] == "| ties | 55.0 ± 7.1 |"


def test_result_older_than_a_failed_attempt_is_stale(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, k=1)
    folder = job(tmp_path, "k=3,merge=ties", 0.6)
    status: dict[str, Any] = {"state": "failed", "error": "no memory", "overrides": ["k=3", "merge=ties"]}
    status["config"] = composed(["k=3", "merge=ties"])
    (folder / "status.json").write_text(json.dumps(status))
    os.utime(folder / "status.json", (2e9, 2e9))
    assert table_text(tmp_path)[2] == "| ties | 50.0 | failed |"
    os.utime(folder / "status.json", (1e9, 1e9))
    assert table_text(tmp_path)[2] == "| ties | 50.0 | **60.0** |"


def test_dirty_commit_is_said(tmp_path: Path) -> None:
    path = job(tmp_path, "a", 0.5) / "result.json"
    assert ", commit 0123456789, " in build_table(load_jobs(tmp_path), Spec()).caption
    path.write_text(path.read_text().replace("abcdef", "abcdef+dirty"))
    assert ", commit 0123456789+dirty, " in build_table(load_jobs(tmp_path), Spec()).caption


def test_base_models_of_different_weights_are_not_averaged(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5)
    path = job(tmp_path, "b", 0.5, seed=1) / "result.json"
    path.write_text(path.read_text().replace("f" * 8, "e" * 8))
    with pytest.raises(SamError, match=r"differ in base\.fingerprint;"):
        build_table(load_jobs(tmp_path), Spec())


def test_target_and_model_axes(tmp_path: Path) -> None:
    write_job(tmp_path / "a", {}, {"mini_music": 0.5, "mini_ai": 0.7})
    # Single models are made up to lie 5 and 10 points under the union.
    assert table_text(tmp_path, rows=("target",), columns=("model",)) == [
        "| target | domain | sampling | combined |",
        "| --- | ---: | ---: | ---: |",
        "| mini_music | 45.0 | 40.0 | **50.0** |",
        "| mini_ai | 65.0 | 60.0 | **70.0** |",
        "| mean | 55.0 | 50.0 | **60.0** |",
    ]
    assert table_text(tmp_path, model="domain", target="mini_ai", metric="precision")[2] == "| ties | 75.0 |"


def test_mean_over_targets_equals_the_stored_overall(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "a", {}, {"mini_ai": 0.31, "mini_music": 0.62})
    overall = json.loads((folder / "result.json").read_text())["overall"]
    for metric in ("precision", "f1"):
        assert score(load_jobs(tmp_path)[0], "mean", "combined", metric) == pytest.approx(overall[metric])


def test_means_over_different_targets_are_refused(tmp_path: Path) -> None:
    write_job(tmp_path / "a", {"k": 1}, {"mini_ai": 0.5})
    write_job(tmp_path / "b", {"k": 2}, {"mini_music": 0.6})
    with pytest.raises(SamError, match="jobs score different targets"):
        build_table(load_jobs(tmp_path), Spec())
    assert table_text(tmp_path, columns=("k",), rows=("target",))[2:] == [
        "| mini_ai | 50.0 | – |",
        "| mini_music | – | 60.0 |",
    ]


def test_per_target_tables(tmp_path: Path) -> None:
    make_sweep(tmp_path, merges=("ties",), ks=(1,))
    tables = tables_per_target(load_jobs(tmp_path), Spec())
    assert [(t.target, rows_of(markdown(t))[2]) for t in tables] == [
        ("mini_ai", "| ties | 39.0 |"),
        ("mini_music", "| ties | 49.0 |"),
        ("mean", "| ties | 44.0 |"),
    ]
    assert "target mini_music, 30 sentences" in tables[1].caption
    assert "mean of 2 targets (mini_ai, mini_music), 66 sentences" in tables[2].caption
    lines = list(csv.DictReader(csv_text(tables).splitlines()))
    assert [(line["for_target"], line["k=1"]) for line in lines] == [
        ("mini_ai", "39.0000"),
        ("mini_music", "49.0000"),
        ("mean", "44.0000"),
    ]


def test_best_marks_ties_as_printed_and_fewest_faults(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.50001, k=1)
    job(tmp_path, "b", 0.50004, k=2)
    worse = job(tmp_path, "c", 0.4, k=3) / "result.json"
    worse.write_text(worse.read_text().replace('"unparsable": 2', '"unparsable": 5'))
    assert table_text(tmp_path)[2] == "| ties | **50.0** | **50.0** | 40.0 |"
    assert table_text(tmp_path, metric="unparsable")[2] == "| ties | **2.0** | **2.0** | 5.0 |"
    assert table_text(tmp_path, metric="gold")[2] == "| ties | 100.0 | 100.0 | 100.0 |"


def test_oracle_gets_a_dagger_and_does_not_compete(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, selector={"name": "sam"})
    job(tmp_path, "b", 0.4, selector={"name": "domain"})
    job(tmp_path, "c", 0.9, selector={"name": "oracle"})
    table = build_table(load_jobs(tmp_path), Spec(rows=("k",), columns=("selector.name",)))
    assert rows_of(markdown(table))[2] == "| 3 | 40.0 | 90.0† | **50.0** |"
    assert "† selected with gold labels" in markdown(table)
    assert r"3 & 40.0 & 90.0$^\dagger$ & \textbf{50.0} \\" in latex(table)
    assert csv_text([table]).splitlines() == [
        "k,domain,oracle,sam,selected with gold labels",
        "3,40.0000,90.0000,50.0000,oracle",
    ]


def test_csv_parses_back_with_std_and_n(tmp_path: Path) -> None:
    make_sweep(tmp_path, merges=("ties",), ks=(1, 3), seeds=(0, 1), failed=[("ties", 3)])
    (line,) = csv.DictReader(csv_text([build_table(load_jobs(tmp_path), Spec())]).splitlines())
    assert line["merge.name"] == "ties"
    assert float(line["k=1"]) == pytest.approx(45.0)  # 44 and 46
    assert float(line["k=1 std"]) == pytest.approx(math.sqrt(2), abs=1e-4)
    assert (line["k=1 n"], line["k=3"], line["k=3 n"]) == ("2", "failed", "0")


def test_latex_is_escaped_and_has_booktabs_rules(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, merge={"name": "dare_ties"}, k=1)
    job(tmp_path, "b", 0.6, merge={"name": "dare_ties"}, k=3)
    text = latex(build_table(load_jobs(tmp_path), Spec()))
    assert r"dare\_ties & 50.0 & \textbf{60.0} \\" in text
    assert r"\caption{F1 (\%), model combined" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert escape(r"a\b~c^d{e}&#$") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{e\}\&\#\$"


def test_numbers_sort_as_numbers() -> None:
    assert sorted(["10", "ties", "0.05", "2", "1e-05", "0.2"], key=natural_key) == [
        "1e-05",
        "0.05",
        "0.2",
        "2",
        "10",
        "ties",
    ]
    assert sorted(["qwen_3b", "qwen_0.6b", "qwen_14b"], key=natural_key) == ["qwen_0.6b", "qwen_3b", "qwen_14b"]


def test_frames(tmp_path: Path) -> None:
    make_sweep(tmp_path, merges=("ties",), ks=(1, 3), failed=[("ties", 3)])
    jobs = load_jobs(tmp_path)
    scores = score_frame(jobs).set_index(["target", "model"])
    assert len(scores) == 9  # (2 targets + mean) x (2 models + combined)
    assert scores.loc[("mean", "combined"), "f1"] == pytest.approx(0.44)
    assert scores.loc[("mini_ai", "sampling"), "recall"] == pytest.approx(0.39 - 0.1 - 0.1)
    chosen = selection_frame(jobs)
    assert chosen[["target", "ranking", "rank", "expert"]].to_numpy().tolist()[:2] == [
        ["mini_ai", "domain", 1, "stem"],
        ["mini_ai", "sampling", 1, "legal"],
    ]


def test_command_writes_files_and_prints_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = make_sweep(tmp_path / "sweep", merges=("ties",), ks=(1,)), tmp_path / "out"
    assert main([str(sweep), "--rows", "merge", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["table.csv", "table.md", "table.tex"]
    assert capsys.readouterr().out == (out / "table.md").read_text()
    assert main([str(sweep), "--format", "csv"]) == 0
    assert [path.name for path in sweep.glob("table.*")] == ["table.csv"]


def test_rows_are_what_the_sweep_varies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not what follows from a group's name, nor seeds; a setting that does not follow is a row of its own."""

    def head(folder: Path, *options: str) -> str:
        assert main([str(folder), "--out", str(tmp_path / "out"), *options]) == 0
        return rows_of(capsys.readouterr().out)[0]

    selectors, settings, sizes, one = (tmp_path / name for name in ("selectors", "settings", "sizes", "one"))
    for name, seed in (("sam", 0), ("sam", 1), ("domain", 0)):
        job(selectors, f"{name}{seed}", 0.5, selector={"name": name, "models": name == "sam"}, seed=seed)
    assert head(selectors) == "| selector | k=3 |"
    for k, merge, density in ((1, "ties", 0.1), (3, "ties", 0.2), (1, "dare", 0.5)):
        job(settings, f"{merge}{density}", 0.5, k=k, merge={"name": merge, "density": density})
    assert head(settings) == "| merge | merge.density | k=1 | k=3 |"
    assert (
        head(settings, "--columns", "merge.density")
        == "| merge | k | merge.density=0.1 | merge.density=0.2 | merge.density=0.5 |"
    )
    for size in (5, 10):
        job(sizes, str(size), 0.5, sample_size=size)
    assert head(sizes) == "| sample_size | k=3 |"
    job(one, "a", 0.5)
    assert head(one) == "| merge | k=3 |"
    for k, (merge, density) in itertools.product((1, 3), (("ties", 0.1), ("dare", 0.5))):
        job(tmp_path / "grid", f"{merge}{k}", 0.5, k=k, merge={"name": merge, "density": density})
    assert head(tmp_path / "grid", "--columns", "merge") == "| k | dare | ties |"


def test_rows_tell_failed_jobs_from_finished_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path, "a", 0.5, selector={"name": "sam"})
    write_status(tmp_path / "selector=domain", "failed", ["selector=domain"], "killed")
    assert main([str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out)[2:] == ["| domain | failed |", "| sam | 50.0 |"]


def test_jobs_of_different_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``-m target=a,b``: what a target is made of is no axis, and no job is lost."""
    for target, f1 in (("a", 0.5), ("b", 0.6)):
        for merge in ("ties", "dare"):
            sets = {"sets": {target: {"kind": "mini", "path": f"{target}.jsonl"}}}
            write_job(tmp_path / f"{target},{merge}", {"merge": {"name": merge}, "target": sets}, {target: f1})
    assert main([str(tmp_path), "--columns", "target"]) == 0
    assert rows_of(capsys.readouterr().out)[2:] == ["| dare | 50.0 | **60.0** |", "| ties | 50.0 | **60.0** |"]
    assert main([str(tmp_path), "--target", "b"]) == 0
    assert rows_of(capsys.readouterr().out)[2:] == ["| dare | 60.0 |", "| ties | 60.0 |"]
    assert main([str(tmp_path)]) == 2
    assert "jobs score different targets" in capsys.readouterr().err


def test_a_job_without_a_path_keeps_its_row(tmp_path: Path) -> None:
    job(tmp_path, "a", 0.5, merge={"name": "ties", "density": 0.2})
    job(tmp_path, "b", 0.6, merge={"name": "linear"})
    rows = table_text(tmp_path, rows=("merge.name", "merge.density"))
    assert rows[2:] == ["| linear | none | 60.0 |", "| ties | 0.2 | 50.0 |"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "f2"], "unknown metric 'f2'; allowed: n, gold, predicted, tp, precision, recall, f1, "),
        (["--model", "best"], "unknown model 'best'; allowed: domain, sampling, combined\n"),
        (["--target", "mars"], "unknown target 'mars'; allowed: mini_ai, mini_music, mean\n"),
        (["--rows", "merge.nam"], "unknown path 'merge.nam'; allowed: target, model, "),
        (["--rows", "target", "--target", "mini_ai"], "--target mini_ai has no meaning where target is an axis; "),
        (["--per-target", "--target", "mini_ai"], "--per-target makes a table of every target; "),
        (["--rows", ","], "rows and columns need one path each at least"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    make_sweep(tmp_path, ks=(1,))
    assert main([str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_sweep_without_gold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job(tmp_path, "a", 0.5) / "result.json"
    result = json.loads(path.read_text())
    for target in result["targets"].values():
        for holder in (target["combined"], *target["models"].values()):
            holder["scores"] = None
    path.write_text(json.dumps(result))
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: no job has scores: their targets have no gold\n"


def test_folders_without_readable_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no folder {tmp_path / 'none'}; ")
    write_status(tmp_path / "a", "failed", ["k=1"], "no such base")
    assert main([str(tmp_path)]) == 2
    assert "(1 unfinished jobs; first error: no such base)" in capsys.readouterr().err
    path = job(tmp_path, "b", 0.5) / "result.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    assert main([str(tmp_path)]) == 2
    assert "result.json has schema 2, readable is 1; run the job again" in capsys.readouterr().err
    path.write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "result.json is not JSON" in capsys.readouterr().err
