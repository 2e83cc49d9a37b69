"""Compiled code is kept where the user keeps caches, and old versions of it go."""

import os
from pathlib import Path

import pytest

from policies.routing import compile_cache
from policies.routing.compile_cache import KEPT_S, cache_folder

NOW_S = 1e9


def test_the_users_cache_directory_is_taken(tmp_path: Path) -> None:
    assert cache_folder("abc", {"HOME": str(tmp_path)}, NOW_S) == tmp_path / ".cache" / "tidegate" / "numba-abc"
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "caches")}
    assert cache_folder("abc", {**xdg, "HOME": str(tmp_path)}, NOW_S) == tmp_path / "caches" / "tidegate" / "numba-abc"
    both = {**xdg, "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    found = cache_folder("abc", both, NOW_S)
    assert found == tmp_path / "numba" / "numba-abc"
    assert found.stat().st_mode & 0o077 == 0, "nobody else may put code there"


def test_where_nothing_can_be_written_a_folder_of_our_own_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compile_cache, "gettempdir", lambda: str(tmp_path))
    for environment in ({}, {"HOME": str(tmp_path / "file")}):
        assert cache_folder("abc", environment, NOW_S) == tmp_path / f"tidegate-{os.getuid()}" / "numba-abc"


def test_versions_unused_for_a_month_go(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    old = cache_folder("old", home, NOW_S - KEPT_S - 1.0)
    recent = cache_folder("recent", home, NOW_S - KEPT_S + 60.0)
    new = cache_folder("new", home, NOW_S)
    assert [one.exists() for one in (old, recent, new)] == [False, True, True]
