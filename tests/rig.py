"""A broker on the fakes, for tests in virtual time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fakes import FakeCloud, FakeSlurm, World

from snakemake_executor_plugin_schlouder.broker import Broker, BrokerConfig
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord
from snakemake_executor_plugin_schlouder.keeping import Shelf
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need, Task, TaskState
from snakemake_executor_plugin_schlouder.slurm.script import Exit, exit_of, has_begun, revoke

SMALL = InstanceType("m5.large", 2, 8192)
BIG = InstanceType("m5.4xlarge", 16, 65536)


class Rig:
    """A broker, its fake world, and everything that ended so far."""

    def __init__(
        self,
        directory: Path,
        world: World | None = None,
        shelf: Shelf | None = None,
        **changes: object,
    ) -> None:
        """`world` and `shelf` are those of an earlier run, if there was one."""
        self.world = world or World()
        self.shelf = shelf
        self.cloud = FakeCloud(self.world)
        self.slurm = FakeSlurm(self.world)
        self.journal = Journal(":memory:")
        config = BrokerConfig(
            run="r1",
            workdir=directory,
            partition="schlouder",
            types=(SMALL, BIG),
            max_vms=20,
            billing=Billing(),
            boot_timeout=100.0,
        )
        self.config = replace(config, **changes)  # type: ignore[arg-type]
        self.config.files.mkdir(parents=True)
        self.journal.begin_run(
            RunRecord(self.config.run, str(directory), "h", 1, "r", "e", "s", 0.0)
        )
        self.witness: Callable[[str], Exit | None] = exit_of
        self.broker = self.make_broker()
        self.ended: dict[str, Task] = {}
        self.most_alive = 0
        self.made = 0

    def make_broker(self) -> Broker:
        return Broker(
            self.config,
            self.cloud,
            self.slurm,
            self.journal,
            logging.getLogger("test"),
            clock=self.world.clock,
            sleep=self.world.sleep,
            witness=lambda exit_file: self.witness(exit_file),
            revoke=self._revoke,
            begun=self._begun,
            shelf=self.shelf,
        )

    def _revoke(self, exit_file: str) -> bool:
        self.world.revoked.add(_key(exit_file))
        revoke(exit_file)
        return self._begun(exit_file)

    def _begun(self, exit_file: str) -> bool:
        job = self.world.jobs.get(_key(exit_file))
        return has_begun(exit_file) and not (job is not None and job.unlaunched)

    def give(
        self, count: int = 1, strategy: str = "one-vm-per-job", **values: object
    ) -> list[Task]:
        seconds, code = values.pop("seconds", 20), values.pop("code", 0)
        values |= {"strategy": strategy, "command": f"run {seconds} {code}"}
        tasks = [self.new_task(**values) for _ in range(count)]
        self.broker.submit(tasks)
        return tasks

    def new_task(self, **values: object) -> Task:
        """One that is not handed over yet."""
        self.made += 1
        task = Task(
            key=f"{self.config.run}-{self.made}",
            name=f"task{self.made}",
            rule="rule",
            jobid=str(self.made),
            strategy="one-vm-per-job",
            need=Need(1, 1000),
            command="run 20 0",
        )
        return replace(task, **values)  # type: ignore[arg-type]

    def run(self, seconds: float, step: float = 1.0) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self.tick()
            self.world.pass_time(step)
        self.tick()

    def tick(self) -> None:
        for task in self.broker.tick():
            assert task.key not in self.ended, "a task must be reported once"
            self.ended[task.key] = task
        self.most_alive = max(self.most_alive, len(self.world.alive()))

    def states(self) -> list[TaskState]:
        return [task.state for task in self.ended.values()]


def _key(exit_file: str) -> str:
    """`r1/3-rule.1.exit` is that of r1-3.1."""
    path = Path(exit_file)
    number, attempt = path.name.split("-rule.")
    return f"{path.parent.name}-{number}.{attempt.removesuffix('.exit')}"
