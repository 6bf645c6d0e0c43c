"""Recordings: a run on the fakes, in virtual time, is played again from its file alone."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Rig

from snakemake_executor_plugin_schlouder import ExecutorSettings, strategies
from snakemake_executor_plugin_schlouder.model import (
    Need,
    SchlouderError,
    SlurmOptions,
    TaskState,
)
from snakemake_executor_plugin_schlouder.pool import Announcement
from snakemake_executor_plugin_schlouder.recording import (
    PlannedJob,
    RecordedBroker,
    Recorder,
    config_of,
    decoded,
    encoded,
    read,
    replay_recording,
)
from snakemake_executor_plugin_schlouder.rehearsal import experience, forecast, observed
from snakemake_executor_plugin_schlouder.settings import validated

LOG = logging.getLogger("test")


class RecordedRig(Rig):
    """As `Rig`, with every call of its broker in `path`."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        super().__init__(directory, **changes)
        self.path = directory / "run.jsonl"
        self.broker = self.recorded = RecordedBroker(
            Recorder(self.path, LOG),
            self.config,
            self.cloud,
            self.slurm,
            self.journal,
            LOG,
            clock=self.world.clock,
            sleep=self.world.sleep,
            revoke=self._revoke,
        )


def recorded_batch(directory: Path, strategy: str) -> RecordedRig:
    """Twelve tasks of three lengths in two waves on at most four VMs, to the end."""
    rig = RecordedRig(directory, max_vms=4)
    rig.broker.expect([Announcement(strategy, "rule", Need(1, 1000), 20.0)] * 12)
    for seconds in (10, 20, 30):
        rig.give(2, strategy=strategy, seconds=seconds, planned=20.0)
    rig.run(30)
    for seconds in (10, 20, 30):
        rig.give(2, strategy=strategy, seconds=seconds, planned=20.0)
    rig.run(400)
    rig.broker.release()
    assert rig.states() == [TaskState.COMPLETE] * 12
    return rig


@pytest.mark.parametrize("strategy", strategies.known())
def test_the_recorded_events_lead_to_the_same_decisions(tmp_path: Path, strategy: str) -> None:
    played = replay_recording(recorded_batch(tmp_path, strategy).path)
    assert played.differences == []
    assert played.is_identical
    assert played.decisions >= 12 + 2


def test_troubles_are_played_again_too(tmp_path: Path) -> None:
    """EC2 and Slurm away, a boot that fails, a machine lost under its job, jobs that fail, a stop."""
    rig = RecordedRig(tmp_path, max_vms=3)
    rig.cloud.away = True
    rig.give(6, seconds=40)
    rig.give(1, seconds=10, code=3)
    rig.run(10)
    rig.cloud.away = False
    rig.run(26)
    rig.slurm.away = True
    rig.run(10)
    rig.slurm.away = False
    lost = next(name for name in rig.world.alive() if rig.world.running_on(name))
    rig.world.kill_machine(lost)
    rig.run(60)
    rig.world.never_joins = True
    rig.give(1)
    rig.run(120)
    rig.broker.stop()
    rig.run(5)
    rig.broker.release()
    played = replay_recording(rig.path)
    assert played.is_identical, played.differences
    names = {line.name for line in read(rig.path)}
    assert {"cluster.fail", "revoke", "witness", "cloud.console", "stop"} <= names


def test_gangs_are_played_again_too(tmp_path: Path) -> None:
    """One of which loses a companion under its task."""
    rig = RecordedRig(tmp_path, max_vms=6)
    rig.cloud.allow_kill = True
    rig.give(3, need=Need(2, 1000, nodes=3), options=SlurmOptions(tasks=6))
    rig.give(2)
    rig.run(20)
    rig.world.kill_machine("schlouder-r1-3")
    rig.run(200)
    rig.broker.release()
    assert rig.states() == [TaskState.COMPLETE] * 5
    played = replay_recording(rig.path)
    assert played.is_identical, played.differences
    submitted = [line.asked for line in read(rig.path) if line.name == "cluster.submit"]
    nodes = {node for jobs in submitted for _, node, _, _ in jobs}
    assert {len(node.split(",")) for node in nodes} == {1, 3}


def test_a_journal_that_cannot_be_written_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = RecordedRig(tmp_path)

    def refuse(*_: object) -> None:
        raise sqlite3.OperationalError("disk is full")

    rig.give(1)
    with monkeypatch.context() as broken:
        broken.setattr(rig.journal, "write", refuse)
        rig.run(5)
    assert rig.cloud.launched == []
    rig.run(60)
    played = replay_recording(rig.path)
    assert played.is_identical, played.differences
    assert played.decisions >= 2


def test_a_round_that_breaks_off_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = RecordedRig(tmp_path)
    rig.give(1)

    def fails(_: object) -> Any:
        raise RuntimeError("a defect")

    with monkeypatch.context() as broken:
        broken.setattr(rig.cloud, "launch", fails)
        with pytest.raises(RuntimeError):
            rig.tick()
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]
    played = replay_recording(rig.path)
    assert played.is_identical, played.differences


def tampered(path: Path, name: str, change: Callable[[list[Any]], None]) -> Path:
    """Changes the first line called `name`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(line for line in lines if line[0] == name))
    path.write_text("\n".join(json.dumps(line) for line in lines if line) + "\n")
    return path


def _another_node(line: list[Any]) -> None:
    line[1][1] = "schlouder-r1-99"


def _one_vm_less(line: list[Any]) -> None:
    line[1].pop()
    line[2].pop()


def _a_longer_task(line: list[Any]) -> None:
    line[1][0]["with"]["planned"] = 5000.0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cluster.submit", _another_node),
        ("cluster.submit", list.clear),
        ("cloud.launch", _one_vm_less),
        ("submit", _a_longer_task),
        ("clock", list.clear),
        ("cluster.drain", list.clear),
    ],
)
def test_a_tampered_recording_is_found_out(
    tmp_path: Path, name: str, change: Callable[[list[Any]], None]
) -> None:
    path = recorded_batch(tmp_path, "afap").path
    played = replay_recording(tampered(path, name, change))
    assert played.differences
    assert not played.is_identical


def test_a_recording_that_was_cut_off_is_played_as_far_as_it_goes(tmp_path: Path) -> None:
    path = recorded_batch(tmp_path, "asap").path
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    played = replay_recording(path)
    assert played.differences == []
    assert played.alike == played.decisions > 2


def test_another_strategy_decides_otherwise(tmp_path: Path) -> None:
    path = recorded_batch(tmp_path, "asap").path
    path.write_text(path.read_text().replace('"asap"', '"one-vm-for-all"'))
    assert not replay_recording(path).is_identical


def test_commands_stay_out_of_the_recording_which_is_the_owners_alone(tmp_path: Path) -> None:
    rig = RecordedRig(tmp_path)
    rig.give(1, seconds=4711)
    rig.run(20)
    assert "4711" not in rig.path.read_text()
    assert rig.path.stat().st_mode & 0o777 == 0o600


def test_values_survive_being_written_down() -> None:
    need = Need(2, 100)
    for value in ({"a b": need}, [1, None, "x", True], TaskState.COMPLETE, Path("/a")):
        assert decoded(json.loads(json.dumps(encoded(value)))) == value
    error = decoded(encoded(sqlite3.OperationalError("full")))
    assert isinstance(error, sqlite3.Error)
    assert str(error) == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a recording"),
        ("nonsense\nnonsense\n", "line 1: not of a recording"),
        ('["run", 0, null, null]\n', "another version"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(SchlouderError, match=message):
        read(path)


def test_a_place_where_no_recording_can_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    settings = ExecutorSettings(image="ami-1", record=str(tmp_path / "no" / "run.jsonl"))
    with pytest.raises(SchlouderError, match=r"--schlouder-record: .* is in no directory"):
        validated(settings)
    with pytest.raises(SchlouderError, match=r"--schlouder-record: .* cannot be written"):
        Recorder(tmp_path, LOG)


@pytest.mark.parametrize("strategy", ["one-vm-for-all", "afap"])
def test_a_run_is_foretold_from_one_under_another_strategy(tmp_path: Path, strategy: str) -> None:
    plan = [PlannedJob(f"task{n}", "rule", Need(1, 1000), 20.0) for n in range(1, 9)]
    runs = {}
    for name in ("one-vm-per-job", strategy):
        (tmp_path / name).mkdir()
        rig = RecordedRig(tmp_path / name, max_vms=4)
        rig.recorded.plan(plan)
        rig.give(8, strategy=name, planned=20.0)
        rig.run(300)
        assert rig.states() == [TaskState.COMPLETE] * 8
        runs[name] = rig.path
    earlier = experience(observed(read(runs["one-vm-per-job"])))
    assert earlier.walltimes == {"rule": pytest.approx(20, abs=1)}
    later = read(runs[strategy])
    foretold = forecast(observed(later).plan, config_of(later), strategy, earlier)
    assert foretold == pytest.approx(observed(later).makespan, rel=0.05)


def test_nothing_is_learned_from_a_run_in_which_nothing_ended(tmp_path: Path) -> None:
    rig = RecordedRig(tmp_path)
    rig.give(1)
    rig.run(3)
    with pytest.raises(SchlouderError, match="nothing to learn from"):
        observed(read(rig.path))
