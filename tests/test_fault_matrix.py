"""The fault matrix: what the ledger of a trial means, and one trial on an embedded cloud."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.faults import kills, ledger, matrix, vm
from bench.faults.fault import COMPLETE, RESUMES, Result
from bench.faults.kept import Kept
from bench.faults.ledger import Attempt
from bench.faults.place import Place, launched_twice, wait
from bench.faults.scene import WORKFLOW, Scene, at_work, expected
from bench.faults.workflow import job
from bench.site import ROOT
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.provision import TAG_NODE

GOOD = Result("vm-killed", COMPLETE, COMPLETE, "", 20.0)


def write(path: Path, *lines: tuple[str, str, str, float]) -> Path:
    names = ("job", "attempt", "what", "at")
    texts = [json.dumps({**dict(zip(names, line, strict=True)), "node": "n"}) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def attempt(begun: float, last: float, ended: bool = False, of: str = "a") -> Attempt:
    return Attempt(of, f"{of}{begun}", f"node{begun:.0f}", begun, last, ended)


class TestLedger:
    def test_lines_become_attempts_in_the_order_of_their_begin(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "ledger",
            ("b", "b1", "begin", 2.0),
            ("a", "a1", "begin", 1.0),
            ("a", "a1", "beat", 3.0),
            ("b", "b1", "end", 4.0),
        )
        one, other = ledger.read(path)
        assert (one.job, one.begun, one.last, one.ended) == ("a", 1.0, 3.0, False)
        assert (other.job, other.begun, other.last, other.ended) == ("b", 2.0, 4.0, True)

    def test_half_a_line_is_skipped(self, tmp_path: Path) -> None:
        path = write(tmp_path / "ledger", ("a", "a1", "begin", 1.0))
        with path.open("a") as file:
            file.write('{"job": "a", "att')
        assert len(ledger.read(path)) == 1

    def test_no_ledger_is_an_empty_one(self, tmp_path: Path) -> None:
        assert ledger.read(tmp_path / "none") == []

    def test_an_attempt_lives_until_it_has_ended_or_is_silent(self) -> None:
        assert attempt(1, 10).lives(10 + ledger.SILENCE / 2)
        assert not attempt(1, 10).lives(10 + 2 * ledger.SILENCE)
        assert not attempt(1, 10, ended=True).lives(10)

    @pytest.mark.parametrize(
        ("others", "found"),
        [
            ([attempt(5, 9)], ["a on node1 and node5"]),
            ([attempt(2, 3)], ["a on node1 and node2"]),
            ([attempt(6.5, 9)], []),
            ([attempt(5, 9, of="b")], []),
            ([attempt(5, 7), attempt(8, 9)], ["a on node1 and node5"]),
        ],
    )
    def test_attempts_of_one_job_that_live_at_once(
        self, others: list[Attempt], found: list[str]
    ) -> None:
        assert ledger.lived_at_once([attempt(1, 6), *others]) == found

    def test_done_twice_is_what_two_slurm_jobs_have_done(self, tmp_path: Path) -> None:
        """An attempt may have written its output, and its Slurm job been lost all the same."""
        run = tmp_path / "0a1b2c3d"
        run.mkdir()
        for number, code in enumerate(("0\n", None, "1\n", "0 0.1 2.5\n"), 1):
            (run / f"3-part-i=7.{number}.log").write_text(f"rule part:\nattempt a{number}\n")
            if code is not None:
                (run / f"3-part.{number}.exit").write_text(code)
        assert ledger.done(tmp_path) == {"a1", "a4"}
        attempts = [attempt(number, number + 0.5, ended=True) for number in range(1, 5)]
        named = [replace(one, name=f"a{one.begun:.0f}") for one in attempts]
        assert ledger.done_twice(named, {"a1"}) == []
        assert ledger.done_twice(named, {"a1", "a4"}) == ["a"]

    def test_a_missing_output_is_lost_and_a_spoiled_one(self, tmp_path: Path) -> None:
        (tmp_path / "good").write_text("x\n")
        (tmp_path / "spoiled").write_text("..x\n")
        wanted = dict.fromkeys(("good", "spoiled", "missing"), "x\n")
        assert ledger.lost(tmp_path, wanted) == ["spoiled", "missing"]


class TestJob:
    def run(self, folder: Path, name: str, *inputs: str) -> None:
        files = [str(folder / one) for one in ("ledger", "gate")]
        made = [str(folder / one) for one in (name, *inputs)]
        job.main(*files, "0", "0.2", *made)

    def test_it_writes_what_is_expected_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "parts").mkdir()
        self.run(tmp_path, "parts/0.txt")
        self.run(tmp_path, "all.txt", "parts/0.txt")
        assert ledger.lost(tmp_path, expected(1)) == []
        first, second = ledger.read(tmp_path / "ledger")
        assert first.ended and second.ended
        assert first.last - first.begun >= 0.2
        assert ledger.lived_at_once([first, second]) == []

    def test_the_gate_lets_some_pass(self, tmp_path: Path) -> None:
        gate = str(tmp_path / "gate")
        assert [job.passes(gate, 2) for _ in range(3)] == [True, True, False]


def falls_short(**changes: Sequence[str] | str) -> bool:
    return not replace(GOOD, **changes).holds  # type: ignore[arg-type]


def test_a_result_holds_only_if_nothing_at_all_is_wrong() -> None:
    assert GOOD.holds
    for what in ("lost", "twice", "at_once", "launched_twice", "left", "touched"):
        assert falls_short(**{what: ["x"]})
    assert falls_short(wrong="an error")


def test_kills_are_counted_together_and_each_one_that_falls_short_is_named() -> None:
    notes = ["at work", "3 live", "0 again", "after 5.0 s"]
    fine = Result("0-0", RESUMES, RESUMES, "", 10.0, notes=notes)
    bad = replace(fine, name="0-1", left=["i-1"], notes=["at work", "2 live", "1 again", ""])
    both = kills.total([fine, bad])
    assert kills.total([fine, fine]).holds
    assert not both.holds
    assert both.left == ["0-1: i-1"]
    assert both.outcome == "2/2 complete"
    assert "5 jobs lived then, 4 of them were waited for" in both.notes
    assert kills.total([fine, replace(fine, lost=["all.txt"])]).outcome == "1/2 complete"


def test_instances_of_one_name_are_a_double_launch() -> None:
    tags = [{"Key": TAG_NODE, "Value": "n-1 n-2"}]
    pair = [{"Tags": tags, "AmiLaunchIndex": index} for index in (0, 1)]
    assert launched_twice([*pair, {"AmiLaunchIndex": 0}]) == []
    assert launched_twice([*pair, pair[1]]) == ["n-2"]


def test_what_is_kept_makes_a_row_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "HERE", tmp_path)
    monkeypatch.setattr(matrix, "_missing", lambda name: "")
    bad = replace(GOOD, name="vm-cut", left=["i-1"])
    for result in (GOOD, bad):
        Kept(tmp_path / "kept").put(result.name, result.to_json())
    good_row, bad_row = matrix.rows(["vm-killed", "vm-cut"])
    assert (good_row.name, good_row.ok, bad_row.ok) == ("vm-killed", True, False)
    assert "left 1" in bad_row.value


def test_a_clock_is_not_shifted_where_nothing_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "clock_library", lambda: None)
    monkeypatch.setattr(matrix, "check_machine", lambda: None)
    (row,) = matrix.rows(["vm-clock"])
    assert (row.value, row.ok) == ("libfaketime is not installed", None)


def test_the_documentation_has_every_fault_and_what_is_expected_of_it() -> None:
    told = (ROOT / "docs" / "further.md").read_text()
    rows = {name: (fault.what, fault.expected) for name, fault in matrix.FAULTS.items()}
    rows[kills.NAME] = (kills.WHAT, RESUMES)
    missing = [
        name for name, (what, then) in rows.items() if f"| `{name}` | {what} | {then} |" not in told
    ]
    assert missing == []


@pytest.mark.integration
@pytest.mark.thorough
def test_a_trial_sees_a_vm_die_and_its_jobs_run_again(cloud: LocalCloud, tmp_path: Path) -> None:
    shutil.copytree(WORKFLOW, tmp_path / "workflow")
    place = Place(cloud, tmp_path, tmp_path / "workflow" / "Snakefile")
    scene = Scene(place, parts=2, free=1)
    scene.close_gate()
    with at_work(scene):
        process = scene.start()
        (victim,) = scene.when_busy(1)
        cloud.vm(scene.instance_of(victim.node), "crash")
        scene.open_gate()
        assert wait(process, 120) == 0
    attempts = scene.attempts()
    assert ledger.done(tmp_path / ".snakemake" / "schlouder") == {
        one.name for one in attempts if one.ended
    }
    assert [one.ended for one in attempts if one.job == victim.job] == [False, True]
    assert ledger.lived_at_once(attempts) == []
    assert ledger.lost(tmp_path, expected(2)) == []
    assert scene.left() == []
