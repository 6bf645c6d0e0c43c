"""The child process in which pyslurm runs; `rpc.py` talks to it over the socket that is its standard input.

pyslurm has a process of its own because importing it without a usable slurm.conf ends the process, and
because it holds Python's global lock for as long as slurmctld takes to answer. The file is run as a
script, without the package around it, so that it starts in a fraction of a second.

A request is one line of JSON, `[name, arguments]`; so is its reply, `{"value": ...}`, or what went wrong:
`{"refused": message}` in Slurm's words, `{"unable": message}` where pyslurm did not even ask Slurm.
Only what pyslurm has had since release line 22.5 and still has in 25.11 is used.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Worker:
    """Every public method is a request."""

    def __init__(self) -> None:
        import pyslurm

        self._pyslurm = pyslurm
        self._script = os.memfd_create("script")

    def hello(self) -> None:
        """Shows that pyslurm and slurmctld understand each other."""
        self.jobs("")
        self.nodes("")

    def submit(
        self, description: Mapping[str, Any], environment: Mapping[str, str], script: str
    ) -> str:
        """The id of a new job, whose environment is this process's.

        pyslurm takes the text of a script for the name of a file first, and fails where that is longer
        than file names may be; so it gets a file, which exists in memory only.
        """
        os.truncate(self._script, 0)
        os.pwrite(self._script, script.encode(), 0)
        os.environ.update(environment)
        job = self._pyslurm.JobSubmitDescription(
            script=f"/proc/self/fd/{self._script}", **description
        )
        return str(job.submit())

    def jobs(self, run: str) -> list[tuple[str, str, str, str, int | None, int | None]]:
        """Key, id, state, reason, start and end (seconds since the epoch) of this user's jobs named `run`."""
        now, user = time.time(), os.getuid()
        return [
            (
                _text(job, "comment"),
                str(job.id),
                job.state,
                _text(job, "state_reason") or "None",
                job.start_time,
                _end(job, now),
            )
            for job in self._pyslurm.Jobs.load().values()
            if job.user_id == user and _text(job, "name") == run and _text(job, "comment")
        ]

    def nodes(self, partition: str) -> list[tuple[str, str, str]]:
        """Name, state and reason of the partition's nodes. A deleted node leaves a nameless record."""
        return [
            (node.name, _state(node), _text(node, "reason") or "none")
            for node in self._pyslurm.Nodes.load().values()
            if node.name and partition in node.partitions
        ]

    def answer(self, request: bytes) -> dict[str, Any]:
        name, arguments = json.loads(request)
        try:
            return {"value": getattr(self, name)(*arguments)}
        except self._pyslurm.RPCError as error:
            return {"refused": str(error)}
        except (ValueError, TypeError, OverflowError, OSError) as error:
            return {"unable": str(error)}


def _state(node: Any) -> str:
    """Up to release line 22.5 pyslurm calls a node allocated as soon as one of its CPUs is."""
    state: str = node.state
    return state.replace("ALLOCATED", "MIXED", 1) if node.idle_cpus else state


def _text(record: Any, attribute: str) -> str:
    """Empty for what is not set, and for what others wrote in an encoding that is not UTF-8."""
    try:
        return getattr(record, attribute) or ""
    except UnicodeDecodeError:
        return ""


def _end(job: Any, now: float) -> int | None:
    """As squeue shows it: when a running job is expected to end only where it has a time limit."""
    end: int | None = job.end_time
    return None if end is None or (job.time_limit is None and end > now) else end


def become_sbatch(limits: list[str]) -> None:
    """Puts into the environment what sbatch says there about the process that submits: slurmd takes
    umask, priority and the `limits` that are to be propagated from it."""
    umask = os.umask(0)
    os.umask(umask)
    os.environ.update(
        SLURM_SUBMIT_DIR=str(Path.cwd()),
        SLURM_SUBMIT_HOST=socket.gethostname().split(".")[0],
        SLURM_UMASK=f"{umask:04o}",
        SLURM_PRIO_PROCESS=str(os.getpriority(os.PRIO_PROCESS, 0)),
    )
    for name in limits:
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        os.environ[f"SLURM_RLIMIT_{name}"] = str(soft)


def main() -> None:
    channel = socket.socket(fileno=0)
    become_sbatch(sys.argv[1:])
    worker = Worker()
    for request in channel.makefile("rb"):
        channel.sendall(json.dumps(worker.answer(request)).encode() + b"\n")


if __name__ == "__main__":
    main()
