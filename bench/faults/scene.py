"""What a fault strikes: Snakemake at work on an embedded cloud, beside somebody else's VM and Slurm job."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.faults import ledger
from bench.faults.ledger import Attempt
from bench.faults.place import Place, end, node_of, tags_of
from bench.site import ROOT, start_nodes
from snakemake_executor_plugin_schlouder import job_files
from snakemake_executor_plugin_schlouder.localcloud import Faults, LocalCloud, Options
from snakemake_executor_plugin_schlouder.provision import TAG_RUN

WORKFLOW = Path(__file__).with_name("workflow")
TAG = "trial"
FOREIGN = "foreign-1"
PARTS = 12
PATIENCE = 120.0
_PAUSE = 0.1
_SETTLE = 15.0


class NeverStruck(Exception):
    """The moment for a fault did not come; says which."""


@dataclass
class Scene:
    """One workflow directory. `options` go to Snakemake; after the first `free` jobs none ends before the
    gate is opened. `notes` and `problems` are what a fault wants told about itself."""

    place: Place
    options: Sequence[str] = ()
    parts: int = PARTS
    free: int = PARTS
    process: subprocess.Popen[bytes] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settle: float = _SETTLE
    """Seconds that machines may take to end after Snakemake has."""

    is_orphaned: bool = False
    """Nobody knows of its VMs any more."""

    excused: set[str] = field(default_factory=set)
    """Instances that are meant to stay."""

    foreign: list[str] = field(default_factory=list)
    """Instances of somebody else, which must run until the end."""

    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def cloud(self) -> LocalCloud:
        return self.place.cloud

    @property
    def directory(self) -> Path:
        return self.place.directory

    @property
    def log(self) -> Path:
        return self.directory / "snakemake.log"

    @property
    def said(self) -> str:
        """By all Snakemakes of this directory."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def gate(self) -> Path:
        return self.directory / "gate"

    # -- what happens

    def command(self, *more: str) -> list[str]:
        """Options of Snakemake."""
        return [
            *(
                "--schlouder-max-vms",
                "4",
                "--schlouder-keep-logs",
                "--schlouder-tags",
                f"{TAG}={self.directory.name}",
            ),
            *self.options,
            *more,
            *("--config", f"ledger={self.directory / 'ledger'}", f"gate={self.gate}"),
            *(f"parts={self.parts}", f"free={self.free}"),
        ]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        self.process = self.place.start(self.command(*more), self.log)
        return self.process

    def close_gate(self) -> None:
        self.gate.touch()

    def open_gate(self) -> None:
        self.gate.unlink(missing_ok=True)

    def beside(self, name: str) -> Scene:
        """Another workflow directory of the same user on the same cloud."""
        directory = self.directory / name
        directory.mkdir()
        place = Place(self.cloud, directory, self.place.snakefile)
        return Scene(place, self.options, self.parts, self.free)

    # -- what is there

    def attempts(self) -> list[Attempt]:
        return ledger.read(self.directory / "ledger")

    def done_twice(self) -> list[str]:
        return ledger.done_twice(
            self.attempts(), ledger.done(job_files.folder(self.directory.resolve()))
        )

    def living(self) -> list[Attempt]:
        now = time.monotonic()
        return [attempt for attempt in self.attempts() if attempt.lives(now)]

    def reported(self) -> int:
        """Jobs that Snakemake knows to be done."""
        steps = re.findall(r"^(\d+) of \d+ steps", self.said, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def own(self) -> list[dict[str, Any]]:
        """The instances of this workflow directory."""
        tagged = self.directory.name
        return [one for one in self.place.instances() if tags_of(one).get(TAG) == tagged]

    def alive(self) -> list[dict[str, Any]]:
        return [one for one in self.own() if one["State"]["Name"] != "terminated"]

    def run_name(self) -> str:
        """That of the run that has started a VM last."""
        return tags_of(self.own()[-1])[TAG_RUN]

    def instance_of(self, node: str) -> str:
        """The id of the newest machine of a node."""
        found = [one for one in self.own() if node_of(one) == node]
        return str(found[-1]["InstanceId"])

    def left(self, nodes: bool = True) -> list[str]:
        """Instances of this directory that are there though nothing runs, when machines had time to end, and
        the records of their `nodes`: not where nobody is left who knows of them but `schlouder gc`."""
        nodes = nodes and not self.is_orphaned
        patience = time.monotonic() + self.settle
        while (found := self._left(nodes)) and time.monotonic() < patience:
            time.sleep(0.3)
        return found

    def _left(self, with_nodes: bool) -> list[str]:
        meant = [one for one in self.own() if one["InstanceId"] not in self.excused]
        states = {str(one["InstanceId"]): one["State"]["Name"] for one in meant}
        machines = [name for name, state in states.items() if state != "terminated"]
        nodes = {node_of(one) for one in meant} if with_nodes else set()
        return machines + [name for name in self.place.nodes() if name in nodes]

    # -- moments

    def when(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
        """Waits for it while Snakemake runs. NeverStruck, when that ends or `patience` (s) does."""
        begun = time.monotonic()
        while not condition():
            is_over = self.process is not None and self.process.poll() is not None
            if is_over or time.monotonic() > begun + patience:
                raise NeverStruck(f"{what}: not before {'the end' if is_over else 'too long'}")
            time.sleep(_PAUSE)

    def when_busy(self, least: int = 2) -> list[Attempt]:
        """When what the gate lets pass is done and reported, and at least so many others run, which are
        returned. Nothing ends from then on before the gate is opened."""
        self.when(lambda: self.reported() >= self.free, f"{self.free} jobs are done")
        self.when(lambda: len(self.living()) >= least, f"{least} jobs run")
        return self.living()

    def ends_within(self, seconds: float) -> bool:
        """Whether Snakemake ends by itself meanwhile."""
        assert self.process is not None
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


@dataclass
class Foreigner:
    """A VM of somebody else, and a Slurm job on it, which lives until the scene is over."""

    place: Place
    instance: str

    @classmethod
    def settle(cls, place: Place) -> Foreigner:
        """In this process's environment, too."""
        os.environ.update(place.cloud.environment())
        start_nodes([FOREIGN], "foreign")
        submit_foreign(place, FOREIGN, "foreign")
        (instance,) = [one for one in place.instances() if node_of(one) == FOREIGN]
        return cls(place, str(instance["InstanceId"]))

    def touched(self, more: Sequence[str]) -> list[str]:
        """What has happened to them, or to `more` instances of somebody else."""
        states = {one["InstanceId"]: one["State"]["Name"] for one in self.place.instances()}
        job = next(iter(ledger.read(self.place.directory / "foreign.ledger")), None)
        found = [
            f"{name} is {states[name]}"
            for name in (self.instance, *more)
            if states[name] not in ("pending", "running")
        ]
        if job is None or not job.lives(time.monotonic()):
            found.append("the job on it is gone")
        return found


def submit_foreign(place: Place, node: str, name: str) -> str:
    """Somebody else's job, which writes NAME.ledger; returns its Slurm id."""
    files = [str(place.directory / f"{name}.{kind}") for kind in ("ledger", "gate", "txt")]
    Path(files[1]).touch()
    job = [sys.executable, "-I", "-S", str(WORKFLOW / "job.py"), *files[:2], "0", "0", files[2]]
    return place.slurm(
        *("sbatch", "--parsable", f"--job-name={name}", f"--nodelist={node}", "--mem=100"),
        *(f"--output={place.directory}/{name}.log", "--no-requeue"),
        *("--wrap", shlex.join(job)),
    ).strip()


@contextlib.contextmanager
def on_cloud(directory: Path, name: str, **options: Any) -> Iterator[tuple[Place, Foreigner]]:
    """A new directory on a new cloud, and who else is there. Nothing of the cloud is left afterwards."""
    directory.mkdir(parents=True)
    chosen = Options(name=name, share=[directory, ROOT], **options)
    with LocalCloud.up(chosen, attached=True) as cloud:
        place = Place(cloud, directory, WORKFLOW / "Snakefile")
        yield place, Foreigner.settle(place)


@contextlib.contextmanager
def at_work(scene: Scene) -> Iterator[None]:
    """Whatever happens, no Snakemake of the scene goes on afterwards."""
    with scene.cleanup:
        try:
            yield
        finally:
            if scene.process is not None:
                scene.cloud.inject(Faults())
                end(scene.process)


def expected(parts: int = PARTS) -> Mapping[str, str]:
    """Output → what it must hold."""
    names = [f"{number}.txt" for number in range(parts)]
    made = {f"parts/{name}": f"{name}\n" for name in names}
    return {**made, "all.txt": "".join(["all.txt\n", *made.values()])}
