"""Runs on a VM: the jobs of a bundle one after the other, each in a fork of a Python that has Snakemake
loaded, so that only the first one waits for that.

Started by `script.bundle_script`, which gives it the jobs as JSON. A job that fails, hangs beyond its limit
or is revoked leaves the others alone; each has its log and its exit-code file.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .script import BEGUN, DONE, GRACE, PART, REVOKED, TIMED_OUT, BundledJob, words_of

_BEGAN = time.monotonic()


def main() -> None:
    """A bundle that Slurm runs once more (`scontrol requeue`) goes on after the last job that was over."""
    jobs = [BundledJob(**job) for job in json.load(sys.stdin)]
    done = Path(jobs[0].exit_file + DONE)
    over = int(done.read_text()) if done.exists() else 0
    signal.signal(signal.SIGTERM, _end)
    _load_snakemake()
    for number, job in enumerate(jobs[over:], over + 1):
        Path(job.exit_file + BEGUN).touch()
        if Path(job.exit_file + REVOKED).exists():
            Path(job.exit_file + BEGUN).unlink(missing_ok=True)
            continue
        begun = time.monotonic() - _BEGAN
        child = os.fork()
        if child == 0:
            sys.exit(_run(job))
        with contextlib.suppress(OSError):  # whoever comes first, the child or we
            os.setpgid(child, child)
        code = _wait(child, job.limit)
        _leave(job.exit_file, f"{code} {begun:.3f} {time.monotonic() - _BEGAN:.3f}\n")
        _leave(str(done), str(number))


class _Ended(SystemExit):
    """Slurm ends the bundle: what runs is ended with it, and nothing more is begun."""


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended(128 + number)


def snakemake_call(command: str) -> tuple[str, list[str]] | None:
    """(directory, arguments) of `PYTHON -m snakemake ARGUMENTS`, with or without `cd DIRECTORY &&` before it;
    None for a command that only a shell understands."""
    if "$" in command or "`" in command:
        return None
    words, directory = words_of(command), "."
    if words[:1] == ["cd"] and words[2:3] == ["&&"]:
        directory, words = words[1], words[3:]
    if words[1:3] != ["-m", "snakemake"] or {"&&", "||", "|", "&"} & set(words):
        return None
    return directory, words[3:]


def _load_snakemake() -> None:
    """All that a Snakemake imports before it looks at its workflow, plugins included."""
    from importlib import import_module

    for name in ("cli", "api", "workflow", "dag", "scheduling.job_scheduler", "executors.local"):
        import_module(f"snakemake.{name}")
    with contextlib.suppress(ImportError, AttributeError):
        import_module("snakemake.cli").get_argument_parser()
    with contextlib.suppress(ImportError):
        import_module("smart_open")
    gc.freeze()


def _run(job: BundledJob) -> int:
    """In the child: the job's exit code, unless a shell takes its place."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    call = snakemake_call(job.command)
    if call is None:
        os.execv("/bin/sh", ["sh", "-c", job.command])
    directory, arguments = call
    os.chdir(directory)
    return _snakemake(arguments)


def _snakemake(arguments: Sequence[str]) -> int:
    from snakemake.cli import main

    sys.argv = ["snakemake", *arguments]
    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _wait(child: int, limit: float | None) -> int:
    """The child's exit code, as a shell would tell it. Nothing is left of its process group then."""
    watch = os.pidfd_open(child)
    try:
        is_over = bool(select.select([watch], [], [], limit)[0])
        if not is_over:
            _ask_to_end(child, watch)
    except _Ended:
        _ask_to_end(child, watch)
        _kill_group(child)
        raise
    finally:
        os.close(watch)
    _kill_group(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not is_over:
        return TIMED_OUT
    return code if code >= 0 else 128 - code


def _ask_to_end(child: int, watch: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGTERM)
    select.select([watch], [], [], GRACE)


def _kill_group(child: int) -> None:
    """Before the child is waited for: until then its number is nobody else's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _leave(path: str, text: str) -> None:
    """In one atomic step, so that nobody reads half of it."""
    part = Path(path + PART)
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    main()
