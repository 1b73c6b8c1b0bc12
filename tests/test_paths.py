"""Folders that are written whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam.paths import staged


def test_staged_replaces_whole_folders_only(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged(target) as stage:
        (stage / "old").touch()
        assert not target.exists() and stage.name.startswith(".")
    with pytest.raises(RuntimeError), staged(target) as stage:
        (stage / "new").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with staged(target) as stage:
        (stage / "new").touch(mode=0o600)
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    assert (target / "new").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
