"""The batch script of one task, and the exit-code file it leaves: the second witness of a job's result."""

from __future__ import annotations

import shlex
from pathlib import Path


def job_script(name: str, command: str, exit_file: Path) -> str:
    """A script that runs `command`, then writes its exit code to `exit_file` in one atomic step.

    SLURM_CONF comes from the submitting machine; where no such file exists on the node, Slurm's
    commands must find the node's own configuration.
    """
    title = " ".join(name.split())
    part, whole = shlex.quote(f"{exit_file}.part"), shlex.quote(str(exit_file))
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {title}",
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


def exit_code(exit_file: Path) -> int | None:
    """What the script wrote; None if it has not ended, or not by itself."""
    try:
        return int(exit_file.read_text())
    except (OSError, ValueError):
        return None
