"""Faults of EC2: away, throttled, lying, without machines; and somebody else's machines."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from bench.faults.fault import CLEAN_ERROR, COMPLETE, Fault, by_name
from bench.faults.scene import Scene
from snakemake_executor_plugin_schlouder.localcloud import Faults, Reclaims, Throttle
from snakemake_executor_plugin_schlouder.provision import TAG_NODE, TAG_OWNER, TAG_RUN

NO_MACHINES = Faults(capacity={"*/*/*": 0})
AWAY = 60.0
OLD = 125.0
"""Seconds after which a machine that EC2 does not list may be gone (R8), and some more."""


def _away_at_work(scene: Scene) -> None:
    scene.when_busy()
    scene.cloud.inject(Faults(away=True))
    time.sleep(AWAY)


def _away_at_end(scene: Scene) -> None:
    """All jobs end meanwhile, and nobody can be asked to end the VMs."""
    scene.when_busy()
    scene.cloud.inject(Faults(away=True))
    scene.open_gate()
    time.sleep(AWAY)


def _away_at_boot(scene: Scene) -> None:
    """The machines have been started; what they read of the cloud to join, they cannot."""
    scene.when(scene.alive, "a VM is started")
    scene.cloud.inject(Faults(away=True))
    scene.open_gate()
    time.sleep(AWAY)


def _to_the_end(scene: Scene) -> None:
    scene.open_gate()
    if not scene.ends_within(500):
        scene.problems.append("it does not end")
    scene.notes += [f"{kind} {count}" for kind, count in scene.cloud.struck().items() if count]


def _forgets(scene: Scene) -> None:
    """For long enough that one could believe it; the jobs run on."""
    busy = scene.when_busy()
    time.sleep(OLD)
    scene.cloud.inject(Faults(not_found=1.0))
    time.sleep(110)
    scene.cloud.inject(Faults())
    still = {attempt.name for attempt in scene.living()}
    dead = [attempt.node for attempt in busy if attempt.name not in still]
    if dead:
        scene.problems.append(
            f"VMs were given up though they lived: {', '.join(sorted(set(dead)))}"
        )


def _comes_back(scene: Scene) -> None:
    scene.when(lambda: "No machine is to be had" in scene.said, "it is told")
    time.sleep(10)
    scene.cloud.inject(Faults())
    scene.open_gate()
    scene.ends_within(500)


def _never_comes_back(scene: Scene) -> None:
    """It would wait for ever; the user does not."""
    scene.when(lambda: "No machine is to be had" in scene.said, "it is told")
    time.sleep(20)
    assert scene.process is not None
    os.killpg(scene.process.pid, signal.SIGINT)


def _look_alikes(scene: Scene) -> None:
    """Machines of somebody else whose tags are nearly ours."""
    scene.when_busy()
    run, node = scene.run_name(), scene.living()[0].node
    tags: list[dict[str, str]] = [
        {TAG_RUN: f"{run}x", TAG_NODE: node, TAG_OWNER: "somebody"},
        {TAG_RUN.title(): run, TAG_NODE: node},
        {TAG_NODE: node, "Name": node},
    ]
    image = scene.own()[0]["ImageId"]
    launched = [_launch(scene, image, each) for each in tags]
    scene.notes.append(f"{len(launched)} of them")
    scene.foreign += launched


def _launch(scene: Scene, image: str, tags: dict[str, str]) -> str:
    named = [{"Key": key, "Value": value} for key, value in tags.items()]
    reply: dict[str, Any] = scene.place.ec2.run_instances(
        ImageId=image,
        InstanceType="m5.large",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": named}],
    )
    return str(reply["Instances"][0]["InstanceId"])


def _terminate_by_hand(scene: Scene) -> None:
    vm = scene.instance_of(scene.when_busy()[0].node)
    scene.place.ec2.terminate_instances(InstanceIds=[vm])
    time.sleep(3)


FAULTS = by_name(
    [
        Fault("ec2-away", "EC2 is away for a minute", COMPLETE, _away_at_work),
        Fault(
            "ec2-away-at-end",
            "EC2 is away for a minute, in which the last job ends",
            COMPLETE,
            _away_at_end,
            leased=True,
        ),
        Fault(
            "ec2-away-at-boot",
            "EC2, and with it the cluster's key, is away for a minute while VMs boot",
            COMPLETE,
            _away_at_boot,
        ),
        Fault(
            "ec2-throttled",
            "EC2 refuses every call in the first 8 of every 15 s",
            COMPLETE,
            _to_the_end,
            faults=Faults(throttle=Throttle(share=1.0, period=15.0, seconds=8.0)),
        ),
        Fault(
            "ec2-lies",
            "every other DescribeInstances and TerminateInstances knows no machine",
            COMPLETE,
            _to_the_end,
            faults=Faults(not_found=0.5),
        ),
        Fault(
            "ec2-forgets",
            "EC2 lists none of the VMs for nearly two minutes; they live",
            COMPLETE,
            _forgets,
        ),
        Fault(
            "no-capacity",
            "no machine is to be had at first; later there is",
            COMPLETE,
            _comes_back,
            faults=NO_MACHINES,
        ),
        Fault(
            "no-capacity-ever",
            "no machine is ever to be had: told once, waited for, until Ctrl-C",
            CLEAN_ERROR,
            _never_comes_back,
            faults=NO_MACHINES,
            says="No machine is to be had",
        ),
        Fault(
            "reclaim-storm",
            "every spot VM is taken back 1 to 8 s after it runs, with 4 s of notice",
            COMPLETE,
            _to_the_end,
            options=("--schlouder-spot", "prefer"),
            faults=Faults(seed=6, reclaim=Reclaims(share=1.0, after=(1.0, 8.0), notice=4.0)),
        ),
        Fault(
            "similar-tags",
            "somebody else's VMs with tags that look like ours",
            COMPLETE,
            _look_alikes,
        ),
        Fault(
            "vm-terminated",
            "an operator terminates a VM under its jobs",
            COMPLETE,
            _terminate_by_hand,
        ),
    ]
)
