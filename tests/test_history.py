"""The history keeps what runs measured, for its owner only, and seeds the predictors with the latest."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder import history
from snakemake_executor_plugin_schlouder.history import Boot, History, Walltime, history_path
from snakemake_executor_plugin_schlouder.journal import journal_path
from snakemake_executor_plugin_schlouder.model import SchlouderError


def walltime(real: float, date: float = 1.0, rule: str = "search", **values: float) -> Walltime:
    return Walltime(rule, "asap", "m5.large", values.get("estimate", 100.0), real, date)


def boot(seconds: float, date: float = 1.0, kind: str = "m5.large", booting: int = 0) -> Boot:
    return Boot(kind, "us-east-1", seconds, booting, date)


def test_what_was_added_seeds_the_predictors_of_a_later_run(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.sqlite"
    first = History(path)
    first.add([walltime(200, n) for n in range(100)], [boot(20), boot(30), boot(40)])
    first.close()
    again = History(path)
    assert again.set_aside is None
    assert again.walltimes().expected("search", 100) == pytest.approx(200, rel=0.05)
    assert again.boots("m5.large").predict(0) == 30


def test_an_empty_history_predicts_what_the_user_says() -> None:
    empty = History(":memory:")
    assert empty.walltimes().expected("search", 70) == 70
    assert empty.boots().predict(0) == 60


def test_boots_are_those_of_the_instance_type_or_of_all() -> None:
    kept = History(":memory:")
    kept.add(boots=[boot(20), boot(80, kind="c5.large"), boot(90, kind="c5.large")])
    assert kept.boots("m5.large").predict(0) == 20
    assert kept.boots().predict(0) == 80


def test_the_latest_results_of_every_rule_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LATEST", 50)
    kept = History(":memory:")
    kept.add([walltime(300, date=n) for n in range(200)])
    kept.add([walltime(100, date=1000 + n) for n in range(50)])
    kept.add([walltime(200, date=0, rule="plot")])
    learned = kept.walltimes()
    assert learned.expected("search", 100) == pytest.approx(100)
    assert learned.knows("plot")


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_KEPT", 10)
    kept = History(tmp_path / "history.sqlite")
    kept.add([walltime(n, date=n) for n in range(100)], [boot(n, date=n) for n in range(100)])
    kept.close()
    with sqlite3.connect(tmp_path / "history.sqlite") as db:
        assert db.execute("SELECT count(*), min(real) FROM walltimes").fetchone() == (10, 90)
        assert db.execute("SELECT count(*) FROM boots").fetchone() == (10,)
    db.close()


def test_a_task_without_an_estimate_is_kept() -> None:
    kept = History(":memory:")
    kept.add([Walltime("search", "asap", "m5.large", None, 40, 1.0)])
    assert kept.walltimes().expected("search", None) == pytest.approx(40)


def test_the_history_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.sqlite"
    History(path).add([walltime(1)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"this is no database at all, but text " * 40, b"\0" * 4096])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(content)
    kept = History(path)
    assert kept.set_aside is not None
    assert kept.set_aside.read_bytes() == content
    assert not kept.walltimes().knows("search")


def test_a_newer_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    History(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert History(path).set_aside is not None


def test_two_runs_may_write_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    one, other = History(path), History(path)
    one.add([walltime(200)])
    other.add([walltime(200)])
    assert one.walltimes().line("search") == other.walltimes().line("search")


def test_there_is_one_beside_the_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path().parent == journal_path(Path("/a")).parent.parent


def test_a_place_where_no_history_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SchlouderError, match="XDG_STATE_HOME"):
        History(tmp_path / "file" / "history.sqlite")
