"""SIGKILL of Snakemake at random moments, and its restart: a hundred times, ten on each of ten clouds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.faults.fault import LONGEST, RESUMES, Result, measured, resume
from bench.faults.place import Place, last_line, wait
from bench.faults.scene import Foreigner, Scene, at_work, on_cloud

NAME = "sigkill"
WHAT = "SIGKILL at 100 random moments, and a restart"
SHARDS = 10
KILLS = 10
"""In each shard."""

PARTS = 6
SEED = 2026
STRATEGIES = ("fastest", "one-vm-per-job", "asap", "cheapest", "one-vm-for-all")
STAGES = ("before the first VM", "while VMs booted", "at work", "after the last job")
TRIES = 20
LEASE, BOOT_TIMEOUT = 30, 60
"""Seconds. A run that was killed when its last job had been handed over has nothing to do when it is started
again: Snakemake does not even make the executor then, and its VMs are left to their lease."""


def shard(number: int, directory: Path, cloud: str) -> list[dict[str, Any]]:
    """The results of its kills, each of which has its directory below a new `directory`, on a new cloud."""
    dice = random.Random(SEED + number)
    with on_cloud(directory, cloud, boot_seconds=(1.0, 2.0)) as (place, foreigner):
        longest = _unkilled(_scene(place, "unkilled", dice))
        found = []
        for count in range(KILLS):
            result = _kill(place, foreigner, f"{number}-{count}", dice, longest)
            found.append(result.to_json())
            print(
                f"faults: {NAME} {result.name}: {'; '.join(result.notes)} {result.wrong}",
                flush=True,
            )
    return found


def total(results: Sequence[Result]) -> Result:
    """All kills as one result; what one has done wrong is told with its name."""

    def all_of(what: str) -> list[str]:
        return [f"{each.name}: {one}" for each in results for one in getattr(each, what)]

    complete = sum(not each.wrong and not each.lost for each in results)
    stages = Counter(each.notes[0] for each in results)
    live, again = (sum(int(each.notes[at].split()[0]) for each in results) for at in (1, 2))
    return Result(
        NAME,
        RESUMES,
        f"{complete}/{len(results)} complete",
        "; ".join(f"{each.name}: {each.wrong}" for each in results if each.wrong),
        sum(each.seconds for each in results),
        lost=all_of("lost"),
        twice=all_of("twice"),
        at_once=all_of("at_once"),
        launched_twice=all_of("launched_twice"),
        left=all_of("left"),
        touched=all_of("touched"),
        notes=[
            "killed " + ", ".join(f"{stages[stage]} times {stage}" for stage in STAGES),
            f"{live} jobs lived then, {live - again} of them were waited for",
        ],
    )


def _scene(place: Place, name: str, dice: random.Random) -> Scene:
    directory = place.directory / name
    directory.mkdir()
    bundle = dice.choice(("on", "off", "off"))
    options = (
        *("--schlouder-strategy", dice.choice(STRATEGIES), "--schlouder-bundle", bundle),
        *("--schlouder-lease", f"{LEASE}s", "--schlouder-boot-timeout", str(BOOT_TIMEOUT)),
    )
    scene = Scene(Place(place.cloud, directory, place.snakefile), options, PARTS, PARTS)
    scene.settle = 2.0 * (LEASE + BOOT_TIMEOUT)
    return scene


def _unkilled(scene: Scene) -> float:
    """Seconds that a run takes here and now."""
    begun = time.monotonic()
    with at_work(scene):
        code = wait(scene.start(), LONGEST)
    if code != 0:
        raise RuntimeError(f"the workflow fails without a kill, too: {last_line(scene.log)}")
    return time.monotonic() - begun


def _kill(
    place: Place, foreigner: Foreigner, name: str, dice: random.Random, longest: float
) -> Result:
    """A run that has ended by then does not count."""
    for turn in range(TRIES):
        scene = _scene(place, f"{name}-{turn}", dice)
        moment = dice.uniform(0.0, longest)
        with at_work(scene):
            begun = time.monotonic()
            process = scene.start()
            if not scene.ends_within(moment):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return _restarted(scene, foreigner, name, begun)
    raise RuntimeError(f"kill {name}: no run lasted long enough")


def _restarted(scene: Scene, foreigner: Foreigner, name: str, begun: float) -> Result:
    stage, living = _stage(scene), scene.living()
    killed = time.monotonic() - begun
    code = resume(scene, was_killed=True)
    seconds = time.monotonic() - begun
    scene.is_orphaned = "Nothing to be done" in scene.said
    problems = [f"exit code {code}: {last_line(scene.log)}"] if code else []
    begins = Counter(attempt.job for attempt in scene.attempts())
    again = [attempt.job for attempt in living if begins[attempt.job] > 1]
    scene.notes += [stage, f"{len(living)} live", f"{len(again)} again", f"after {killed:.1f} s"]
    problems += [f"{job} was begun {count} times" for job, count in begins.items() if count > 1]
    return measured(scene, foreigner, Result(name, RESUMES, RESUMES, "", seconds), problems)


def _stage(scene: Scene) -> str:
    attempts, instances = scene.attempts(), scene.own()
    if not instances:
        return STAGES[0]
    if not attempts:
        return STAGES[1]
    return STAGES[3] if len([one for one in attempts if one.ended]) > PARTS else STAGES[2]
