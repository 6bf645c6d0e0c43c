"""Generated histories of faults against the broker: whatever happens, no task runs twice at a time, each
is reported once, and in the end nothing is left."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as values
from rig import Rig

from snakemake_executor_plugin_schlouder.model import Need, TaskState
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    LaunchRequest,
    TokenSpent,
)
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterUnavailable,
    JobRequest,
    SubmitOutcome,
)

STEPS = values.lists(
    values.one_of(
        values.tuples(values.just("give"), values.integers(1, 8), values.integers(1, 60)),
        values.tuples(values.just("wait"), values.integers(1, 40)),
        values.tuples(values.just("kill"), values.integers(0, 5)),
        values.tuples(values.just("node down"), values.integers(0, 5)),
        values.tuples(values.just("drain"), values.integers(0, 5)),
        values.tuples(values.just("forget"), values.integers(0, 5)),
        values.tuples(values.just("slurm away"), values.integers(1, 90)),
        values.tuples(values.just("cloud away"), values.integers(1, 90)),
        values.tuples(values.just("lose launch reply")),
        values.tuples(values.just("lose submit reply")),
        values.tuples(values.just("late submit"), values.integers(1, 60)),
    ),
    min_size=3,
    max_size=14,
)


class History:
    """A rig to which things happen."""

    def __init__(self, directory: Path, cap: int, end_time: float) -> None:
        """Begins with work on every VM and, for some, a task ahead."""
        self.rig = Rig(directory, max_vms=cap)
        self.rig.cloud.allow_kill = True
        self.rig.world.end_time = end_time
        self.late: list[tuple[float, JobRequest]] = []
        self.give(4 * cap, 31)
        self.wait(15)

    def play(self, name: str, *arguments: int) -> None:
        actions: dict[str, Callable[..., None]] = {
            "give": self.give,
            "wait": self.wait,
            "kill": self.kill,
            "node down": lambda index: self.set_node(index, "down"),
            "drain": lambda index: self.set_node(index, "draining"),
            "forget": self.forget,
            "slurm away": self.slurm_away,
            "cloud away": self.cloud_away,
            "lose launch reply": self.lose_launch_reply,
            "lose submit reply": lambda: self.lose_submit_reply(None),
            "late submit": self.lose_submit_reply,
        }
        actions[name](*arguments)
        self.wait(1)

    def give(self, count: int, seconds: int) -> None:
        strategy = "one-vm-for-all" if seconds % 3 == 0 else "one-vm-per-job"
        self.rig.give(count, strategy, seconds=seconds, need=Need(1 + seconds % 2, 1000))

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.rig.tick()
            self.rig.world.pass_time(1)
            self.deliver()
            assert self.rig.world.twice_at_a_time() == []

    def kill(self, index: int) -> None:
        alive = self.rig.world.alive()
        if alive:
            self.rig.world.kill_machine(alive[index % len(alive)])

    def set_node(self, index: int, state: str) -> None:
        nodes = sorted(self.rig.world.nodes)
        if nodes:
            self.rig.world.nodes[nodes[index % len(nodes)]] = state

    def forget(self, index: int) -> None:
        known = sorted(set(self.rig.world.jobs) - self.rig.slurm.forgotten)
        if known:
            self.rig.slurm.forgotten.add(known[index % len(known)])

    def slurm_away(self, seconds: int) -> None:
        self.rig.slurm.away = True
        self.wait(seconds)
        self.rig.slurm.away = False

    def cloud_away(self, seconds: int) -> None:
        self.rig.cloud.away = True
        self.wait(seconds)
        self.rig.cloud.away = False

    def lose_launch_reply(self) -> None:
        cloud = self.rig.cloud
        launch = cloud._launch

        def lose(request: LaunchRequest) -> object:
            cloud._launch = launch  # type: ignore[method-assign]
            outcome = launch(request)
            return outcome if isinstance(outcome, TokenSpent) else CloudUnavailable("lost")

        cloud._launch = lose  # type: ignore[method-assign, assignment]

    def lose_submit_reply(self, delay: int | None) -> None:
        """With `delay`, Slurm gets the submission only that many seconds later."""
        slurm = self.rig.slurm
        submit = type(slurm).submit.__get__(slurm)

        def lose(jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
            slurm.submit = submit  # type: ignore[method-assign]
            if delay is None:
                submit(jobs[:1])
            else:
                self.late.append((self.rig.world.now + delay, jobs[0]))
            return [ClusterUnavailable("timed out")]

        slurm.submit = lose  # type: ignore[method-assign]

    def deliver(self) -> None:
        due = [entry for entry in self.late if entry[0] <= self.rig.world.now]
        for entry in due:
            self.late.remove(entry)
            if entry[1].node in self.rig.world.nodes and not self.rig.slurm.away:
                type(self.rig.slurm).submit(self.rig.slurm, [entry[1]])

    def end(self) -> None:
        for _ in range(60):
            self.wait(100)
            if len(self.rig.ended) == self.rig.made and not self.late:
                break
        self.rig.broker.release()
        self.rig.world.pass_time(100)


@settings(max_examples=150, deadline=None)
@given(STEPS, values.integers(1, 3), values.sampled_from([0.0, 30.0]))
def test_whatever_happens_nothing_runs_twice_is_lost_or_left(
    steps: list[tuple[str, int]], cap: int, end_time: float
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        history = History(Path(directory), cap, end_time)
        for step in steps:
            history.play(*step)
        history.end()
    rig = history.rig
    assert len(rig.ended) == rig.made, "every task is reported"
    assert set(rig.states()) <= {TaskState.COMPLETE, TaskState.FAILED}
    assert rig.most_alive <= cap
    assert rig.world.alive() == []
    assert rig.world.nodes == {}
