"""What the resources of a rule ask of its VM and of Slurm.

Names and meanings are those of snakemake-executor-plugin-slurm 2.8, so that workflows written for it run
unchanged; where they differ, docs/further.md says so. As there, 0 and an empty text count as not given.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .model import Need, SchlouderError, SlurmOptions
from .printable import one_line, shown

IGNORED = {
    "slurm_partition": "VMs join the partition of --schlouder-partition",
    **dict.fromkeys(
        ("cluster", "clusters", "slurm_cluster"), "VMs join the cluster that slurm.conf names"
    ),
}
"""Resources that name what is decided elsewhere, and where."""

_RATIOS = (
    *("tasks", "tasks_per_node", "tasks_per_gpu", "nodes"),
    *("mem_mb_per_cpu", "cpus_per_gpu"),
)
"""Factors of other resources, which Snakemake sums over the members of a group as if they were amounts."""

_NAME = r"[A-Za-z0-9_.-]+"
_SLURM_NAME = r"[\w.@+][\w.@+-]*"
INSTANCE_TYPES = r"[A-Za-z0-9*?][A-Za-z0-9*?._:/+-]*"
"""A name of instance types, or a pattern of such names."""

_GRES = re.compile(r"(?P<name>\w+)(:(?P<model>[\w.]+))?:(?P<count>\d{1,6})")

_DIGITS = 12
"""Of the longest number that means anything."""

_MINUTES = 8
"""Digits of a runtime: Slurm counts minutes in 32 bits."""

_LONGEST = 4096
"""Characters of a text that means anything."""

_NUMBER, _TEXT, _NAMES = "number", "text", "names"

RESOURCES: dict[str, str] = {
    **dict.fromkeys(
        (
            *("tasks", "tasks_per_node", "tasks_per_gpu", "nodes", "mem_mb", "mem_mb_per_cpu"),
            *("cpus_per_task", "cpus_per_gpu", "gpu", "gpus", "runtime", "disk_mb"),
        ),
        _NUMBER,
    ),
    **dict.fromkeys(("slurm_account", "qos", "slurm_qos", "reservation"), _NAMES),
    **dict.fromkeys(
        (
            *("slurm_extra", "mpi", "gpu_model", "gres", "constraint", "schlouder_instance_type"),
            *("schlouder_strategy", "schlouder_walltime", "schlouder_bundle", "schlouder_spot"),
        ),
        _TEXT,
    ),
    **dict.fromkeys(IGNORED, _TEXT),
}
"""Every resource that is read, and what it is: a number, text, or names with commas between them."""

_OURS = "schlouder_"
"""What the names of the resources begin with that mean nothing to others."""

_OWN_OPTIONS = {
    **dict.fromkeys(
        (
            *("job-name", "comment", "partition", "nodelist", "nodefile", "exclude", "clusters"),
            *("cluster", "no-requeue", "export", "export-file", "get-user-env", "chdir"),
            *("output", "error", "input", "open-mode", "parsable", "wrap", "array", "dependency"),
            *("hold", "begin", "wait", "test-only", "immediate", "uid", "gid", "het-group"),
            *("help", "usage", "version"),
        ),
        "schlouder's own",
    ),
    **dict.fromkeys(("nodes", "use-min-nodes"), "use the resource nodes"),
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "use the resource tasks"),
    **dict.fromkeys(("cpus-per-task", "mincpus"), "use threads or cpus_per_task"),
    **dict.fromkeys(("mem", "mem-per-cpu"), "use mem_mb or mem_mb_per_cpu"),
    **dict.fromkeys(
        ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "mem-per-gpu"),
        "use the resource gpu",
    ),
    "tres-per-task": "use threads, cpus_per_task or gpu",
    **dict.fromkeys(
        ("exclusive", "oversubscribe", "share", "overcommit"), "use --schlouder-sharing"
    ),
    **dict.fromkeys(
        (
            *("core-spec", "thread-spec", "cores-per-socket", "sockets-per-node"),
            *("extra-node-info", "threads-per-core", "ntasks-per-core", "ntasks-per-socket"),
            *("contiguous", "tmp", "reboot"),
        ),
        "the broker would not know of it",
    ),
    "cpus-per-gpu": "use the resource cpus_per_gpu",
    "ntasks-per-gpu": "use the resource tasks_per_gpu",
    "requeue": "VMs that are lost are replaced, and their jobs run again, by schlouder",
    "time": "use the resource runtime",
    "account": "use the resource slurm_account",
    "qos": "use the resource qos",
    "reservation": "use the resource reservation",
    **dict.fromkeys(("constraint", "prefer", "cluster-constraint"), "use the resource constraint"),
}
"""Long options of sbatch that `slurm_extra` may not hold, and what to do instead."""

_SHORT = {
    "J": "job-name",
    "p": "partition",
    "w": "nodelist",
    "N": "nodes",
    "n": "ntasks",
    "c": "cpus-per-task",
    "t": "time",
    "D": "chdir",
    "o": "output",
    "e": "error",
    "i": "input",
    "a": "array",
    "A": "account",
    "q": "qos",
    "d": "dependency",
    "H": "hold",
    "M": "clusters",
    "x": "exclude",
    "W": "wait",
    "C": "constraint",
    "G": "gpus",
    "F": "nodefile",
    "b": "begin",
    "s": "oversubscribe",
    "S": "core-spec",
    "B": "extra-node-info",
    "I": "immediate",
    "O": "overcommit",
    "h": "help",
    "V": "version",
}
"""The long form of short options of sbatch that `slurm_extra` may not hold."""

_WITH_VALUE = frozenset(
    (
        *("acctg-freq", "bb", "bbf", "container", "cpu-freq", "deadline", "delay-boot"),
        *("distribution", "gpu-bind", "gpu-freq", "gres-flags", "hint", "licenses", "mail-type"),
        *("mail-user", "mcs-label", "mem-bind", "network", "power", "priority", "profile"),
        *("signal", "switches", "time-min", "wckey"),
    )
)
"""Long options of sbatch whose value may be the next word."""


@dataclass(frozen=True)
class Demand:
    """`limit` in seconds, None if there is none; `ignored` are names of IGNORED that were given."""

    need: Need
    options: SlurmOptions
    limit: float | None
    ignored: tuple[str, ...]


def demand(rule: str, threads: int, resources: Mapping[str, Any]) -> Demand:
    """What a job of `rule` asks for; SchlouderError tells all that is wrong with it, each with the rule,
    the resource and what is allowed."""
    asked = _Asked(rule, resources)
    asked.check_names()
    need, tasks = _need(asked, threads)
    runtime = asked.number("runtime", digits=_MINUTES)
    asked.number("disk_mb")
    asked.text("mpi")
    options = SlurmOptions(
        account=asked.first_word("slurm_account"),
        qos=asked.names("qos") or asked.names("slurm_qos"),
        reservation=asked.names("reservation"),
        tasks=tasks,
        extra=_extra(asked),
    )
    ignored = tuple(name for name in IGNORED if asked.text(name))
    if asked.problems:
        raise SchlouderError("\n".join(asked.problems))
    return Demand(need, options, runtime * 60.0 if runtime else None, ignored)


def of_group(
    group: str, merged: Mapping[str, Any], threads: int, members: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The resources of a group: those Snakemake has merged, but factors are those of the member with the
    most, and CPUs are at least the merged `threads`. SchlouderError if a member spans several VMs."""
    found = dict(merged)
    each = list(members)
    for name in _RATIOS:
        values = [known(one.get(name)) for one in each]
        given = [value for value in values if isinstance(value, int | float)]
        if given:
            found[name] = max(given)
    if _Asked(group, found).number("nodes") > 1:
        raise SchlouderError(
            f"group {one_line(group)}: nodes: {shown(found['nodes'])} is not allowed; a job over several "
            "VMs cannot be in a group, which runs on one; take its rule out of the group"
        )
    cpus = known(found.get("cpus_per_task"))
    if isinstance(cpus, int):
        found["cpus_per_task"] = max(cpus, threads)
    return found


def known(value: Any) -> Any:
    """None for what Snakemake marks as to be determined (`<TBD>`): it depends on files still to be made."""
    undetermined = value is None or "TBD" in type(value).__name__ or value == "<TBD>"
    return None if undetermined else value


def words_in(text: str) -> tuple[str, ...]:
    """The words of a list, separated by commas or blanks."""
    return tuple(word for word in re.split(r"[,\s]+", text) if word)


def text_of(value: Any) -> str | None:
    """A resource that is text, stripped; None for what cannot be text: Snakemake's are numbers and text."""
    if not isinstance(value, str | int | float):
        return None
    text = str(value).strip() if not isinstance(value, int) or abs(value) < 10**_DIGITS else None
    return text if text is not None and len(text) <= _LONGEST else None


class _Asked:
    """The resources of one rule, read one by one; `problems` collects what is wrong with them."""

    def __init__(self, rule: str, resources: Mapping[str, Any]) -> None:
        self._rule = rule
        self._resources = resources
        self.problems: list[str] = []

    def refuse(self, name: str, allowed: str) -> None:
        value = shown(self._resources.get(name))
        self.problems.append(f"rule {self._rule}: {name}: {value} is not allowed; {allowed}")

    def number(self, name: str, or_negative: bool = False, digits: int = _DIGITS) -> int:
        """A whole number, rounded up, so that a little is not none; 0 if not given."""
        value = known(self._given(name))
        value = value.strip() if isinstance(value, str) else value
        if value is None or value == "":
            return 0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str) and re.fullmatch(rf"-?[0-9]{{1,{digits}}}", value):
            value, is_number = int(value), True
        if not is_number or not abs(value) < 10**digits or (value < 0 and not or_negative):
            allowed = f"it must be a number above 0 of at most {digits} digits, or 0 for none"
            self.refuse(name, allowed)
            return 0
        return -int(-value // 1)

    def text(self, name: str, blanks: str = "") -> str:
        """A text, empty if not given; without line ends and whatever else is not printable but `blanks`."""
        value = known(self._given(name))
        text = "" if value is None else text_of(value)
        if isinstance(value, bool | float):
            text = None
        if text is None or not all(letter.isprintable() or letter in blanks for letter in text):
            self.refuse(name, f"it must be printable text of at most {_LONGEST} characters")
            return ""
        return text

    def names(self, name: str) -> str:
        """Names of Slurm's, with commas between them."""
        text = self.text(name)
        if not all(re.fullmatch(_SLURM_NAME, word) for word in words_in(text)):
            self.refuse(
                name, "it must be a name: letters, digits and _ . @ + -, not - as the first"
            )
            return ""
        return text

    def first_word(self, name: str) -> str:
        """The first of several names."""
        return next(iter(words_in(self.names(name))), "")

    def check_names(self) -> None:
        """A misspelt name of ours would be ignored."""
        for name in self._resources:
            if name.startswith(_OURS) and name not in RESOURCES:
                ours = ", ".join(known for known in RESOURCES if known.startswith(_OURS))
                self.problems.append(
                    f"rule {self._rule}: {shown(name)} is no resource of schlouder; known are {ours}"
                )

    def _given(self, name: str) -> Any:
        assert name in RESOURCES, f"{name} is not in the table of resources"
        return self._resources.get(name)


def _need(asked: _Asked, threads: int) -> tuple[Need, int]:
    """What it takes of each of its VMs, and how many tasks it has on all of them, which all have the same
    number of CPUs. GPUs are those of all VMs, as for Slurm."""
    nodes = _nodes(asked)
    gpus, model = _gpus(asked)
    tasks = _tasks(asked, gpus, nodes)
    per_task = _cpus_per_task(asked, threads)
    per_gpu = asked.number("cpus_per_gpu", or_negative=True)
    if gpus and per_gpu > 0:
        per_task = -(-per_gpu * gpus // tasks)
    cpus = -(-tasks // nodes) * per_task
    memory = asked.number("mem_mb_per_cpu") * cpus or asked.number("mem_mb")
    types = _types(asked)
    return Need(cpus, memory, -(-gpus // nodes), model, _constraint(asked), nodes, types), tasks


def _types(asked: _Asked) -> str:
    text = asked.text("schlouder_instance_type")
    if not all(re.fullmatch(INSTANCE_TYPES, word) for word in words_in(text)):
        asked.refuse(
            "schlouder_instance_type",
            "it must be names or patterns of instance types such as m5.large",
        )
        return ""
    return text


def _nodes(asked: _Asked) -> int:
    nodes = max(1, asked.number("nodes"))
    if nodes > 1 and not asked.text("mpi"):
        asked.refuse("nodes", "only a job with the resource mpi can run on several VMs")
        return 1
    return nodes


def _cpus_per_task(asked: _Asked, threads: int) -> int:
    """Below 0 means Slurm's own default."""
    given = asked.number("cpus_per_task", or_negative=True)
    return max(1, given or threads)


def _tasks(asked: _Asked, gpus: int, nodes: int) -> int:
    given, per_node = asked.number("tasks"), asked.number("tasks_per_node")
    per_gpu = asked.number("tasks_per_gpu", or_negative=True)
    tasks = given or per_node * nodes or max(1, per_gpu * gpus)
    if per_node and tasks > per_node * nodes:
        asked.refuse(
            "tasks",
            f"{_vms(nodes)} with tasks_per_node={per_node} run {per_node * nodes} at the most",
        )
    elif tasks < nodes:
        asked.refuse("tasks", f"a job over {_vms(nodes)} has at least one task on each")
    return tasks


def _vms(count: int) -> str:
    return f"{count} VM{'s' * (count > 1)}"


def _gpus(asked: _Asked) -> tuple[int, str]:
    """How many, and of which model if that matters."""
    count = asked.number("gpu") or asked.number("gpus")
    model, gres = asked.text("gpu_model"), asked.text("gres")
    if gres:
        found = _GRES.fullmatch(gres)
        if found is None or found["name"] != "gpu":
            asked.refuse("gres", "VMs have gpu:COUNT or gpu:MODEL:COUNT only, such as gpu:t4:1")
        elif count or model:
            asked.refuse("gres", "give either gres or gpu and gpu_model")
        else:
            count, model = int(found["count"]), found["model"] or ""
    elif model and not re.fullmatch(r"[\w.]+", model):
        asked.refuse("gpu_model", "it must be the name of a model such as t4")
    elif model and not count:
        asked.refuse("gpu_model", "the number of GPUs must be given too, by the resource gpu")
    return count, model.lower()


def _constraint(asked: _Asked) -> str:
    constraint = asked.text("constraint")
    if constraint and not re.fullmatch(rf"{_NAME}([&|]{_NAME})*", constraint):
        asked.refuse("constraint", "it must be names of features, with & or | between them")
        return ""
    return constraint


def _extra(asked: _Asked) -> tuple[str, ...]:
    """The options of `slurm_extra`, one word each."""
    try:
        words = shlex.split(asked.text("slurm_extra", blanks="\n\t"))
    except ValueError as error:
        asked.refuse("slurm_extra", f"its quotes are not closed ({error})")
        return ()
    options: list[str] = []
    for word in words:
        if options and options[-1].removeprefix("--") in _WITH_VALUE and not word.startswith("-"):
            options[-1] += f"={word}"
            continue
        options.append(word)
        problem = _wrong_option(word) if word.isprintable() else "an option holds a line end or tab"
        if problem:
            asked.refuse("slurm_extra", problem)
    return tuple(options)


def _wrong_option(word: str) -> str:
    """Why `word` may not go to sbatch, which also takes any beginning of a long option's name."""
    if not re.match(r"--?[A-Za-z]", word):
        return f"{shown(word)} is no option of sbatch; write --option=value"
    if not word.startswith("--"):
        name = _SHORT.get(word[1])
        return _not_yours(word[:2], name) if name else f"write the long form of {word[:2]}"
    given = word[2:].partition("=")[0]
    if given in _WITH_VALUE:
        return ""
    name = next((name for name in _OWN_OPTIONS if name.startswith(given)), None)
    return _not_yours(f"--{given}", name) if name else ""


def _not_yours(option: str, name: str) -> str:
    return f"the option {option} is not yours to give: {_OWN_OPTIONS[name]}"
