"""Faults of the Slurm controller and of nodes, as Slurm sees them."""

from __future__ import annotations

import time
from pathlib import Path

from bench.faults import ledger
from bench.faults.fault import CLEAN_ERROR, COMPLETE, Fault, by_name
from bench.faults.scene import Scene, submit_foreign

AWAY = 300.0
GUEST = "guest"


def _restart(scene: Scene) -> None:
    scene.when_busy()
    scene.cloud.service("slurmctld", "kill")
    time.sleep(3)
    scene.cloud.service("slurmctld", "start")
    time.sleep(3)


def _away(scene: Scene) -> None:
    """What runs ends meanwhile."""
    scene.when_busy()
    scene.cloud.service("slurmctld", "end")
    scene.open_gate()
    time.sleep(AWAY)
    scene.cloud.service("slurmctld", "start")


def _crash(scene: Scene) -> None:
    """It has not written down the last jobs that it took, and gives their ids to the next ones."""
    scene.when_busy()
    scene.cloud.service("slurmctld", "kill")
    scene.open_gate()
    time.sleep(30)
    scene.cloud.service("slurmctld", "start")


def _hangs(scene: Scene) -> None:
    scene.when_busy()
    scene.cloud.service("slurmctld", "stop")
    scene.open_gate()
    time.sleep(60)
    scene.cloud.service("slurmctld", "continue")


def _without_munge(scene: Scene) -> None:
    scene.when_busy()
    scene.cloud.service("munged", "kill")
    scene.open_gate()
    time.sleep(45)
    scene.cloud.service("munged", "start")


def _delete_node(scene: Scene) -> None:
    node = scene.when_busy()[0].node
    scene.place.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=operator")
    scene.when(lambda: not _has_job(scene, node), f"Slurm has ended the jobs on {node}")
    scene.place.slurm("scontrol", "delete", f"nodename={node}")


def _drain_node(scene: Scene) -> None:
    node = scene.when_busy()[0].node
    scene.place.slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=operator")
    time.sleep(8)


def _has_job(scene: Scene, node: str) -> bool:
    return bool(scene.place.slurm("squeue", "--noheader", f"--nodelist={node}"))


def _flap(scene: Scene) -> None:
    """slurmd is killed and started again five times; the jobs have a slurmstepd of their own."""
    vm = scene.instance_of(scene.when_busy()[0].node)
    command = scene.cloud.run_in_vm(vm, "sh", "-c", "cat /proc/$(pidof slurmd)/cmdline").split("\0")
    for _ in range(5):
        scene.cloud.run_in_vm(vm, "pkill", "-KILL", "-x", "slurmd")
        time.sleep(2)
        said = scene.cloud.run_in_vm(vm, *command[:-1])
        if "error" in said:
            scene.problems.append(f"slurmd: {said.strip()}")
        time.sleep(2)


def _small_nodes(scene: Scene) -> None:
    """slurmctld believes what slurmd finds, and not what it is told: no host here has so much memory."""
    conf = Path(scene.place.environment["SLURM_CONF"])
    kept = conf.read_text().replace("SlurmdParameters=config_overrides\n", "")
    conf.write_text(kept)
    scene.place.slurm("scontrol", "reconfigure")


def _right_nodes(scene: Scene) -> None:
    conf = Path(scene.place.environment["SLURM_CONF"])
    conf.write_text(conf.read_text() + "SlurmdParameters=config_overrides\n")
    scene.place.slurm("scontrol", "reconfigure")


def _to_the_end(scene: Scene) -> None:
    scene.open_gate()
    assert scene.process is not None
    scene.ends_within(400)


def _guest(scene: Scene) -> None:
    """Somebody else's job comes to a VM that has room."""
    for attempt in scene.when_busy(1):
        if sum(other.node == attempt.node for other in scene.living()) == 1:
            break
    submit_foreign(scene.place, attempt.node, GUEST)
    scene.when(lambda: _guests(scene), "the foreign job runs")
    scene.excused.add(scene.instance_of(attempt.node))


def _guests(scene: Scene) -> list[ledger.Attempt]:
    now = time.monotonic()
    found = ledger.read(scene.directory / f"{GUEST}.ledger")
    return [attempt for attempt in found if attempt.lives(now)]


def _guest_goes_on(scene: Scene) -> None:
    (vm,) = scene.excused
    states = {one["InstanceId"]: one["State"]["Name"] for one in scene.own()}
    if not _guests(scene) or states[vm] != "running":
        scene.problems.append(f"the foreign job on {vm} ({states[vm]}) did not survive")
    if f"terminate-instances --instance-ids {vm}" not in scene.said:
        scene.problems.append(f"nobody was told that {vm} is kept")
    scene.notes.append("its VM is kept, and how to end it is told")
    (scene.directory / f"{GUEST}.gate").unlink()


FAULTS = by_name(
    [
        Fault(
            "slurmctld-restart",
            "slurmctld is killed, and started again 3 s later",
            COMPLETE,
            _restart,
        ),
        Fault("slurmctld-away", "slurmctld is away for 5 minutes, while jobs end", COMPLETE, _away),
        Fault(
            "slurmctld-crash",
            "slurmctld dies with the last jobs not saved, and is away for 30 s, while jobs end",
            COMPLETE,
            _crash,
        ),
        Fault(
            "slurmctld-hangs",
            "slurmctld answers nobody for a minute (SIGSTOP), while jobs end",
            COMPLETE,
            _hangs,
        ),
        Fault("munged", "munged of the controller is dead for 45 s", COMPLETE, _without_munge),
        Fault(
            "node-deleted",
            "an operator takes down and deletes a node under its jobs",
            COMPLETE,
            _delete_node,
        ),
        Fault("node-drained", "an operator drains a node", COMPLETE, _drain_node),
        Fault(
            "slurmd-flaps", "slurmd of a VM is killed and started again 5 times", COMPLETE, _flap
        ),
        Fault(
            "wrong-memory",
            "VMs have less memory than their type: Slurm takes no such node (INVAL)",
            CLEAN_ERROR,
            _to_the_end,
            options=("--schlouder-instance-types", "m5.4xlarge"),
            says="3 VMs in a row did not join Slurm",
            set_up=_small_nodes,
            mend=_right_nodes,
        ),
        Fault(
            "foreign-job",
            "somebody else's job on one of our VMs, which outlives the run",
            COMPLETE,
            _guest,
            parts=5,
            free=2,
            options=("--schlouder-strategy", "one-vm-per-job"),
            last=_guest_goes_on,
        ),
    ]
)
