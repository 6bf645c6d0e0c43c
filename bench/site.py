"""One embedded cloud for all measurements, with four nodes for the peers that are up from the start.

Boot delay 0. Our own VMs come and go beside those nodes; executors run in turns, never at once.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Processes, Usage
from snakemake_executor_plugin_schlouder.ec2.account import Ec2Settings
from snakemake_executor_plugin_schlouder.ec2.joining import Join
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud, Options
from snakemake_executor_plugin_schlouder.market import catalog
from snakemake_executor_plugin_schlouder.model import ON_DEMAND
from snakemake_executor_plugin_schlouder.provision import (
    Instance,
    LaunchRequest,
    client_token,
    connect,
)
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

ROOT = Path(__file__).resolve().parents[1]
PARTITION = "schlouder"
INSTANCE_TYPE = "m5.large"
"""Two CPUs."""

VMS = 4
SLOTS = 8
PEER_NODES = tuple(f"peer-{number}" for number in range(1, VMS + 1))
PATIENCE = 60.0


@dataclass(frozen=True)
class Site:
    """`environment` is that of a user's shell on this cloud; workflows live below `scratch`, which the
    VMs share; `daemon` is the pid of the cloud's first process, above munged, slurmctld and all VMs."""

    scratch: Path
    environment: Mapping[str, str]
    daemon: int

    def usage(self) -> Usage:
        return Processes.now().usage(self.daemon)

    def settle(self) -> None:
        """Returns when no VM but the peers' is left and no Slurm job runs. Asks the kernel and not
        slurmctld, whose requests are counted."""

        def is_quiet() -> bool:
            processes = Processes.now()
            return len(processes.vms(self.daemon)) == VMS and not processes.jobs(self.daemon)

        wait_for(is_quiet, "VMs or Slurm jobs are left behind")


@contextmanager
def running_site() -> Iterator[Site]:
    """The cloud, until the end of the block; its settings become this process's environment, too."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        options = Options(name=f"bench-{os.getpid()}", boot_seconds=(0, 0), share=[scratch, ROOT])
        with LocalCloud.up(options, attached=True) as cloud:
            os.environ.update(cloud.environment())
            start_nodes(PEER_NODES, "peers")
            state = json.loads((cloud.folder / "state.json").read_text())
            yield Site(scratch, dict(os.environ), state["host_pid"])


def start_nodes(nodes: Sequence[str], run: str) -> None:
    """Starts machines that are none of a workflow's, tagged as of `run`, on the cloud of this process's
    environment, and waits until Slurm has them."""
    slurm = SlurmCommands(PARTITION)
    info = slurm.check()
    names = ("IMAGE", "SUBNETS", "INSTANCE_PROFILE")
    image, subnet, profile = (os.environ[f"SNAKEMAKE_SCHLOUDER_{name}"] for name in names)
    settings = Ec2Settings("us-east-1", image, (subnet,), instance_profile=profile)
    join = Join(info.controller, info.munge_socket, "/schlouder/munge-key")
    cloud = connect(settings, join, "bench")
    (kind,) = catalog.connect(cloud.client, "", print).named([INSTANCE_TYPE])
    requests = [
        LaunchRequest(run, node, client_token(run, [node], kind.name, ON_DEMAND, "", 1), kind)
        for node in nodes
    ]
    for outcome in cloud.launch(requests):
        if not isinstance(outcome, Instance):
            raise RuntimeError(f"no machine for {run}: {outcome}")

    def are_up() -> bool:
        known = slurm.view("none").nodes
        return all(name in known and known[name].accepts_jobs for name in nodes)

    wait_for(are_up, f"the nodes of {run} did not join Slurm")


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{otherwise} after {PATIENCE:.0f} s")
        time.sleep(0.1)
