"""The benchmarks' arithmetic, with contestants that make up their figures; no timings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.bench import __main__ as cli
from experiments.bench.harness import PEAK, Contestant, Figures, compete, joined, machine, measured
from sam.errors import SamError


def fake(*seconds: float, memory: float | None = None, log: list[str] | None = None, name: str = "") -> Callable:
    """A round's work that takes the given seconds, one a call, by its own account."""
    turns: Iterator[float] = iter(seconds)

    def run() -> Figures:
        if log is not None:
            log.append(name)
        return {"seconds": next(turns)} | ({} if memory is None else {PEAK: memory})

    return run


def test_contestants_take_turns_and_warm_up_rounds_are_not_kept() -> None:
    log: list[str] = []
    contestants = [Contestant(n, fake(9, 1, 2, log=log, name=n), ours=n == "a") for n in "abc"]
    (case,) = compete(contestants, 2, "seconds", False, warmup=1).cases
    assert "".join(log) == "abcabcabc"
    assert case.rounds == {n: [{"seconds": 1}, {"seconds": 2}] for n in "abc"}


def test_medians_and_the_ratio_to_the_best_peer() -> None:
    contestants = [
        Contestant("ours", fake(2, 1, 9, memory=5.0), ours=True),
        Contestant("slow", fake(20, 30, 40)),
        Contestant("quick", fake(6, 1, 7)),
    ]
    (case,) = compete(contestants, 3, "seconds", higher_is_better=False).cases
    record = case.record()
    assert record["ours"] == {"name": "ours", "seconds": 2, PEAK: 5.0}
    assert [peer["seconds"] for peer in record["peers"]] == [30, 6]
    assert (record["best_peer"], record["ratio"]) == ("quick", 3.0)
    assert case.ratio("slow") == pytest.approx(0.2)
    assert record["memory"] == {"ours": 5.0}


def test_higher_is_better() -> None:
    contestants = [Contestant("ours", fake(8), ours=True), Contestant("a", fake(2)), Contestant("b", fake(4))]
    (case,) = compete(contestants, 1, "seconds", higher_is_better=True).cases
    assert (case.best_peer, case.ratio("ours")) == ("b", 2.0)


def test_without_peers_or_without_ours_there_is_no_ratio() -> None:
    alone = compete([Contestant("ours", fake(1), ours=True)], 1, "seconds", False).cases[0].record()
    assert (alone["best_peer"], alone["ratio"], alone["peers"]) == (None, None, [])
    context = compete([Contestant("other", fake(1))], 1, "seconds", False).cases[0].record()
    assert (context["ours"], context["ratio"]) == (None, None)


def test_mistakes_of_a_benchmark_are_refused() -> None:
    with pytest.raises(SamError, match="must have different names"):
        compete([Contestant("a", fake(1)), Contestant("a", fake(1))], 1, "seconds", False)
    with pytest.raises(SamError, match="at most one be ours"):
        compete([Contestant(n, fake(1), ours=True) for n in "ab"], 1, "seconds", False)
    with pytest.raises(SamError, match="a gave no 'minutes', the metric; it gave seconds"):
        compete([Contestant("a", fake(1))], 1, "minutes", False)


def test_report_is_written_under_its_name_and_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contestants = [Contestant("we", fake(1, 3), ours=True), Contestant("they", fake(4, 4))]
    one = compete(contestants, 2, "seconds", False, case="one", device="cpu")
    two = compete([Contestant("we", fake(5), ours=True)], 1, "seconds", False, case="two", device="cpu")
    report = joined([one, two], {"copied": 1})
    path = report.write(tmp_path)
    assert path.name == f"-{machine('cpu')['slug']}.json"
    record = json.loads(path.read_text())
    assert [case["case"] for case in record["cases"]] == ["one", "two"]
    assert record["cases"][0]["ratio"] == 2.0
    assert record["cases"][0]["rounds"]["we"] == [{"seconds": 1}, {"seconds": 3}]
    assert record["notes"] == {"copied": 1} and record["versions"]["torch"]
    report.show()
    shown = capsys.readouterr().out
    assert "we (ours)" in shown and "2.00" in shown and "1 … 3" in shown


@pytest.mark.parametrize(("half", "end"), [(True, "-bf16"), (False, "")])
def test_machine_is_a_slug(monkeypatch: pytest.MonkeyPatch, half: bool, end: str) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX9")
    monkeypatch.setattr("sam.models.device.multiplies_bf16", lambda: half)
    found = machine("cpu")
    assert found["slug"].startswith(f"cpu-{found['cores']}-") and found["slug"].endswith(f"-avx9{end}")
    assert set(found["slug"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_peak_memory_counts_what_the_work_holds_only() -> None:
    if PEAK not in measured(lambda: None)():
        pytest.skip("the peak is read from /proc")
    held = bytearray(200 << 20)
    assert measured(lambda: None)()[PEAK] < 50  # what was held before is not counted
    del held
    assert 90 < measured(lambda: bytearray(100 << 20))()[PEAK] < 150


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Module:
        @staticmethod
        def run(options: object) -> object:
            assert options == cli.Options(2, True)
            return compete([Contestant("we", fake(1, 2), ours=True)], 2, "seconds", False, device="cpu")

    assert "harness" not in cli.names()
    monkeypatch.setattr(cli, "names", lambda: ["made_up"])
    monkeypatch.setattr(cli.importlib, "import_module", lambda _name: Module)
    assert cli.main(["made_up", "--rounds", "2", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["name"] == "made_up"
    assert capsys.readouterr().out.rstrip().endswith(path.name)
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "kept")
    assert cli.main(["made_up", "--rounds", "2", "--quick"]) == 0
    assert not (tmp_path / "kept").exists()
    with pytest.raises(SystemExit):
        cli.main(["nothing"])
