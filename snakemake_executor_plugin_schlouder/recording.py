"""What a live broker saw and decided, as lines of JSON; and the same broker played again from them.

Whatever can influence a decision passes one `Tape`, in the order in which it happened: the clock, the
two ports, the journal's refusals, exit-code files, and what the executor calls. A `Recorder` lets it
happen and writes it down; a `Player` gives the recorded answers instead. Commands and scripts of jobs,
which may hold secrets, are left out.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from .broker import Books, Broker, BrokerConfig
from .clock import SteadyClock
from .keeping import Keep
from .launcher import Limits
from .lease import Lease
from .market.tariff import Tariff
from .model import VM, Billing, InstanceType, Need, SchlouderError, SlurmOptions, Task, TaskState
from .pool import Announcement, Goal
from .prediction import LearnedBoots, Walltimes
from .provision import (
    Cloud,
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    LaunchRefused,
    LaunchRequest,
    NoCapacity,
    QuotaReached,
    Throttled,
    TokenSpent,
)
from .slurm import (
    Cluster,
    ClusterInfo,
    ClusterUnavailable,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmissionRefused,
    SubmitOutcome,
)
from .slurm.script import Exit, WitnessSilent, exit_of, has_begun, job_script, revoke
from .slurm.states import JobPhase

VERSION = 2

DECISIONS = (
    *("cloud.launch", "cloud.terminate", "cluster.submit", "cluster.drain", "cluster.cancel"),
    *("cluster.cancel_run", "cluster.fail", "cluster.delete"),
)
"""What changes the world; everything else is looking."""

_ASIDE = ("run", "known", "plan")
"""Lines that are no calls: what the broker was made of, and what it does not know."""

_FOR_MANY = (
    *("cloud.launch", "cloud.terminate"),
    *("cluster.submit", "cluster.drain", "cluster.cancel", "cluster.renew"),
)

T = TypeVar("T")

_SILENT = logging.getLogger("schlouder.recording")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class Diverged(Exception):
    """There is no recorded answer to what the broker asks, nor will there be."""


@dataclass(frozen=True)
class PlannedJob:
    """A job of the workflow as known before the run; `after` names the jobs it waits for."""

    name: str
    rule: str
    need: Need
    planned: float | None
    after: tuple[str, ...] = ()


class Line(NamedTuple):
    """One line: what was called with what, and what came of it. A `failure` is an exception."""

    name: str
    asked: Any
    answer: Any
    failure: Any


# -- values as JSON

_KNOWN: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        *(Announcement, Billing, BrokerConfig, Goal, InstanceType, Need, PlannedJob, SlurmOptions),
        *(Task,),
        *(ClusterInfo, ClusterView, Exit, Instance, JobStatus, NodeStatus),
        *(CloudUnavailable, Throttled, NoCapacity, QuotaReached, LaunchRefused, TokenSpent),
        *(ClusterUnavailable, SubmissionRefused, JobPhase, TaskState, OSError),
        *(WitnessSilent, Limits, Keep, Tariff, sqlite3.Error, Path),
    )
}


def encoded(value: Any) -> Any:
    """`value` in terms of JSON: records, exceptions, enums and mappings carry their kind under `is`."""
    if isinstance(value, Enum):
        return {"is": type(value).__name__, "of": [value.value]}
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value):
        names = [part.name for part in fields(value)]
        return {
            "is": type(value).__name__,
            "with": {name: encoded(getattr(value, name)) for name in names},
        }
    if isinstance(value, Exception):
        return {"is": _kind_of(value), "of": [str(value)]}
    if isinstance(value, Mapping):
        return {"is": "dict", "of": [[[encoded(key), encoded(v)] for key, v in value.items()]]}
    if isinstance(value, Path):
        return {"is": "Path", "of": [str(value)]}
    return [encoded(part) for part in value]


def decoded(value: Any) -> Any:
    """SchlouderError if no recorder can have written it. Nothing but the kinds of `_KNOWN` is made."""
    try:
        return _decoded(value)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SchlouderError(f"the recording holds what is of no recording: {error!r}") from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value["is"] == "dict":
        pairs = _decoded(value["of"][0])
        return {tuple(key) if isinstance(key, list) else key: part for key, part in pairs}
    named = {name: _decoded(part) for name, part in value.get("with", {}).items()}
    kind: Callable[..., Any] = _KNOWN.get(value["is"], RuntimeError)
    return kind(*_decoded(value.get("of", [])), **named)


def _kind_of(error: Exception) -> str:
    """The nearest class of `error` that can be made again."""
    names = (cls.__name__ for cls in type(error).__mro__)
    return next((name for name in names if name in _KNOWN), "RuntimeError")


# -- tapes


class Tape(Protocol):
    def call(self, name: str, asked: object, act: Callable[[], T]) -> T:
        """What `act` gives or raises, asked for `asked`; or gave and raised when it was recorded."""
        ...


class Recorder:
    """Writes a recording, one line at a time, so that a run that is killed leaves one that can be read.
    A disk that is full ends the recording, not the run."""

    def __init__(self, path: Path, log: logging.Logger) -> None:
        """SchlouderError if the file cannot be made."""
        try:
            self._file = os.fdopen(_made_anew(path), "w", buffering=1)
        except OSError as error:
            raise SchlouderError(
                f"--schlouder-record: {path} cannot be written: {error.strerror}"
            ) from error
        self._log = log
        self._failed = False

    def call(self, name: str, asked: object, act: Callable[[], T]) -> T:
        try:
            answer = act()
        except Exception as error:
            self.note(name, asked, failure=error)
            raise
        self.note(name, asked, answer)
        return answer

    def note(
        self, name: str, asked: object = None, answer: object = None, failure: object = None
    ) -> None:
        if self._failed:
            return
        try:
            line = [name, encoded(asked), encoded(answer), encoded(failure)]
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._failed = True
            self._log.warning(f"schlouder: the recording is not continued: {error}")

    def close(self) -> None:
        self._file.close()


def _made_anew(path: Path) -> int:
    """A file for its owner alone, as a descriptor. OSError if there is a link, a pipe or somebody else's
    file, who could read it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is no file of yours")
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@dataclass
class Player:
    """Gives the answers of a recording. A question that differs only in what is asked for is noted, and
    answered as the recorded one was."""

    lines: Sequence[Line]
    differences: list[str] = field(default_factory=list)
    alike: int = 0
    _at: int = 0

    def call(self, name: str, asked: object, act: Callable[[], T]) -> T:
        line = self.take(name, encoded(asked))
        if line.failure is not None:
            raise decoded(line.failure)
        return cast(T, decoded(line.answer))

    def peek(self) -> Line | None:
        return self.lines[self._at] if self._at < len(self.lines) else None

    def take(self, name: str, asked: Any) -> Line:
        line = self.peek()
        if line is None:
            raise Diverged("the recording ends within a call")
        if line.name != name:
            self._differs(name, asked, _told(line.name, line.asked))
            raise Diverged(self.differences[-1])
        if line.asked != asked:
            self._differs(name, asked, _told(name, line.asked))
        self.alike += _common(name, line.asked, asked)
        self._at += 1
        return line

    def _differs(self, name: str, asked: Any, recorded: str) -> None:
        number = self._at + 1
        self.differences.append(f"line {number}: {_told(name, asked)}, recorded: {recorded}")


def _told(name: str, asked: Any) -> str:
    return name if asked is None else f"{name} {json.dumps(asked)}"


def _common(name: str, recorded: Any, asked: Any) -> int:
    """How many decisions of one call are as recorded."""
    if name in _FOR_MANY:
        return sum(a == b for a, b in zip(recorded, asked, strict=False))
    return int(name in DECISIONS and recorded == asked)


def _weight(line: Line) -> int:
    """How many decisions a call is: one for each machine or job."""
    if line.name in _FOR_MANY:
        return len(line.asked)
    return int(line.name in DECISIONS)


# -- what passes the tape


@dataclass
class TapedCloud:
    """The port `Cloud`; `real` is None when a recording is played."""

    tape: Tape
    real: Cloud | None

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        asked = [f"{request.node} {request.type.name}" for request in requests]
        return self.tape.call("cloud.launch", asked, lambda: _there(self.real).launch(requests))

    def instances(self, *runs: str) -> list[Instance]:
        return self.tape.call("cloud.instances", None, lambda: _there(self.real).instances(*runs))

    def terminate(self, instance_ids: Sequence[str]) -> None:
        ids = list(instance_ids)
        self.tape.call("cloud.terminate", ids, lambda: _there(self.real).terminate(ids))

    def console(self, instance_id: str) -> str:
        return self.tape.call(
            "cloud.console", instance_id, lambda: _there(self.real).console(instance_id)
        )


@dataclass
class TapedCluster:
    """The port `Cluster`; `real` is None when a recording is played."""

    tape: Tape
    real: Cluster | None

    def check(self) -> ClusterInfo:
        return self.tape.call("cluster.check", None, lambda: _there(self.real).check())

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        asked = [[job.key, ",".join(job.nodes), job.cpus, job.memory] for job in jobs]
        return self.tape.call("cluster.submit", asked, lambda: _there(self.real).submit(jobs))

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        return self.tape.call("cluster.view", None, lambda: _there(self.real).view(run, nodes))

    def cancel_run(self, run: str) -> None:
        self.tape.call("cluster.cancel_run", None, lambda: _there(self.real).cancel_run(run))

    def knows(self, slurm_id: str, key: str) -> bool:
        asked = [slurm_id, key]
        return self.tape.call("cluster.knows", asked, lambda: _there(self.real).knows(*asked))

    def cancel(self, jobs: Mapping[str, str]) -> None:
        asked = dict(jobs)
        self.tape.call("cluster.cancel", asked, lambda: _there(self.real).cancel(asked))

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return self.tape.call(
            "cluster.foreign_jobs", None, lambda: _there(self.real).foreign_jobs(run)
        )

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        names = list(nodes)
        self.tape.call("cluster.drain", names, lambda: _there(self.real).drain(names, reason))

    def fail(self, node: str, reason: str) -> None:
        self.tape.call("cluster.fail", node, lambda: _there(self.real).fail(node, reason))

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        names = list(nodes)
        self.tape.call("cluster.renew", names, lambda: _there(self.real).renew(names, lease))

    def delete(self, node: str) -> bool:
        return self.tape.call("cluster.delete", node, lambda: _there(self.real).delete(node))

    def hurry(self) -> None:
        """Asks nothing and comes at any moment, so it is not recorded."""
        if self.real is not None:
            self.real.hurry()


@dataclass
class TapedBooks:
    """The journal: nothing of it is read, but while it cannot be written nothing is started."""

    tape: Tape
    real: Books | None

    def write(
        self,
        run: str,
        vms: Iterable[VM] = (),
        tasks: Iterable[Task] = (),
        events: Iterable[tuple[float, str, str]] = (),
    ) -> None:
        self.tape.call("books", None, lambda: _there(self.real).write(run, vms, tasks, events))


def _there(real: T | None) -> T:
    assert real is not None, "a recording is played without the real thing"
    return real


@dataclass(frozen=True)
class Senses:
    """What the broker perceives besides its ports."""

    clock: Callable[[], float]
    witness: Callable[[str], Exit | None]
    revoke: Callable[[str], bool]
    begun: Callable[[str], bool]

    def on(self, tape: Tape) -> Senses:
        return Senses(
            clock=lambda: tape.call("clock", None, self.clock),
            witness=lambda path: tape.call("witness", Path(path).name, lambda: self.witness(path)),
            revoke=lambda path: tape.call("revoke", Path(path).name, lambda: self.revoke(path)),
            begun=lambda path: tape.call("begun", Path(path).name, lambda: self.begun(path)),
        )


class RecordedBroker(Broker):
    """A broker all of whose calls are recorded. They exclude each other, so that their order is known;
    `stop`, which signal handlers call, takes effect with the next of them."""

    def __init__(
        self,
        recorder: Recorder,
        config: BrokerConfig,
        cloud: Cloud,
        cluster: Cluster,
        journal: Books,
        log: logging.Logger,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        witness: Callable[[str], Exit | None] = exit_of,
        revoke: Callable[[str], bool] = revoke,
        begun: Callable[[str], bool] = has_begun,
        script: Callable[[str, str, str], str] = job_script,
        boots: LearnedBoots | None = None,
        walltimes: Walltimes | None = None,
    ) -> None:
        self._recorder = recorder
        self._real_cluster = cluster
        self._asked_to_stop = False
        boots, walltimes = boots or LearnedBoots(), walltimes or Walltimes()
        recorder.note("run", VERSION, config)
        recorder.note("known", {"boots": boots.state, "walltimes": walltimes.state})
        senses = Senses(clock or SteadyClock(), witness, revoke, begun).on(recorder)
        super().__init__(
            config,
            TapedCloud(recorder, cloud),
            TapedCluster(recorder, cluster),
            TapedBooks(recorder, journal),
            log,
            clock=senses.clock,
            sleep=sleep,
            witness=senses.witness,
            revoke=senses.revoke,
            begun=senses.begun,
            script=script,
            boots=boots,
            walltimes=walltimes,
        )

    def plan(self, jobs: Iterable[PlannedJob]) -> None:
        """Notes the workflow, which no decision rests on, for later predictions."""
        self._recorder.note("plan", list(jobs))

    def expect(self, tasks: Iterable[Announcement]) -> None:
        with self._lock:
            expected = list(tasks)
            self._recorder.note("expect", expected)
            super().expect(expected)

    def submit(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._recorder.note("submit", [replace(task, command="") for task in tasks])
            super().submit(tasks)

    def stop(self) -> None:
        self._asked_to_stop = True

    def take_kept(self) -> list[VM]:
        """None: what an earlier run has left is no part of a recording."""
        return []

    def hand_over(self) -> None:
        """Nor is what a later one gets."""

    def hurry(self) -> None:
        self.stop()
        self._real_cluster.hurry()

    @property
    def has_news(self) -> bool:
        """Nothing is looked at between the rounds, for it would have to be recorded."""
        return False

    def tick(self) -> list[Task]:
        with self._lock:
            self._stop_if_asked()
            self._recorder.note("tick")
            try:
                ended = super().tick()
            except Exception as error:
                self._recorder.note("ended", [_failed(error)])
                raise
            self._recorder.note("ended", _results(ended))
            return ended

    def release(self) -> None:
        with self._lock:
            self._stop_if_asked()
            self._recorder.note("release")
            super().release()
            self._recorder.note("released")

    def _stop_if_asked(self) -> None:
        if self._asked_to_stop:
            self._asked_to_stop = False
            self._recorder.note("stop")
            super().stop()


def _results(ended: Iterable[Task]) -> list[str]:
    return [f"{task.key} {task.state} {task.reason}".strip() for task in ended]


def _failed(error: Exception) -> str:
    return f"failed: {error!r}"


# -- playing


@dataclass(frozen=True)
class Replayed:
    """How many decisions were recorded, how many the played broker took alike, and what differs; none
    where there is no difference."""

    decisions: int
    alike: int
    differences: list[str]

    @property
    def is_identical(self) -> bool:
        return not self.differences and self.alike == self.decisions


def read(path: Path) -> list[Line]:
    """The lines of a recording; SchlouderError says what is wrong with it. A last line that was cut off
    counts as not written."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SchlouderError(f"{path}: cannot be read: {error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(Line(*json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            if number < len(texts):
                raise SchlouderError(f"{path}, line {number}: not of a recording") from None
    if not lines or lines[0].name != "run":
        raise SchlouderError(f"{path}: expected a recording, which begins with its run")
    if lines[0].asked != VERSION:
        raise SchlouderError(f"{path}: of another version; this schlouder reads {VERSION}")
    return lines


def config_of(lines: Sequence[Line]) -> BrokerConfig:
    return cast(BrokerConfig, decoded(lines[0].answer))


def replay_recording(path: Path) -> Replayed:
    """Plays a recording and compares decisions; ends at the first one after which nothing fits."""
    lines = read(path)
    player = Player([line for line in lines if line.name not in _ASIDE])
    decisions = sum(_weight(line) for line in lines)
    try:
        _play(player, _player_broker(player, lines))
    except Diverged:
        pass
    except Exception as error:
        player.differences.append(f"the broker failed: {error!r}")
    return Replayed(decisions, player.alike, player.differences)


def _play(player: Player, broker: Broker) -> None:
    calls: dict[str, Callable[[Any], object]] = {
        "expect": broker.expect,
        "submit": broker.submit,
        "stop": lambda _: broker.stop(),
        "release": lambda _: broker.release(),
        "tick": lambda _: player.take("ended", _tick(broker)),
    }
    while (line := player.peek()) is not None:
        if line.name not in calls:
            player.take("nothing more in this call", None)
        player.take(line.name, line.asked)
        calls[line.name](decoded(line.asked))
        if line.name == "release":
            player.take("released", None)


def _tick(broker: Broker) -> list[str]:
    """The results of a round, or the error that broke it off; the executor goes on after either."""
    try:
        return _results(broker.tick())
    except Diverged:
        raise
    except Exception as error:
        return [_failed(error)]


def known_of(lines: Iterable[Line]) -> tuple[LearnedBoots, Walltimes]:
    """What the predictors had learned before the run."""
    found: dict[str, Any] = next((decoded(one.asked) for one in lines if one.name == "known"), {})
    return (
        LearnedBoots.of(found.get("boots", ())),
        Walltimes.of(found.get("walltimes", {})),
    )


def _player_broker(player: Player, lines: Sequence[Line]) -> Broker:
    boots, walltimes = known_of(lines)
    senses = Senses(time.time, exit_of, revoke, has_begun).on(player)
    return Broker(
        config_of(lines),
        TapedCloud(player, None),
        TapedCluster(player, None),
        TapedBooks(player, None),
        _SILENT,
        clock=senses.clock,
        sleep=lambda seconds: None,
        witness=senses.witness,
        revoke=senses.revoke,
        begun=senses.begun,
        boots=boots,
        walltimes=walltimes,
    )
