"""One trivial job, VM start included, against the same job through cluster-generic on a node already up.

Both run in turns on one embedded cloud with boot delay 0. The peer polls every second and is told of
the end of a job by its own marker files, the fastest way it has.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.rows import Row
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud, Options
from snakemake_executor_plugin_schlouder.provision import (
    Ec2Settings,
    Instance,
    Join,
    LaunchRequest,
    client_token,
    connect,
)
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

ROUNDS = 3
RATIO_GOAL = 1.5
NOTICE_GOAL = 2.0
SNAKEFILE = "rule all:\n    output: 'a'\n    shell: 'touch {output}'\n"
OURS = ("--executor", "schlouder", "--schlouder-keep-logs")
PEER = (
    *("--executor", "cluster-generic"),
    *("--cluster-generic-submit-cmd", "sbatch --parsable --partition=schlouder --output=/dev/null"),
    *("--seconds-between-status-checks", "1"),
)


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(name=f"bench-{os.getpid()}", boot_seconds=(0, 0), share=[Path(scratch)])
        with LocalCloud.up(options, attached=True) as cloud:
            environment = {**os.environ, **cloud.environment(), "XDG_STATE_HOME": scratch}
            os.environ.update(environment)
            node_up()
            return measured(Path(scratch), environment)


def measured(scratch: Path, environment: Mapping[str, str]) -> list[Row]:
    ours, peers, notices = [], [], []
    for number in range(ROUNDS):
        seconds, notice = one_run(scratch / f"ours{number}", OURS, environment)
        ours.append(seconds)
        notices.append(notice)
        peers.append(one_run(scratch / f"peer{number}", PEER, environment)[0])
    mine, peer = statistics.median(ours), statistics.median(peers)
    notice = max(value for value in notices if value is not None)
    return [
        Row(
            "one trivial job, VM start included / cluster-generic, node up",
            f"{mine / peer:.2f} ({mine:.1f} s / {peer:.1f} s)",
            f"<= {RATIO_GOAL}",
            mine <= RATIO_GOAL * peer,
        ),
        Row(
            "end of a job until Snakemake has it, worst of the rounds",
            f"{notice:.2f} s",
            f"<= {NOTICE_GOAL:.0f} s",
            notice <= NOTICE_GOAL,
        ),
    ]


def one_run(
    directory: Path, options: tuple[str, ...], environment: Mapping[str, str]
) -> tuple[float, float | None]:
    """Seconds the whole command took, and from the job's exit-code file (ours only) to its notice."""
    directory.mkdir()
    (directory / "Snakefile").write_text(SNAKEFILE)
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--jobs", "1", *options],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    noticed, output = 0.0, []
    for line in process.stdout:
        output.append(line)
        if line.startswith("Finished jobid"):
            noticed = time.time()
    if process.wait() != 0:
        raise RuntimeError("".join(output))
    seconds = time.monotonic() - begun
    witness = next(directory.glob(".snakemake/schlouder/*/*.exit"), None)
    return seconds, None if witness is None else noticed - witness.stat().st_mtime


def node_up() -> None:
    """Starts the node the peer runs on, and waits until Slurm has it."""
    slurm = SlurmCommands("schlouder")
    info = slurm.check()
    names = ("IMAGE", "SUBNET", "INSTANCE_PROFILE")
    image, subnet, profile = (os.environ[f"SNAKEMAKE_SCHLOUDER_{name}"] for name in names)
    settings = Ec2Settings("us-east-1", image, subnet, instance_profile=profile)
    join = Join(info.controller, info.munge_socket, "/schlouder/munge-key")
    cloud = connect(settings, join, "bench", "peer")
    (kind,) = cloud.instance_types(["m5.large"])
    token = client_token("peer", "peer", kind.name, 1)
    (outcome,) = cloud.launch([LaunchRequest("peer", token, kind, time.time())])
    if not isinstance(outcome, Instance):
        raise RuntimeError(f"no node for the peer: {outcome}")
    while "peer" not in slurm.view("none").nodes:
        time.sleep(0.1)
