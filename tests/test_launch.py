"""The rim in this process: names of sweeps and jobs, one-line errors, the summary, and that all configs compose."""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sam import launch
from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.spec import BaseSpec
from sam.overrides import check_overrides
from sam.paths import conf_dir
from sam.results import RESULT, STATUS, write_json, write_status
from tests.tiny import make_card, one_line

GROUPS = {
    folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in conf_dir().iterdir() if folder.is_dir()
}
NEEDS = {
    "base=local": ["base.location=/x"],
    "encoder=local": ["encoder.location=/x"],
    "target=files": ["target.path=x.jsonl", "target.types=[a]"],
    "selector=named": ["selector.experts=[news]"],
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.register_resolvers()
    monkeypatch.setattr(launch, "FAILED", [])
    monkeypatch.setattr(launch, "SWEEP", [])
    monkeypatch.setattr(sys, "argv", ["run.py"])


@pytest.fixture(scope="module")
def conf() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


# Configs


SHORT = {"unified": "named", "unified_small": "named"}
"""Selectors of one given expert: files that name it."""


@pytest.mark.usefixtures("conf")
def test_every_option_composes_with_the_defaults() -> None:
    """The first options of all groups together, then the second ones, …: composing takes a third of a second."""
    groups = {name: options for name, options in GROUPS.items() if name not in ("experiment", "dataset")}
    assert all(groups.values())
    for number in range(max(map(len, groups.values()))):
        choices = {name: options[number] for name, options in groups.items() if number < len(options)}
        given = [f"{name}={option}" for name, option in choices.items()]
        config = launch.plain(compose("config", [*given, *(n for g in given for n in NEEDS.get(g, []))]))
        assert {n: config[n]["name"] for n in choices if "name" in config[n]} == {
            n: SHORT.get(option, option) if n == "selector" else option
            for n, option in choices.items()
            if "name" in config[n]
        }


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("name", GROUPS["merge"])
def test_every_merge_file_is_valid_and_gives_every_option(name: str) -> None:
    from sam.merging import Merge

    config = launch.plain(compose("config", [f"merge={name}"]))["merge"]
    merge = Merge.from_config(config)
    given = {p for p in inspect.signature(merge.function).parameters if p not in ("deltas", "names")}
    assert config["name"] == merge.name == name and set(merge.options) == given


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        (["merge=linear", "merge.density=0.1"], "linear"),
        (["-m", "merge=ties,iso_c", "merge.density=0.1,0.2"], "iso_c"),
        (["merge.gamma=0.1"], "ties"),
        (["experiment=k_by_merge", "merge.density=0.1"], "linear"),
        (["-m", "experiment=loo_news,k_by_merge", "merge.density=0.1"], "linear"),
        (["experiment=loo_news", "merge.gamma=0.1"], "ties"),
    ],
)
def test_an_option_that_a_method_lacks_is_refused(argv: list[str], method: str) -> None:
    with pytest.raises(SamError, match=f"merge={method} does not use it; its options: .*lam"):
        check_overrides(argv)
    check_overrides(["-m", "merge=ties,dare", "merge.density=0.1"])


@pytest.mark.parametrize(
    ("argv", "refused"),
    [
        (["generator.memory=0.5"], "generator=auto does not use it; its options: batch_size, precision"),
        (["logger=none", "logger.mode=online"], "logger=none does not use it; its options: none"),
    ],
)
def test_an_option_of_another_file_of_the_group_is_refused(argv: list[str], refused: str) -> None:
    with pytest.raises(SamError, match=refused):
        check_overrides(argv)


def test_several_options_of_a_group_that_has_one_are_refused() -> None:
    with pytest.raises(SamError, match="a run has one selector; a sweep over several: -m selector=A,B"):
        check_overrides(["selector=[sam,domain]"])
    check_overrides(["target=[mini_movie,mini_music]"])


def test_an_option_of_an_experiments_own_choice_is_taken() -> None:
    check_overrides(["experiment=singles", "selector.experts=[news]"])  # its file sets selector=named
    check_overrides(["experiment=k_by_merge", "merge=ties", "merge.density=0.1"])


@pytest.mark.parametrize("argument", ["merge.name=dare", "selector.name=random", "combine.rule=vote"])
def test_a_label_cannot_be_set_without_what_it_names(argument: str) -> None:
    group, value = argument.split(".")[0], argument.split("=")[1]
    with pytest.raises(SamError, match=f"is the label of {group}={value}; choose {group}={value} itself"):
        check_overrides([argument])


@pytest.mark.parametrize("group", ["merge", "selector", "combine"])
def test_a_function_cannot_be_set_under_the_label_of_another(group: str) -> None:
    with pytest.raises(SamError, match=f"choose {group}=NAME, of a file that names it"):
        check_overrides([f"{group}._target_=mine.f"])


@pytest.mark.usefixtures("conf")
def test_options_name_what_the_code_knows() -> None:
    from sam.selection import selectors

    ours = {name for name, f in vars(selectors).items() if hasattr(f, "uses") and f.__module__ == selectors.__name__}
    assert set(GROUPS["selector"]) - set(SHORT) == ours
    for name in GROUPS["combine"]:
        assert launch.plain(compose("config", [f"combine={name}"]))["combine"]["rule"] == name


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_composes(name: str) -> None:
    config = compose("config", [f"experiment={name}"], return_hydra_config=True)
    if config.hydra.mode != RunMode.MULTIRUN:
        launch.plain(compose("config", [f"experiment={name}"]))
        return
    assert config.sweep == name
    # Each value once, over the experiment: a typo in a name or a value would fail here.
    swept = {key: _split(str(values)) for key, values in config.hydra.sweeper.params.items()}
    for row in range(max(map(len, swept.values()))):
        values = [f"{key}={options[row % len(options)]}" for key, options in swept.items()]
        launch.plain(compose("config", [f"experiment={name}", *values]))


def _split(values: str) -> list[str]:
    """``a,b`` or ``[a],[b,c]`` into its values."""
    parts = values.replace("],[", "]\n[").split("\n")
    return parts if values.startswith("[") else values.split(",")


@pytest.mark.usefixtures("conf")
def test_a_missing_value_is_asked_for() -> None:
    with pytest.raises(SamError, match=r"^base.location has no value; give base.location=…$"):
        launch.plain(compose("config", ["base=local"]))


# Names


def test_a_sweep_is_named_by_what_it_sweeps_whatever_the_order() -> None:
    name = launch.sweep_name(["-m", "merge=ties,dare", "k=1,2", "limit=3"])
    assert name.startswith("k-merge-")
    assert launch.sweep_name(["limit=3", "k=1,2", "merge=ties,dare", "-m"]) == name
    assert launch.sweep_name(["-m", "k=1,2", "merge=ties,dare", "limit=3", "hydra.verbose=true"]) == name
    assert launch.sweep_name(["-m", "k=1,2", "merge=ties,dare", "limit=4"]) != name
    assert launch.sweep_name(["-m", "target=[mini_ai,mini_music]", "k=1,2"]).startswith("k-")


def job_name(monkeypatch: pytest.MonkeyPatch, argv: str, overrides: str) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv.split()])
    return launch.job_name(overrides)


def test_a_job_is_named_by_what_its_sweep_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = "k=1,limit=3,merge=ties"
    assert job_name(monkeypatch, "-m k=1,2 merge=ties,dare limit=3", overrides) == "k=1,merge=ties"
    # A name that is given says nothing of the limit: another limit must not fall into the same folder.
    assert job_name(monkeypatch, "-m k=1,2 merge=ties,dare limit=3 sweep=x", f"{overrides},sweep=x") == (
        "k=1,merge=ties,limit=3"
    )
    assert job_name(monkeypatch, "experiment=k limit=3", f"experiment=k,{overrides}") == "k=1,merge=ties,limit=3"
    assert job_name(monkeypatch, "limit=3", "limit=3") == "job"


def test_a_job_name_can_stand_in_a_path_and_is_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [job_name(monkeypatch, "-m", f"target.path={p}") for p in ("/a/b c.txt", "/a/b/c.txt", "/a/b?c.txt")]
    assert len(set(names)) == 3
    assert all("/" not in name and " " not in name for name in names)
    long = [job_name(monkeypatch, "-m", f"selector.experts=[{','.join(['expert'] * 40)},{x}],k=1") for x in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= 120
    lists = "selector.experts=[a,b],k=1"
    assert job_name(monkeypatch, "-m k=1,2", lists).startswith("selector.experts=_a,b_,k=1-")


def test_what_is_swept_comes_first_in_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "experts.path=" + "x" * 100
    name = job_name(monkeypatch, f"-m merge=ties,dare sweep=s {shared}", f"{shared},merge=ties,sweep=s")
    assert name.startswith("merge=ties,experts.path=xxx")


# Choices


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("merge=tie", ("merge=tie is unknown", "dare, dare_ties", "did you mean ties?")),
        ("merge=ties,bogus", ("merge=bogus",)),
        ("target=[mini_movie,mini_film]", ("target=mini_film", "mini_movie")),
        ("experiment=nothing", ("experiment=nothing", "k_by_merge")),
        ("+experiment=nothing", ("experiment=nothing",)),
        ("selector=null", ("selector=null", "sameco")),
        ("experiment=null", ("experiment=null", "k_by_merge")),
        ("targt=mini_movie", ("targt is unknown", "merge, ", "did you mean target?")),
        ("+targt=mini_movie", ("targt is unknown", "did you mean target?")),
        ("+experts.onlyy=[news]", ("experts.onlyy is unknown", "exclude, ", "did you mean experts.only?")),
        ("+target.limit=5", ("target.limit is unknown", "keep_misc")),
        ("trainer.acelerator=gpu", ("trainer.acelerator", "did you mean trainer.accelerator?")),
        ("dataset=wnut17", ("dataset=wnut17", "target=custom")),
        ("target=wnut17", ("target=wnut17", "'+target.sets.mine={kind: corpus, dataset: wnut17")),
        ("~merge", ("~merge", "needs merge")),
        ("~k", ("~k", "needs k")),
        ("~trainer.devices", ("needs trainer.devices",)),
    ],
)
def test_an_unknown_option_is_one_line(argument: str, named: tuple[str, ...]) -> None:
    with pytest.raises(SamError) as error:
        check_overrides([argument])
    assert all(part in one_line(error) for part in named)


def test_known_options_pass() -> None:
    check_overrides(["-m", "merge=ties,dare", "target=[mini,mit_movie]", "k=1,2", "--help", "--cfg", "job"])
    check_overrides(["merge.density=0.5", "selector=sam", "sweep=merge", "base=local", "base.location=merge=x"])
    check_overrides(["+target.sets.mine={kind: mini, dataset: ai}", "hydra.run.dir=x", "+experiment=main_table"])
    check_overrides(["hydra/job_logging=disabled", "hydra/launcher=joblib"])
    check_overrides(["train.lr=1e-3", "target.types=[a]", "logger.tags=[a]", "~target.sets.x", "cache=x"])


def test_multirun_may_stand_anywhere() -> None:
    assert launch.arranged(["k=2", "-m", "merge=ties,dare"]) == ["-m", "k=2", "merge=ties,dare"]
    assert launch.arranged(["k=2", "--cfg", "job"]) == ["k=2", "--cfg", "job"]


def test_jobs_that_fail_alike_are_one_line() -> None:
    failed = [("k=1", "no"), ("k=2", "never"), ("k=3", "no")]
    assert launch.grouped(failed) == ["k=1 (and 1 more): no", "k=2: never"]


# Jobs

Job = Callable[..., float]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """``job(config, folder name, multirun)``: runs a job as Hydra would."""

    def run(config: dict[str, Any], name: str = "job", sweep: bool = False) -> float:
        hydra = SimpleNamespace(
            runtime=SimpleNamespace(output_dir=str(tmp_path / "sweep" / name)),
            overrides=SimpleNamespace(task=[f"n={name}", "limit=3"]),
            mode=RunMode.MULTIRUN if sweep else RunMode.RUN,
            sweep=SimpleNamespace(dir=str(tmp_path / "sweep")),
            job=SimpleNamespace(num=0),
        )
        monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
        return launch.job(OmegaConf.create(config))

    return run


def status_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / STATUS).read_text()))


def test_a_failed_job_leaves_its_error_and_no_frame(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that hangs on a failed job's traceback would fill the memory of the jobs after it."""

    class Model:
        pass

    alive: list[weakref.ref[Model]] = []

    def fails(config: Any, folder: Path, overrides: Any, group: Any) -> float:
        model = Model()
        alive.append(weakref.ref(model))
        assert status_of(folder)["state"] == "running"
        raise SamError("k=99 must\nlie in 1..3")

    monkeypatch.setattr(launch, "run_task", fails)
    for name in ("a", "b"):
        value = job({"task": {"name": "run"}}, name, sweep=True)
        assert value != value
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert status_of(tmp_path / "sweep" / "a") == {
        "state": "failed",
        "error": "k=99 must lie in 1..3",
        "overrides": ["n=a", "limit=3"],
        "config": {"task": {"name": "run"}},
    }
    err = capsys.readouterr().err
    assert err.splitlines().count("error: k=99 must lie in 1..3") == 2
    assert "Traceback" not in err
    assert launch.finish() == 1
    printed = capsys.readouterr()
    assert "2 of the sweep's jobs failed" in printed.err
    rows = [line for line in printed.out.splitlines() if "failed: k=99" in line]
    assert ["n=a" in rows[0], "n=b" in rows[1]] == [True, True]


def test_an_error_that_is_not_the_users_names_its_class(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **options: Any) -> float:
        raise KeyError("x")

    monkeypatch.setattr(launch, "run_task", fails)
    job({"task": {"name": "run"}})
    assert status_of(tmp_path / "sweep" / "job")["error"] == "KeyError: 'x'"
    assert "error: KeyError: 'x'" in capsys.readouterr().err
    assert launch.finish() == 1


def test_a_job_that_works_is_done(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "run_task", lambda *args, **options: 0.5)
    assert job({"task": {"name": "run"}}) == 0.5
    assert status_of(tmp_path / "sweep" / "job")["state"] == "done"
    assert launch.finish() == 0


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("corrupt", ("news", "damaged")),
        ("other base", ("'news'", "trained on base other")),
        ("old prompt", ("'news'", "prompt version")),
        ("no gold type", ("target.types", "'actr'", "actor")),
        ("empty file", ("no sentences",)),
    ],
)
def test_mistakes_of_a_run_are_one_line_and_leave_no_result(
    job: Job,
    shared_pool: Pool,
    tiny_spec: BaseSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
    named: tuple[str, ...],
) -> None:
    pool = Path(shutil.copytree(shared_pool.path, tmp_path / "pool"))
    overrides = ["base=local", f"base.location={tiny_spec.location}", f"experts.path={pool}", "logger=none", "k=1"]
    overrides += ["target=mini_movie", "limit=3", "selector=sampling"]
    fingerprint = shared_pool.cards["news"].base_fingerprint
    if mistake == "corrupt":
        whole = (pool / "news" / "adapter_model.safetensors").read_bytes()
        (pool / "news" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif mistake == "other base":
        make_card("news", "0" * 64, base="other").write(pool / "news")
    elif mistake == "old prompt":
        make_card("news", fingerprint, prompt_version="0").write(pool / "news")
    elif mistake == "no gold type":
        overrides.append("target.types=[actr]")
    else:
        (tmp_path / "empty.txt").write_text("\n")
        overrides += ["target=files", f"target.path={tmp_path / 'empty.txt'}", "target.types=[a]"]
    config: DictConfig = compose("config", overrides)
    job(OmegaConf.to_container(config, resolve=True))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    assert all(part in line for part in named)
    assert not (tmp_path / "sweep" / "job" / RESULT).exists()
    assert status_of(tmp_path / "sweep" / "job")["state"] == "failed"
    assert launch.finish() == 1


# The summary


def test_the_summary_has_a_row_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def done(name: str, overall: dict[str, float] | None) -> None:
        write_json(tmp_path / name / RESULT, {"overall": overall, "seconds": {"total": 12.3}})
        write_status(tmp_path / name, "done", [f"k={name}", "limit=3"])

    done("10", {"precision": 0.5, "recall": 0.25, "f1": 1 / 3})
    done("2", None)
    write_status(tmp_path / "1", "failed", ["k=1", "limit=3"], "[bold]a bad thing")
    launch.print_summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "k=" in line]
    assert ["k=1 " in rows[0], "k=2 " in rows[1], "k=10" in rows[2]] == [True] * 3
    assert "[bold]a bad thing" in rows[0]
    assert "no gold" in rows[1]
    assert all(cell in rows[2] for cell in ("50.0", "25.0", "33.3", "12"))
    # What all jobs share is said once.
    assert sum("limit=3" in line for line in lines) == 1


def test_the_summary_of_one_job_names_it_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "a" / RESULT, {"overall": None, "seconds": {"total": 1}})
    write_status(tmp_path / "a", "done", ["k=1", "limit=3"])
    launch.print_summary(tmp_path)
    assert "k=1 limit=3" in capsys.readouterr().out
