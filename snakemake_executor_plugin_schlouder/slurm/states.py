"""Slurm's job states: what each means for a task, and a sentence for a person.

The codes are those of squeue(1) and sacct(1), section JOB STATE CODES, of Slurm 22.05.
"""

from __future__ import annotations

from enum import StrEnum


class JobPhase(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The job's own doing, or its owner's: Snakemake decides whether it is tried again."""
    LOST = "lost"
    """The machine's doing: ours to run again."""


_STATES: dict[str, tuple[JobPhase, str]] = {
    "PENDING": (JobPhase.WAITING, "waits in Slurm's queue"),
    "CONFIGURING": (JobPhase.WAITING, "its node is being prepared"),
    "REQUEUED": (JobPhase.WAITING, "was put back into Slurm's queue"),
    "REQUEUE_FED": (JobPhase.WAITING, "was put back into Slurm's queue"),
    "REQUEUE_HOLD": (JobPhase.WAITING, "was put back into Slurm's queue and is held"),
    "SPECIAL_EXIT": (JobPhase.WAITING, "was put back into Slurm's queue and is held"),
    "RESV_DEL_HOLD": (JobPhase.WAITING, "is held because its reservation is gone"),
    "RUNNING": (JobPhase.RUNNING, "runs"),
    "COMPLETING": (JobPhase.RUNNING, "is ending"),
    "RESIZING": (JobPhase.RUNNING, "runs"),
    "SIGNALING": (JobPhase.RUNNING, "runs"),
    "STAGE_OUT": (JobPhase.RUNNING, "copies its files out"),
    "STOPPED": (JobPhase.RUNNING, "was stopped by a signal and keeps its CPUs"),
    "SUSPENDED": (JobPhase.RUNNING, "is suspended"),
    "COMPLETED": (JobPhase.SUCCEEDED, "ended with exit code 0"),
    "FAILED": (JobPhase.FAILED, "ended with a non-zero exit code"),
    "CANCELLED": (JobPhase.FAILED, "was cancelled in Slurm"),
    "REVOKED": (JobPhase.FAILED, "was revoked by Slurm"),
    "DEADLINE": (JobPhase.FAILED, "did not end before its deadline"),
    "OUT_OF_MEMORY": (JobPhase.FAILED, "used more memory than its mem_mb"),
    "TIMEOUT": (JobPhase.FAILED, "ran longer than its runtime"),
    "BOOT_FAIL": (JobPhase.LOST, "its node did not start"),
    "NODE_FAIL": (JobPhase.LOST, "its node was lost"),
    "PREEMPTED": (JobPhase.LOST, "was preempted"),
}


def phase_of(state: str) -> JobPhase:
    """Phase of a state as squeue prints it (`CANCELLED by 0` is CANCELLED); unknown ones count as running,
    for a job must never be called ended on doubt."""
    return _STATES.get(_word(state), (JobPhase.RUNNING, ""))[0]


def sentence_of(state: str) -> str:
    return _STATES.get(
        _word(state), (JobPhase.RUNNING, f"is in state {state}, unknown to schlouder")
    )[1]


def _word(state: str) -> str:
    return state.split()[0].rstrip("+") if state.strip() else ""
