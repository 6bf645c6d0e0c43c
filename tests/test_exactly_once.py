"""Every job runs exactly once: a thousand of them while slurmctld restarts, and those of two workflows that
share a cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from workflows import Site, node_of, slurmctld, stopped, wait_for

from snakemake_executor_plugin_schlouder.broker import Broker, BrokerConfig
from snakemake_executor_plugin_schlouder.ec2.account import Ec2Settings
from snakemake_executor_plugin_schlouder.ec2.joining import Join
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord, journal_path
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need, Task, TaskState
from snakemake_executor_plugin_schlouder.provision import connect
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

pytestmark = pytest.mark.integration

COUNT = 1000
BIG = InstanceType("m5.large", 125, 125_000)
"""So many small jobs run beside each other on a VM; it is as big as we say."""

EIGHT_JOBS = """
rule all:
    input: expand("out/{i}", i=range(8))
rule one:
    output: "out/{i}"
    resources: mem_mb=100
    shell:
        "echo $SLURMD_NODENAME >>ran-{wildcards.i}; "
        "while [ ! -e go ]; do sleep 0.1; done; touch {output}"
"""


@pytest.fixture
def broker(site: Site, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """As the executor makes it, for tasks that are plain commands. Slurm's clients wait 3 s for an answer;
    a job that has not begun after 15 s was lost on the way to its node."""
    impatient = site.directory / "slurm.conf"
    conf = Path(site.environment["SLURM_CONF"]).read_text()
    impatient.write_text(f"{conf}MessageTimeout=3\n")
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", str(impatient))
    run = uuid.uuid4().hex[:8]
    given = {name.removeprefix("SNAKEMAKE_SCHLOUDER_"): value for name, value in os.environ.items()}
    slurm = SlurmCommands(given["PARTITION"])
    info = slurm.check()
    join = Join(info.controller, info.munge_socket, given["CLUSTER_KEY"])
    settings = Ec2Settings(
        given["REGION"],
        given["IMAGE"],
        (given["SUBNETS"],),
        (given["SECURITY_GROUPS"],),
        instance_profile=given["INSTANCE_PROFILE"],
    )
    config = BrokerConfig(
        run=run,
        workdir=site.directory,
        partition=given["PARTITION"],
        types=(BIG,),
        max_vms=2,
        billing=Billing(),
        boot_timeout=60.0,
        launch_timeout=15.0,
    )
    config.files.mkdir(parents=True)
    journal = Journal(journal_path(site.directory))
    journal.begin_run(RunRecord(run, str(site.directory), "here", os.getpid(), "r", "e", "s", 0.0))
    cloud = connect(settings, join, "test")
    return Broker(config, cloud, slurm, journal, logging.getLogger("test"))


def appending_tasks(directory: Path) -> list[Task]:
    """Each adds a line to a file of its own."""
    return [
        Task(
            key=f"t-{number}",
            name=f"append {number}",
            rule="append",
            jobid=str(number),
            strategy="asap",
            need=Need(1, 100),
            command=f"echo ran >>{directory}/{number}",
        )
        for number in range(COUNT)
    ]


class Troubles(threading.Thread):
    """At so many files slurmctld is shut down, for the cloud to start it again, or stopped for so long that
    what is submitted meanwhile gets no answer, and arrives all the same."""

    AT = ((50, "restart"), (350, "silence"), (650, "restart"))

    def __init__(self, site: Site, directory: Path) -> None:
        super().__init__()
        self.site, self.directory = site, directory
        self.came_at: list[int] = []

    def run(self) -> None:
        for count, what in self.AT:
            while self.lines() < count:
                time.sleep(0.05)
            pid = slurmctld(self.site.cloud)
            if what == "restart":
                self.site.slurm("scontrol", "shutdown", "slurmctld")
                wait_for(Gone(pid), lambda: "slurmctld does not end")
            else:
                with stopped(pid):
                    time.sleep(5)
            self.came_at.append(self.lines())

    def lines(self) -> int:
        return len(list(self.directory.iterdir()))


@dataclass(frozen=True)
class Gone:
    """Whether a process is."""

    pid: int

    def __call__(self) -> bool:
        return not Path(f"/proc/{self.pid}").exists()


@pytest.mark.thorough
def test_a_thousand_jobs_that_are_submitted_while_slurmctld_restarts_and_is_silent(
    site: Site, broker: Broker
) -> None:
    directory = site.directory / "lines"
    directory.mkdir()
    broker.submit(appending_tasks(directory))
    troubles = Troubles(site, directory)
    troubles.start()
    ended: list[Task] = []
    end = time.monotonic() + 180
    try:
        while len(ended) < COUNT and time.monotonic() < end:
            ended += broker.tick()
            time.sleep(0.2)
    finally:
        broker.release()
    assert Counter(task.state for task in ended) == {TaskState.COMPLETE: COUNT}
    assert len({task.key for task in ended}) == COUNT
    lines = [(directory / str(number)).read_text() for number in range(COUNT)]
    assert set(lines) == {"ran\n"}
    assert len(troubles.came_at) == 3 and troubles.came_at[-1] < COUNT
    assert any(task.attempt > 1 for task in ended), "nothing was lost on the way"


def test_a_workflow_that_is_cancelled_leaves_another_ones_jobs_and_vms_alone(site: Site) -> None:
    """Two of one user at once on one cluster, each on two VMs with two CPUs; Ctrl-C ends one half way."""
    one, other = beside(site, "one"), beside(site, "other")
    with (
        one.started("--schlouder-max-vms", "2") as going,
        other.started("--schlouder-max-vms", "2") as cancelled,
    ):
        wait_for(lambda: len(ran(one)) == len(ran(other)) == 4, lambda: f"{ran(one)} {ran(other)}")
        mine, theirs = vms_of(one), vms_of(other)
        os.killpg(cancelled.pid, signal.SIGINT)
        output, _ = cancelled.communicate(timeout=60)
        assert "0 of 8 jobs complete" in output
        assert set(site.alive()) == set(mine)
        assert len(site.slurm("squeue", "--states=RUNNING", "--noheader").splitlines()) == 4
        (one.directory / "go").touch()
        output, _ = going.communicate(timeout=120)
    assert going.returncode == 0, output
    assert "8 of 8 jobs complete" in output
    assert all(len(nodes) == 1 for nodes in (*ran(one).values(), *ran(other).values()))
    assert (len(ran(one)), len(ran(other))) == (8, 4)
    assert nodes_of(one) == set(mine.values())
    assert nodes_of(other) == set(theirs.values())
    assert vms_of(one) == mine


def beside(site: Site, name: str) -> Site:
    """Another workflow of the same user."""
    directory = site.directory / name
    directory.mkdir()
    made = Site.make(site.cloud, directory, EIGHT_JOBS)
    made.environment["XDG_STATE_HOME"] = site.environment["XDG_STATE_HOME"]
    return made


def ran(site: Site) -> dict[str, list[str]]:
    """The nodes on which each job has begun."""
    return {path.name: path.read_text().split() for path in site.directory.glob("ran-*")}


def nodes_of(site: Site) -> set[str]:
    return {node for nodes in ran(site).values() for node in nodes}


def vms_of(site: Site) -> dict[str, str]:
    """Instance -> node of every VM that runs which have nodes in common with `site`'s jobs ever had."""
    runs = {node.rpartition("-")[0] for node in nodes_of(site)}
    names = {str(instance["InstanceId"]): node_of(instance) for instance in site.instances()}
    return {key: name for key, name in names.items() if name.rpartition("-")[0] in runs}
