"""The batch scripts of one task and of a bundle, and the exit-code files they leave: the second witness
of a job's result."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG

from .vm_storage import VOID as VOID

TIMED_OUT = 124
"""Exit code of a bundled job that ran longer than its `runtime`, as of timeout(1)."""

GRACE = 10.0
"""Seconds between asking a bundled job to end that ran longer than its `runtime` and killing it."""

PART, BEGUN, REVOKED, DONE = ".part", ".begun", ".revoked", ".done"
"""Endings of the files beside an exit-code file; the last one holds how many jobs of a bundle are over."""

_LONGEST = 256
"""Bytes of an exit-code file."""

VM_DIRECTORY = Path("/tmp")
"""A directory that every VM has and everybody may write to."""

_FIND_CONFIGURATION = '[ -e "${SLURM_CONF:-/}" ] || unset SLURM_CONF'
"""SLURM_CONF comes from the submitting machine; where no such file exists on the node, Slurm's commands
must find the node's own configuration."""


class WitnessSilent(OSError):
    """What a script has left cannot be read just now. Says nothing about it; ask again later."""


@dataclass(frozen=True)
class Exit:
    """How a script ended. `begun` and `ended` are known of bundled jobs: seconds since the bundle began."""

    code: int
    begun: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class BundledJob:
    """One job of a bundle; `limit` in seconds."""

    name: str
    command: str
    log: str
    exit_file: str
    limit: float | None


def job_script(name: str, command: str, exit_file: str) -> str:
    """A script that runs `command`, then writes its exit code to `exit_file` in one atomic step.

    A script that was revoked before it began does nothing: it was taken for lost and made again. One that
    Slurm runs once more (`scontrol requeue`) must not leave the exit code of its first run behind.
    One that Slurm ends lives until its command has: nothing may write when Slurm calls the job ended. A
    failure is then none of the command's own.
    """
    title = " ".join(name.split())
    whole, part, begun, revoked = (
        shlex.quote(f"{exit_file}{suffix}") for suffix in ("", PART, BEGUN, REVOKED)
    )
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {title}",
            f": >{begun}",
            f"[ ! -e {revoked} ] || {{ rm -f {begun}; exit {VOID}; }}",
            f"[ ! -e {whole} ] || rm -f {whole}",
            _FIND_CONFIGURATION,
            "trap ended=yes TERM",
            "(",
            command,
            ")",
            "code=$?",
            f'[ $code -ne 0 ] && [ -n "$ended" ] || {{ echo $code >{part} && mv -f {part} {whole}; }}',
            "exit $code",
            "",
        ]
    )


def storage_job_script(
    name: str, command: str, exit_file: str, python: str, where: Mapping[str, object]
) -> str:
    """The same on a VM that shares no file system: the script leaves its exit code and, after a failure, its
    log in the bucket (`vm_storage.py`, with its argument `where`), and runs `command` in a directory of its
    own. Nothing of the submitting machine's environment need exist on the VM."""
    storage = shlex.quote(json.dumps(where))
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {' '.join(name.split())}",
            f"log={shlex.quote(vm_log(exit_file))}",
            _FIND_CONFIGURATION,
            '[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR',
            'work=$(mktemp -d "${TMPDIR:-/tmp}/schlouder-XXXXXXXX") || exit',
            '[ -n "$HOME" ] && [ -w "$HOME" ] || { HOME=$work; export HOME; }',
            '[ -w "${XDG_CACHE_HOME:-$HOME}" ] || unset XDG_CACHE_HOME',
            # In another directory: Python would take modules of the workflow for its own.
            "tell() (",
            f'cd / && exec {shlex.quote(python)} - "$1" {storage} "$log" $code "$told" <<\'PYTHON\'',
            _vm_storage().rstrip(),
            "PYTHON",
            ")",
            "trap ended=yes TERM",
            "tell begin",
            "code=$?",
            f'[ $code -ne {VOID} ] || {{ rm -rf "$work" "$log"; exit $code; }}',
            "if [ $code -eq 0 ]; then",
            "(",
            'cd "$work" || exit',
            command,
            ")",
            "code=$?",
            "fi",
            "trap '' TERM",
            'told=$code; [ $code -eq 0 ] || [ -z "$ended" ] || told=',
            "tell end",
            'rm -rf "$work" "$log"',
            "exit $code",
            "",
        ]
    )


def vm_log(exit_file: str) -> str:
    """Where on a VM that shares no file system the log of the job with this exit-code file is."""
    path = Path(exit_file)
    return f"{VM_DIRECTORY}/schlouder-{path.parent.name}-{path.stem}.log"


@functools.cache
def _vm_storage() -> str:
    return Path(__file__).with_name("vm_storage.py").read_text()


def bundle_script(jobs: Sequence[BundledJob]) -> str:
    """A script that runs the jobs one after the other (`runner.py`), with the Python that the first one's
    command names."""
    words = words_of(jobs[0].command)
    at = words.index("-m") - 1 if "-m" in words[1:] else -1
    python = words[at] if at >= 0 else sys.executable
    text = json.dumps([asdict(job) for job in jobs])
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {' '.join(jobs[0].name.split())} and {len(jobs) - 1} more",
            _FIND_CONFIGURATION,
            f"exec {shlex.quote(python)} -m snakemake_executor_plugin_schlouder.slurm.runner <<'JOBS'",
            text,
            "JOBS",
            "",
        ]
    )


def words_of(command: str) -> list[str]:
    """The words of a command, none where only a shell can tell them apart."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def revoke(exit_file: str) -> bool:
    """Forbids the script with this exit-code file to begin, should it be started late. True: it has begun.

    The script leaves its mark before it looks for ours, and we ours before we look for its: one of the
    two sees the other.
    """
    with contextlib.suppress(OSError):
        Path(exit_file + REVOKED).touch()
    return has_begun(exit_file)


def has_begun(exit_file: str) -> bool:
    """Whether the script with this exit-code file has begun."""
    return Path(exit_file + BEGUN).exists()


def markers(exit_file: str) -> tuple[str, ...]:
    """What a script leaves that is of no use once its task has ended; not what revokes it."""
    return exit_file, exit_file + PART, exit_file + BEGUN


def exit_of(exit_file: str) -> Exit | None:
    """What the script wrote; None if it has not ended, or not by itself. Anything but a short regular file
    of our own counts as not there."""
    try:
        code, *times = _own_text(exit_file).split()
        return Exit(int(code), *(float(time) for time in times[:2]))
    except (OSError, ValueError):
        return None


def _own_text(path: str) -> str:
    """The text of a short regular file of our own; "" of anything else, of which no link is followed and no
    writer waited for. OSError if there is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        is_ours = S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        return (
            os.read(descriptor, _LONGEST).decode() if is_ours and status.st_size <= _LONGEST else ""
        )
    finally:
        os.close(descriptor)
