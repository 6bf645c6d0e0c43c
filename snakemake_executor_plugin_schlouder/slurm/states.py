"""Slurm's job states and pending reasons: what each means for a task, and a sentence for a person.

The states are those of squeue(1) and sacct(1) of Slurm 22.05 and of "Job State Codes" of the later
releases, base states and flags alike: squeue shows a flag, if there is one, instead of the base state. The
reasons are those of "Job Reason Codes".
"""

from __future__ import annotations

import pwd
import re
from enum import StrEnum


class JobPhase(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The job's own doing, or its owner's: Snakemake decides whether it is tried again."""
    DISPLACED = "displaced"
    """Ended by Slurm in favour of another job. The machine is good: ours to run again there."""
    LOST = "lost"
    """The machine's doing: ours to run again elsewhere."""


_STATES: dict[str, tuple[JobPhase, str]] = {
    "PENDING": (JobPhase.WAITING, "waits in Slurm's queue"),
    "CONFIGURING": (JobPhase.WAITING, "its node is being prepared"),
    "POWER_UP_NODE": (JobPhase.WAITING, "its node is being started"),
    "RECONFIG_FAIL": (JobPhase.WAITING, "its node could not be prepared"),
    "LAUNCH_FAILED": (JobPhase.WAITING, "could not be launched, and was put back into the queue"),
    "REQUEUED": (JobPhase.WAITING, "was put back into Slurm's queue"),
    "EXPEDITING": (JobPhase.WAITING, "was put back into Slurm's queue, to its head"),
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
    "UPDATE_DB": (JobPhase.RUNNING, "is being written to Slurm's accounting"),
    "COMPLETED": (JobPhase.SUCCEEDED, "ended with exit code 0"),
    "FAILED": (JobPhase.FAILED, "ended with a non-zero exit code"),
    "CANCELLED": (JobPhase.FAILED, "was cancelled in Slurm"),
    "REVOKED": (JobPhase.FAILED, "was revoked by Slurm"),
    "DEADLINE": (JobPhase.FAILED, "could not end before its deadline"),
    "OUT_OF_MEMORY": (JobPhase.FAILED, "used more memory than its mem_mb"),
    "TIMEOUT": (JobPhase.FAILED, "ran longer than its runtime"),
    "PREEMPTED": (JobPhase.DISPLACED, "was preempted by another job"),
    "BOOT_FAIL": (JobPhase.LOST, "its node did not start"),
    "NODE_FAIL": (JobPhase.LOST, "its node was lost"),
}

_UNEXPECTED_ENDS = {
    "JobLaunchFailure": "was ended by its node: it could not be launched there (is its directory on the "
    "VM?), or used more memory than its mem_mb",
    "Prolog": "could not be launched: the node's prolog failed",
    "SystemFailure": "was ended by a failure of Slurm, the file system or the network",
}
"""Reasons of FAILED that say more than an exit code does."""

_LIMITS = (
    r"(Assoc|QOS)(Grp|Max|Min|Job|Resource|Time|Usage)\w*|Association\w+Limit|Max\w+PerAccount"
    r"|MaxMemPerLimit|AccountingPolicy"
)

_STUCK: tuple[tuple[str, str], ...] = (
    (
        "JobHeldUser|JobHeldAdmin|JobHoldMaxRequeue|.*requeued held|.*requeued in held state",
        "it is held until somebody releases it (scontrol release {id}) or gives it up (scancel {id})",
    ),
    (
        "BadConstraints",
        "its VM cannot satisfy it; look at the rule's constraint, gres and slurm_extra",
    ),
    (
        "InvalidAccount|AccountNotAllowed|Job's.account.not.*",
        "look at the rule's slurm_account, and whether the partition allows it",
    ),
    (
        "InvalidQOS|QOSNotAllowed|Job's.QOS.not.*",
        "look at the rule's qos, and whether the partition allows it",
    ),
    ("ReservationDeleted", "the rule's reservation is no more; give it up (scancel {id})"),
    ("DependencyNeverSatisfied", "look at the dependency in the rule's slurm_extra"),
    (
        "PartitionNodeLimit|PartitionTimeLimit|PartitionConfig",
        "it is beyond a limit of the partition; look at the rule's runtime, or have the limit raised",
    ),
    (
        "PartitionDown|PartitionInactive",
        "the partition starts no jobs; an operator sets it up again (scontrol update partition=... state=up)",
    ),
    (
        _LIMITS,
        "a limit of your account or QOS is in its way; ask for less, or have the limit raised",
    ),
    (
        "ReqNodeNotAvail.*|Nodes required for job are DOWN.*",
        "Slurm keeps its node from taking jobs; `scontrol show reservation` and `sinfo -R` may say why",
    ),
)
"""Pending reasons that do not pass by themselves, and what to do; squeue shows slurmctld's own sentence
instead of the reason's name, if there is one."""


def phase_of(state: str) -> JobPhase:
    """Phase of a state as squeue prints it (`CANCELLED by 0` is CANCELLED); unknown ones count as running,
    for a job must never be called ended on doubt."""
    return _STATES.get(_word(state), (JobPhase.RUNNING, ""))[0]


def sentence_of(state: str) -> str:
    return _STATES.get(
        _word(state), (JobPhase.RUNNING, f"is in state {state}, unknown to schlouder")
    )[1]


def failure_of(state: str, reason: str, memory: int, limit: float | None) -> str:
    """Why a job failed that Slurm ended, with what it had asked for: `memory` in MiB, `limit` in seconds
    (None: the partition's)."""
    word = _word(state)
    if word == "OUT_OF_MEMORY":
        sentence = f"used more memory than its mem_mb ({memory} MiB)"
    elif word == "TIMEOUT" and limit is None:
        sentence = "ran longer than the partition's time limit (the rule has no runtime)"
    elif word == "TIMEOUT" and limit is not None:
        sentence = f"ran longer than its runtime ({limit / 60:g} min)"
    elif word == "FAILED" and reason in _UNEXPECTED_ENDS:
        sentence = _UNEXPECTED_ENDS[reason]
    else:
        sentence = sentence_of(state) + _by_whom(state)
    told = f", {reason}" if word == "FAILED" and reason not in ("", "None") else ""
    return f"{sentence} (Slurm: {state}{told})"


def advice_on(reason: str, slurm_id: str) -> str | None:
    """What to do about a job that waits for this reason; None if the reason passes by itself."""
    for pattern, advice in _STUCK:
        if re.fullmatch(pattern, reason):
            return advice.format(id=slurm_id)
    return None


def _by_whom(state: str) -> str:
    """The user of `CANCELLED by UID`."""
    found = re.search(r" by (\d+)", state)
    if found is None:
        return ""
    try:
        return f" by {pwd.getpwuid(int(found[1])).pw_name}"
    except (KeyError, OverflowError):
        return f" by the user with id {found[1]}"


def _word(state: str) -> str:
    return state.split()[0].rstrip("+") if state.strip() else ""
