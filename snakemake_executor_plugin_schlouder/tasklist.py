"""Task lists: the `.tasks` format of the SimSchlouder archive, read and checked.

    [boots]
    boot_time [provisioning_date [lag_time [monitoring_time]]]      one line per VM, seconds
    [tasks]
    name submission walltime_prediction [~ real_walltime] [more numbers] [-> dep1 dep2 ...]

    more numbers: [real_runtime] [in_bytes out_bytes [management_time]]

Blank lines mean nothing. Without `~` the prediction was exact. The run time (without transfers and
management) is contained in the real walltime; bytes and management time are not used.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from .model import Need, SchlouderError
from .order import Place, places

ONE_CPU = Need(1, 1)


def last_word(name: str) -> str:
    """`a_1.mgf`: mgf; `2mass_h_1x1_project_0_9`: project; empty where there is none."""
    words = re.findall("[A-Za-z]+", name)
    return words[-1] if words else ""


@dataclass(frozen=True)
class RecordedBoot:
    """A VM's boot: it took `seconds` from `provisioned` (a date, seconds) on, and its first task began
    `lag` s later."""

    seconds: float
    provisioned: float = 0.0
    lag: float = 0.0


@dataclass(frozen=True)
class RecordedTask:
    """`submission` is a date, `predicted` the user's estimate, `real` what it took, `computing` the part
    of it without transfers, where that was recorded; all in seconds. `group`: what makes tasks alike,
    where their names do not tell."""

    name: str
    submission: float
    predicted: float
    real: float
    after: tuple[str, ...] = ()
    computing: float | None = None
    need: Need = ONE_CPU
    group: str = ""

    @functools.cached_property
    def rule(self) -> str:
        """What makes tasks alike: the last word of the name, without numbers."""
        return self.group or last_word(self.name) or "task"


@dataclass(frozen=True)
class TaskList:
    tasks: tuple[RecordedTask, ...]
    boots: tuple[RecordedBoot, ...] = field(default=())

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Where the tasks that wait or are waited for stand, by the users' estimates."""
        after = {task.name: task.after for task in self.tasks if task.after}
        predicted = {task.name: task.predicted for task in self.tasks} if after else {}
        return places(after, predicted.__getitem__)


def read(path: Path) -> TaskList:
    """The task list in `path`; SchlouderError names file, line and what was expected."""
    try:
        text = path.read_text()
    except OSError as error:
        raise SchlouderError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SchlouderError(f"{path}: expected text in UTF-8: {error}") from error
    boots, tasks, section = [], [], ""
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        words = line.split()
        if not words:
            continue
        if words[0] in ("[boots]", "[tasks]"):
            section = words[0]
        elif section == "[boots]":
            boots.append(_boot(words, where))
        elif section == "[tasks]":
            tasks.append(_task(words, where))
        else:
            raise SchlouderError(f"{where}: expected [boots] or [tasks] first, found {line!r}")
    if not tasks:
        raise SchlouderError(f"{path}: expected at least one line below [tasks]")
    _check_order(tasks, path)
    return TaskList(tuple(tasks), tuple(boots))


def _boot(words: list[str], where: str) -> RecordedBoot:
    if len(words) > 4:
        raise SchlouderError(f"{where}: expected 1 to 4 numbers for a boot, found {len(words)}")
    return RecordedBoot(*(_seconds(word, where) for word in words[:3]))


def _task(words: list[str], where: str) -> RecordedTask:
    after: tuple[str, ...] = ()
    if "->" in words:
        arrow = words.index("->")
        words, after = words[:arrow], tuple(words[arrow + 1 :])
        if not after:
            raise SchlouderError(f"{where}: expected the names of tasks behind ->")
    if len(words) < 3:
        raise SchlouderError(
            f"{where}: expected: name submission walltime_prediction [~ real_walltime] ..."
        )
    submission, predicted = _seconds(words[1], where), _seconds(words[2], where)
    real, more = predicted, words[3:]
    if more[:1] == ["~"]:
        if len(more) < 2:
            raise SchlouderError(f"{where}: expected the real walltime behind ~")
        real, more = _seconds(more[1], where), more[2:]
    computing = _seconds(more[0], where) if more else None
    return RecordedTask(words[0], submission, predicted, real, after, computing)


def _seconds(word: str, where: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise SchlouderError(f"{where}: expected seconds, found {word!r}") from None
    if not 0 <= value < float("inf"):
        raise SchlouderError(f"{where}: expected seconds of at least 0, found {word}")
    return value


def _check_order(tasks: list[RecordedTask], path: Path) -> None:
    names = {task.name for task in tasks}
    if len(names) < len(tasks):
        twice = next(task.name for task in tasks if sum(t.name == task.name for t in tasks) > 1)
        raise SchlouderError(f"{path}: expected every task once, found {twice} twice")
    for task in tasks:
        for name in task.after:
            if name not in names:
                raise SchlouderError(f"{path}: {task.name} waits for {name}, which is no task")
    try:
        TopologicalSorter({task.name: task.after for task in tasks}).prepare()
    except CycleError as error:
        raise SchlouderError(
            f"{path}: tasks wait for each other: {' -> '.join(error.args[1])}"
        ) from None
