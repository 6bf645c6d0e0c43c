"""The batch script of one task, and the exit-code file it leaves: the second witness of a job's result."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

REVOKED = 75
"""Exit code of a script that was revoked (EX_TEMPFAIL)."""

_PART, _BEGUN, _REVOKED = ".part", ".begun", ".revoked"


def job_script(name: str, command: str, exit_file: str) -> str:
    """A script that runs `command`, then writes its exit code to `exit_file` in one atomic step.

    A script that was revoked before it began does nothing: it was taken for lost and made again. One that
    Slurm runs once more (`scontrol requeue`) must not leave the exit code of its first run behind.
    SLURM_CONF comes from the submitting machine; where no such file exists on the node, Slurm's
    commands must find the node's own configuration.
    """
    title = " ".join(name.split())
    whole, part, begun, revoked = (
        shlex.quote(f"{exit_file}{suffix}") for suffix in ("", _PART, _BEGUN, _REVOKED)
    )
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {title}",
            f": >{begun}",
            f"[ ! -e {revoked} ] || {{ rm -f {begun}; exit {REVOKED}; }}",
            f"[ ! -e {whole} ] || rm -f {whole}",
            '[ -e "${SLURM_CONF:-/}" ] || unset SLURM_CONF',
            "(",
            command,
            ")",
            "code=$?",
            f"echo $code >{part} && mv -f {part} {whole}",
            "exit $code",
            "",
        ]
    )


def revoke(exit_file: str) -> bool:
    """Forbids the script with this exit-code file to begin, should it be started late. True: it has begun.

    The script leaves its mark before it looks for ours, and we ours before we look for its: one of the
    two sees the other.
    """
    with contextlib.suppress(OSError):
        Path(exit_file + _REVOKED).touch()
    return Path(exit_file + _BEGUN).exists()


def markers(exit_file: str) -> tuple[str, ...]:
    """What a script leaves that is of no use once its task has ended; not what revokes it."""
    return exit_file, exit_file + _PART, exit_file + _BEGUN


def exit_code(exit_file: str) -> int | None:
    """What the script wrote; None if it has not ended, or not by itself."""
    try:
        return int(Path(exit_file).read_text())
    except (OSError, ValueError):
        return None
