"""A user's shell and workflow directory on an embedded cloud: how Snakemake is started there, and what the
cloud then has of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3

from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.provision import TAG_NODE

GRACE = 60.0
"""Seconds that a Snakemake has after Ctrl-C."""


def snakemake(snakefile: Path, directory: Path) -> list[str]:
    """The begin of its command line."""
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)),
        *("--directory", str(directory)),
    ]


@dataclass(frozen=True)
class Place:
    """The user has no earlier runs; VMs may be started in all zones."""

    cloud: LocalCloud
    directory: Path
    snakefile: Path

    @cached_property
    def environment(self) -> dict[str, str]:
        own = {
            f"XDG_{kind.upper()}_HOME": str(self.directory / kind) for kind in ("state", "cache")
        }
        subnets = {"SNAKEMAKE_SCHLOUDER_SUBNETS": ",".join(self.cloud.subnets.values())}
        return {**os.environ, **self.cloud.environment(), **subnets, **own}

    def start(self, options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Snakemake in a process group of its own, as a terminal would start it; `log` is appended to.
        It does not outlive this process."""
        command = [
            *("setpriv", "--pdeathsig", "KILL", *snakemake(self.snakefile, self.directory)),
            *("--executor", "schlouder", "--jobs", "100", *options),
        ]
        return started(command, self.environment, log)

    @cached_property
    def ec2(self) -> Any:
        access = self.cloud.environment()
        return boto3.client(
            "ec2",
            endpoint_url=access["AWS_ENDPOINT_URL"],
            region_name=access["AWS_DEFAULT_REGION"],
            aws_access_key_id=access["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=access["AWS_SECRET_ACCESS_KEY"],
        )

    def instances(self) -> list[dict[str, Any]]:
        """All that ever were, in the words of EC2."""
        return [
            instance
            for page in self.ec2.get_paginator("describe_instances").paginate()
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    def slurm(self, *command: str) -> str:
        """What a command of Slurm says. subprocess.CalledProcessError where it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def nodes(self) -> list[str]:
        return self.slurm("sinfo", "--Node", "--noheader", "--format=%N").split()


def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def wait(process: subprocess.Popen[bytes], longest: float) -> int:
    """The exit code. What takes too long, or is interrupted, is ended as Ctrl-C does, and then for good."""
    try:
        return process.wait(longest)
    except subprocess.TimeoutExpired:
        return end(process)
    except BaseException:
        end(process)
        raise


def end(process: subprocess.Popen[bytes]) -> int:
    """As Ctrl-C does, and then for good; the exit code, which is never 0."""
    if process.poll() is not None:
        return process.returncode or 1
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(GRACE) or 1
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def launched_twice(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of VMs that more than one instance was started for."""
    names = Counter(name for instance in instances if (name := node_of(instance)))
    return [name for name, count in names.items() if count > 1]


def tags_of(instance: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}


def node_of(instance: Mapping[str, Any]) -> str:
    """By tag and launch index; empty: it is no VM of a run."""
    names = tags_of(instance).get(TAG_NODE, "").split()
    index = instance["AmiLaunchIndex"]
    return names[index] if index < len(names) else ""
