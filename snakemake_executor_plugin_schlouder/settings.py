"""The `--schlouder-*` flags, the per-rule resources, and their validation into plain frozen objects.

No `from __future__ import annotations` here: Snakemake builds its parser from the annotations and takes
only plain types and `Optional[...]`, never `X | None` or strings.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Optional, TypeVar, get_args, get_type_hints

from snakemake_interface_executor_plugins.settings import ExecutorSettingsBase

from . import order, strategies
from .ec2.joining import ClusterKey, Mount, parse_mounts
from .keeping import NEARLY_OVER, Keep
from .model import NEVER, ONLY, PREFER, Billing, Need, SchlouderError, SlurmOptions
from .pool import Goal
from .printable import one_line, shown
from .resources import INSTANCE_TYPES, RESOURCES, demand, known, text_of, words_in
from .slurm import APIS

_T = TypeVar("_T")

SPOT_CHOICES = (NEVER, PREFER, ONLY)

_TEMPLATE = r"[A-Za-z0-9()./_-]{3,128}(:(\d+|\$Latest|\$Default))?"

_ID = r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*"
"""Of something of EC2's, or of a cloud like it."""

_PATTERNS = {
    "image": (_ID, "the id of a machine image such as ami-0123456789abcdef0"),
    "key_name": (r"[ -~]{1,255}", "the name of a key pair: at most 255 ASCII characters"),
    "instance_profile": (r"[A-Za-z0-9][A-Za-z0-9+=,.@:/_-]*", "a name or an ARN"),
    "region": (r"[A-Za-z0-9][A-Za-z0-9-]{0,62}", "a region such as us-east-1"),
}
"""What texts that go to EC2 as they are look like, and the same in words."""

_LISTS = {
    "subnets": (_ID, "ids of subnets, with commas between them"),
    "security_groups": (_ID, "ids of security groups, with commas between them"),
    "instance_types": (
        INSTANCE_TYPES,
        "names or patterns of instance types, with commas between them",
    ),
}
"""The same of each of several words."""

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}

_LONGEST = 4096
"""Characters of a setting, and of a path; but lists of tags and instance types may be longer."""

_LONG = {"tags": 32768, "instance_types": 32768}

_LARGEST = 1e9
"""Of a number: in seconds, thirty years."""

_LONGEST_NAME = 200
"""Characters of a rule's name in an error message."""

_LEAST = 0.001
"""Of a number that is divided by."""

_LARGEST_VOLUME = 65536
"""GiB of a gp3 volume."""

_SHORTEST_LEASE, _LONGEST_LEASE = 30.0, 30 * 86400.0
"""Seconds."""

_MOST_TAGS = 46
"""Of 50; the rest are ours."""


def _setting(text: str, **metadata: Any) -> dict[str, Any]:
    return {"help": text, "env_var": True, **metadata}


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """What a user can set, as given; `validated` turns it into a `Config`."""

    strategy: Optional[str] = field(
        default="fastest",
        metadata=_setting(
            "How many VMs to start and which job goes to which: "
            f"{', '.join(strategies.known())}, or your own as module:Class. "
            "A rule may name its own with the resource schlouder_strategy.",
            metavar="NAME",
        ),
    )
    order: Optional[str] = field(
        default=order.SUBMISSION,
        metadata=_setting(
            f"In which order waiting jobs are placed: {', '.join(order.NAMES)} (rank: the one with the "
            "longest way to the workflow's end first). The strategies start-par-* and all-par-* have "
            "their own; cheapest and fastest pick the longest job.",
            metavar="ORDER",
        ),
    )
    deadline: Optional[str] = field(
        default=None,
        metadata=_setting(
            "For the strategy deadline: by when everything is to be done, as a time from now (2h) or a "
            "date (2030-12-31T18:00).",
            metavar="WHEN",
        ),
    )
    budget: Optional[str] = field(
        default=None,
        metadata=_setting(
            "For the strategy budget: billed VM time the whole run may cost, such as 12h.",
            metavar="TIME",
        ),
    )
    sharing: Optional[str] = field(
        default="on",
        metadata=_setting(
            "Whether jobs run side by side on a VM as far as its CPUs and memory allow: on or off.",
            metavar="on|off",
        ),
    )
    bundle: Optional[str] = field(
        default="off",
        metadata=_setting(
            "Whether short jobs are run several per Slurm job, with one start of Snakemake: on or off. "
            "A rule may say otherwise with the resource schlouder_bundle (1 or 0).",
            metavar="on|off",
        ),
    )
    max_vms: Optional[int] = field(
        default=20, metadata=_setting("Most VMs at any time, over all strategies.", metavar="N")
    )
    max_booting: Optional[int] = field(
        default=50, metadata=_setting("Most VMs that boot at any time.", metavar="N")
    )
    max_spend: Optional[float] = field(
        default=None,
        metadata=_setting(
            "Most that the VMs of the run may cost, in USD. No VM is started with which it would cost more; "
            "when it is spent nothing further is started. Needs known prices.",
            metavar="USD",
        ),
    )
    spot: Optional[str] = field(
        default=NEVER,
        metadata=_setting(
            "Whether jobs run on spot machines, which cost less and may be taken back: never, prefer (on "
            "demand where none is to be had, or after too many were taken back), or only. A rule may say "
            "otherwise with the resource schlouder_spot; rules of --preemptible-rules prefer them.",
            metavar="never|prefer|only",
        ),
    )
    btu: Optional[float] = field(
        default=1.0,
        metadata=_setting(
            "Billing time unit in seconds: 1 for AWS, 3600 for hourly clouds.", metavar="S"
        ),
    )
    min_charge: Optional[float] = field(
        default=60.0, metadata=_setting("Seconds a VM costs at the least.", metavar="S")
    )
    margin: Optional[float] = field(
        default=50.0,
        metadata=_setting(
            "Seconds before the end of a paid unit at which an idle VM is given back.", metavar="S"
        ),
    )
    boot_overhead: Optional[float] = field(
        default=0.1,
        metadata=_setting(
            "Share of a VM's life one accepts to pay for booting; with billing units shorter than "
            "jobs, strategies fill a VM up to its boot time divided by this.",
            metavar="SHARE",
        ),
    )
    instance_types: Optional[str] = field(
        default="m5.large",
        metadata=_setting(
            "EC2 instance types that may be used, separated by commas: names (m5.large), families (c7i) and "
            "patterns (c7i.*large); *.large, which names no family, leaves out burstable, bare-metal and "
            "previous-generation types. A job gets the cheapest that fits; where prices are unknown, the "
            "first.",
            metavar="TYPE[,TYPE...]",
        ),
    )
    prices: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Your own prices: a CSV file with the columns instance_type, usd_per_hour and, where they "
            "matter, market (on-demand or spot), zone, region. Default: AWS's Price List API.",
            metavar="FILE",
        ),
    )
    type_table: Optional[str] = field(
        default=None,
        metadata=_setting(
            "For clouds that do not describe their instance types: a CSV file with the columns "
            "instance_type, vcpus, memory_mib and, where they matter, arch, gpus, gpu_model, usd_per_hour.",
            metavar="FILE",
        ),
    )
    image: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Machine image (AMI): one with munge, slurmd and Slurm's commands, or of Debian 12 or Ubuntu "
            "24.04; see the docs.",
            metavar="AMI",
        ),
    )
    launch_template: Optional[str] = field(
        default=None,
        metadata=_setting(
            "EC2 launch template of the VMs, as id or name, with :VERSION behind it or its default "
            "version; the other settings win over what it says.",
            metavar="TEMPLATE",
        ),
    )
    subnets: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Subnets the VMs are started in, separated by commas, of one VPC and best of several "
            "availability zones: when one has no machine, the next is asked.",
            metavar="SUBNET[,SUBNET...]",
        ),
    )
    security_groups: Optional[str] = field(
        default=None,
        metadata=_setting("Security groups of the VMs, separated by commas.", metavar="SG[,SG...]"),
    )
    key_name: Optional[str] = field(
        default=None, metadata=_setting("EC2 key pair for ssh to the VMs.", metavar="NAME")
    )
    instance_profile: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Instance profile (name or ARN) with which a VM reads the cluster's key.",
            metavar="NAME",
        ),
    )
    volume_size: Optional[int] = field(
        default=None,
        metadata=_setting("Size of a VM's root volume; default: the image's.", metavar="GIB"),
    )
    volume_encrypted: bool = field(
        default=False, metadata=_setting("Encrypt the VMs' root volumes.")
    )
    tags: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Tags of VMs and their volumes, besides schlouder's own.",
            metavar="KEY=VALUE[,KEY=VALUE...]",
        ),
    )
    region: Optional[str] = field(
        default=None, metadata=_setting("AWS region; default: boto3's.", metavar="REGION")
    )
    cluster_key: Optional[str] = field(
        default="ssm:/schlouder/munge-key",
        metadata=_setting(
            "Where VMs find the cluster's munge.key (slurm.key with AuthType=auth/slurm), base64: a "
            "parameter (SecureString) of the SSM Parameter Store, or a secret of the Secrets Manager.",
            metavar="ssm:/NAME|secretsmanager:NAME",
        ),
    )
    mount: Optional[str] = field(
        default=None,
        metadata=_setting(
            "NFS file systems (EFS among them) that VMs mount before they take jobs, separated by commas "
            "or blanks.",
            metavar="SERVER:/PATH=/MOUNTPOINT[,OPTION...]",
        ),
    )
    partition: Optional[str] = field(
        default="schlouder",
        metadata=_setting("Slurm partition the VMs belong to.", metavar="NAME"),
    )
    slurm_api: Optional[str] = field(
        default="auto",
        metadata=_setting(
            "How Slurm is spoken to: cli (its commands), pyslurm, or auto: pyslurm where it is installed "
            "and fits the controller, else cli.",
            metavar="auto|cli|pyslurm",
        ),
    )
    boot_timeout: Optional[float] = field(
        default=600.0,
        metadata=_setting(
            "Seconds after which a VM that has not joined Slurm is given up.", metavar="S"
        ),
    )
    lease: Optional[str] = field(
        default="10m",
        metadata=_setting(
            "How long a VM stays when it hears nothing more of this run and no job runs there: a time such "
            "as 10m, from 30s to 30d.",
            metavar="TIME",
        ),
    )
    keep: Optional[str] = field(
        default="off",
        metadata=_setting(
            "How long idle VMs stay for the next run of the same user and host with the same cluster and "
            "kind of VMs: paid (to the end of the paid billing unit), a duration such as 10m from the end "
            "of the run, or off.",
            metavar="paid|DURATION|off",
        ),
    )
    keep_logs: bool = field(
        default=False,
        metadata=_setting("Keep the logs and exit codes of jobs that succeeded."),
    )
    log_days: Optional[int] = field(
        default=10,
        metadata=_setting(
            "Days after which the job logs of earlier runs in this directory are removed.",
            metavar="DAYS",
        ),
    )
    record: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Write all that decisions rest on, and the decisions, to this file, to play the run again.",
            metavar="FILE",
        ),
    )


@dataclass(frozen=True)
class Config:
    """Settings that make sense. Durations in seconds, `volume_size` in GiB; empty strings and 0 mean EC2's
    own default."""

    strategy: str
    order: str
    goal: Goal
    sharing: bool
    bundle: bool
    max_vms: int
    max_booting: int
    max_spend: float
    spot: str
    billing: Billing
    instance_types: tuple[str, ...]
    prices: str
    type_table: str
    image: str
    launch_template: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    key_name: str
    instance_profile: str
    volume_size: int
    volume_encrypted: bool
    tags: tuple[tuple[str, str], ...]
    region: str
    cluster_key: str
    mounts: tuple[Mount, ...]
    partition: str
    slurm_api: str
    boot_timeout: float
    lease: float
    keep: Keep
    keep_logs: bool
    log_days: int
    record: str


@dataclass(frozen=True)
class RuleSettings:
    """What the resources of one job say. `limit` (runtime) and `planned` (schlouder_walltime) in
    seconds, None if not given; `ignored` are names of resources that cannot be honoured."""

    strategy: str
    need: Need
    limit: Optional[float]
    planned: Optional[float]
    options: SlurmOptions = field(default_factory=SlurmOptions)
    ignored: tuple[str, ...] = ()
    bundle: bool = False
    spot: str = NEVER


def validated(settings: ExecutorSettings) -> Config:
    """The settings as a Config; SchlouderError lists everything that is wrong with them at once."""
    settings, problems = _sound(settings)
    problems += [*_wrong_names(settings), *_wrong_numbers(settings)]
    goal = _goal(settings, problems)
    tags = _tags(settings.tags, problems)
    mounts = _mounts(settings.mount, problems)
    lease = _lease(settings.lease, problems)
    keep = _keep(settings.keep or "", problems)
    if problems:
        raise SchlouderError("\n".join(problems))
    return Config(
        strategy=settings.strategy or "",
        goal=goal,
        sharing=settings.sharing == "on",
        bundle=settings.bundle == "on",
        order=settings.order or "",
        max_vms=settings.max_vms or 0,
        max_booting=settings.max_booting or 0,
        max_spend=math.inf if settings.max_spend is None else settings.max_spend,
        spot=settings.spot or "",
        billing=Billing(
            settings.btu or 0,
            settings.min_charge or 0,
            settings.margin or 0,
            settings.boot_overhead or 0,
        ),
        instance_types=_words(settings.instance_types),
        prices=settings.prices or "",
        type_table=settings.type_table or "",
        image=settings.image or "",
        launch_template=settings.launch_template or "",
        subnets=_words(settings.subnets),
        security_groups=_words(settings.security_groups),
        key_name=settings.key_name or "",
        instance_profile=settings.instance_profile or "",
        volume_size=settings.volume_size or 0,
        volume_encrypted=settings.volume_encrypted,
        tags=tags,
        region=settings.region or "",
        cluster_key=settings.cluster_key or "",
        mounts=mounts,
        partition=settings.partition or "",
        slurm_api=settings.slurm_api or "",
        boot_timeout=settings.boot_timeout or 0,
        lease=lease,
        keep=keep,
        keep_logs=settings.keep_logs,
        log_days=settings.log_days or 0,
        record=settings.record or "",
    )


def rule_settings(
    rule: str,
    threads: int,
    resources: Mapping[str, Any],
    config: Config,
    is_preemptible: bool = False,
) -> RuleSettings:
    """What a job of `rule` asks for; SchlouderError tells all that is wrong with it, each with the rule,
    the resource and what is allowed.

    A value that Snakemake cannot tell yet (it depends on files still to be made) counts as not given.
    """
    rule = one_line(rule)[:_LONGEST_NAME]
    problems: list[str] = []

    def checked(check: Callable[[], _T]) -> Optional[_T]:
        try:
            return check()
        except SchlouderError as error:
            problems.append(str(error))
            return None

    strategy = checked(lambda: _strategy(rule, resources, config)) or config.strategy
    walltime = _given(resources, "schlouder_walltime")
    planned = None
    if walltime is not None:
        planned = checked(lambda: seconds(f"rule {rule}: schlouder_walltime", walltime))
    bundle = checked(
        lambda: _switch(rule, "schlouder_bundle", _given(resources, "schlouder_bundle"))
    )
    own_spot = _given(resources, "schlouder_spot")
    spot = checked(lambda: _spot(rule, own_spot)) or config.spot
    if is_preemptible and spot == NEVER and own_spot is None:
        spot = PREFER
    asked = checked(lambda: demand(rule, threads, resources))
    if asked is not None:
        checked(lambda: _check_room(rule, asked.need.nodes, config.max_vms))
    if asked is None or problems:
        raise SchlouderError("\n".join(problems))
    return RuleSettings(
        strategy,
        asked.need,
        asked.limit,
        planned,
        asked.options,
        asked.ignored,
        config.bundle if bundle is None else bundle,
        spot,
    )


def seconds(setting: str, value: Any, otherwise: str = "") -> float:
    """A duration: a number of seconds, or text such as `70s`, `2m`, `1.5h`, `1d`."""
    units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([smhd]?)", text_of(value) or "")
    if found is None or not 0 < float(found[1]) * units[found[2]] <= _LARGEST:
        raise SchlouderError(
            f"{setting}: {shown(value)} is no duration; allowed are positive seconds or text such as 70s, "
            f"2m, 1.5h {otherwise}".rstrip()
        )
    return float(found[1]) * units[found[2]]


def _sound(settings: ExecutorSettings) -> tuple[ExecutorSettings, list[str]]:
    """The settings with the default, or what passes for it, in place of each that is no value of its kind or
    holds what nobody can read; and what was wrong with those. What is left can be judged by its meaning."""
    hints = get_type_hints(ExecutorSettings)
    wrong = {}
    for one in fields(settings):
        kind = next(iter(get_args(hints[one.name])), hints[one.name])
        value = getattr(settings, one.name)
        if allowed := _unsound(one.name, value, kind):
            option = one.name.replace("_", "-")
            wrong[one.name] = (
                f"--schlouder-{option}: {shown(value)} is not allowed; it must be {allowed}"
            )
    defaults: dict[str, Any] = {
        one.name: one.default for one in fields(settings) if one.name in wrong
    }
    if "image" in wrong:
        defaults["image"] = "ami-0"
    return replace(settings, **defaults), list(wrong.values())


def _unsound(name: str, value: Any, kind: Any) -> str:
    """What would be allowed instead of `value`, empty if it is fit to be looked at. None is not given."""
    types, words = _KINDS[kind]
    if value is None and kind is not bool:
        return ""
    if not isinstance(value, types) or (kind is not bool and isinstance(value, bool)):
        return words
    if not isinstance(value, str):
        return ""
    longest = _LONG.get(name, _LONGEST)
    if len(value) > longest or not value.replace("\t", " ").isprintable():
        return f"printable text of at most {longest} characters"
    pattern, text = _PATTERNS.get(name, ("", ""))
    if pattern and value and not re.fullmatch(pattern, value):
        return text
    pattern, text = _LISTS.get(name, ("", ""))
    return "" if all(re.fullmatch(pattern, word) for word in words_in(value) if pattern) else text


def _goal(settings: ExecutorSettings, problems: list[str]) -> Goal:
    """What the strategies deadline and budget are to keep; adds to `problems` what is wrong with it."""
    goal = Goal()
    try:
        goal = Goal(_deadline(settings.deadline), _budget(settings.budget))
        _check_goal(settings.strategy or "", goal)
    except SchlouderError as error:
        problems.append(f"--schlouder-{error}")
    return goal


def _keep(text: str, problems: list[str]) -> Keep:
    """Adds to `problems` what is wrong with it."""
    if text in ("off", "paid"):
        return Keep(is_paid=text == "paid")
    try:
        kept = Keep(seconds=seconds("--schlouder-keep", text, "or paid or off"))
    except SchlouderError as error:
        problems.append(str(error))
        return Keep()
    if not NEARLY_OVER < kept.seconds <= _LONGEST_LEASE:
        problems.append(
            f"--schlouder-keep: {shown(text)} is not allowed; it must be more than {NEARLY_OVER:.0f}s, or no "
            "run could take the VM in time, and at most 30d, or paid or off"
        )
    return kept


def _mounts(text: Optional[str], problems: list[str]) -> tuple[Mount, ...]:
    """Adds to `problems` what is wrong with them."""
    try:
        return parse_mounts(text or "")
    except SchlouderError as error:
        problems.append(f"--schlouder-{error}")
        return ()


def _lease(text: Optional[str], problems: list[str]) -> float:
    """In seconds; adds to `problems` what is wrong with it."""
    try:
        lease = seconds("--schlouder-lease", text)
    except SchlouderError as error:
        problems.append(str(error))
        return 0.0
    if not _SHORTEST_LEASE <= lease <= _LONGEST_LEASE:
        problems.append(
            f"--schlouder-lease: {shown(text)} is not allowed; it must be from 30s, of which VMs and network "
            "need some, to 30d"
        )
    return lease


def _check_goal(strategy: str, goal: Goal, prefix: str = "") -> None:
    """SchlouderError, which begins with `prefix`, if there is no such strategy, or it lacks the setting
    of its name."""
    try:
        strategies.make(strategy)
    except SchlouderError as error:
        raise SchlouderError(f"{prefix}{error}") from error
    if not goal.allows(strategy):
        raise SchlouderError(f"{prefix}strategy: {shown(strategy)} needs --schlouder-{strategy}")


def _check_room(rule: str, nodes: int, max_vms: int) -> None:
    if nodes > max_vms:
        raise SchlouderError(
            f"rule {rule}: nodes: {nodes} is not allowed; --schlouder-max-vms allows {max_vms} VMs at a time"
        )


def _deadline(text: Optional[str]) -> float:
    """Seconds since the epoch; infinite if not given."""
    if text is None:
        return float("inf")
    try:
        date = datetime.fromisoformat(text).timestamp()
    except ValueError:
        date = time.time() + seconds("deadline", text, "or a date such as 2030-12-31T18:00")
    if date <= time.time():
        raise SchlouderError(
            f"deadline: {shown(text)} has already passed; it must be in the future"
        )
    return date


def _budget(text: Optional[str]) -> float:
    """Billed seconds; infinite if not given."""
    return float("inf") if text is None else seconds("budget", text)


def _wrong_names(settings: ExecutorSettings) -> list[str]:
    problems = [
        f"--schlouder-{name}: {shown(value)} is not allowed; it is on or off"
        for name, value in (("sharing", settings.sharing), ("bundle", settings.bundle))
        if value not in ("on", "off")
    ]
    if settings.spot not in SPOT_CHOICES:
        problems.append(
            f"--schlouder-spot: {shown(settings.spot)} is not allowed; it is {', '.join(SPOT_CHOICES)}"
        )
    try:
        order.checked(settings.order or "")
    except SchlouderError as error:
        problems.append(f"--schlouder-{error}")
    if not settings.image and not settings.launch_template:
        problems.append(
            "--schlouder-image: not given; the id of a machine image (ami-...) is needed, or a "
            "--schlouder-launch-template with one"
        )
    template = settings.launch_template
    if template and not re.fullmatch(_TEMPLATE, template):
        problems.append(
            f"--schlouder-launch-template: {shown(template)} is not allowed; it is an id (lt-...) or a "
            "name, and behind it nothing, or : and a version's number, $Latest or $Default"
        )
    if not _words(settings.instance_types):
        problems.append(
            "--schlouder-instance-types: not given; at least one type such as m5.large is needed"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", settings.partition or ""):
        problems.append(
            f"--schlouder-partition: {shown(settings.partition)} is no name of a Slurm partition"
        )
    if settings.slurm_api not in APIS:
        problems.append(
            f"--schlouder-slurm-api: {shown(settings.slurm_api)} is not allowed; it is {', '.join(APIS)}"
        )
    try:
        ClusterKey.parse(settings.cluster_key or "")
    except SchlouderError as error:
        problems.append(f"--schlouder-{error}")
    for name, path in (("prices", settings.prices), ("type-table", settings.type_table)):
        if path and not Path(path).is_file():
            problems.append(f"--schlouder-{name}: there is no file {shown(path)}")
    if settings.record and not Path(settings.record).absolute().parent.is_dir():
        problems.append(
            f"--schlouder-record: {shown(settings.record)} is in no directory that exists"
        )
    elif settings.record and Path(settings.record).exists() and not Path(settings.record).is_file():
        problems.append(f"--schlouder-record: {shown(settings.record)} is there and is no file")
    return problems


def _wrong_numbers(settings: ExecutorSettings) -> list[str]:
    bounds = (
        ("max-vms", settings.max_vms, 1, "a whole number of at least 1"),
        ("max-booting", settings.max_booting, 1, "a whole number of at least 1"),
        ("log-days", settings.log_days, 1, "a whole number of days, at least 1"),
        ("min-charge", settings.min_charge, 0, "seconds, at least 0"),
        ("margin", settings.margin, 0, "seconds, at least 0"),
    )
    problems = [
        f"--schlouder-{name}: {shown(value)} is not allowed; it must be {allowed}, at most {_LARGEST:.0f}"
        for name, value, least, allowed in bounds
        if value is None or not least <= value <= _LARGEST
    ]
    if settings.max_spend is not None and not 0 < settings.max_spend <= _LARGEST:
        problems.append(
            f"--schlouder-max-spend: {shown(settings.max_spend)} is not allowed; it must be USD above 0, "
            f"at most {_LARGEST:.0f}"
        )
    if settings.boot_overhead is None or not _LEAST <= settings.boot_overhead <= 1:
        problems.append(
            f"--schlouder-boot-overhead: {shown(settings.boot_overhead)} is not allowed; "
            f"it must be a share above 0 ({_LEAST} at least) and at most 1"
        )
    size = settings.volume_size
    if size is not None and not 1 <= size <= _LARGEST_VOLUME:
        problems.append(
            f"--schlouder-volume-size: {shown(size)} is not allowed; it must be whole GiB, from 1 to "
            f"{_LARGEST_VOLUME}"
        )
    for name, value in (("btu", settings.btu), ("boot-timeout", settings.boot_timeout)):
        if value is None or not _LEAST <= value <= _LARGEST:
            problems.append(
                f"--schlouder-{name}: {shown(value)} is not allowed; it must be seconds above 0, from "
                f"{_LEAST} to {_LARGEST:.0f}"
            )
    return problems


def _tags(text: Optional[str], problems: list[str]) -> tuple[tuple[str, str], ...]:
    """The user's tags; adds to `problems` what EC2 would refuse, or would make ours ambiguous."""
    tags: dict[str, str] = {}
    for pair in (text or "").split(","):
        if not pair.strip():
            continue
        key, is_given, value = (part.strip() for part in pair.partition("="))
        wrong = _wrong_tag(key, value) if is_given else "it is no key=value"
        if wrong or key in tags:
            wrong = wrong or "the key is given twice"
            problems.append(f"--schlouder-tags: {shown(pair.strip())} is not allowed; {wrong}")
        tags[key] = value
    if len(tags) > _MOST_TAGS:
        problems.append(
            f"--schlouder-tags: {len(tags)} tags are not allowed; EC2 takes 50 for a resource, of which 4 "
            "are schlouder's own"
        )
    return tuple(tags.items())


def _wrong_tag(key: str, value: str) -> str:
    """Limits: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html#tag-restrictions"""
    if not 1 <= len(key) <= 128 or len(value) > 256:
        return "EC2 takes keys of 1 to 128 characters, and values of 256 at most"
    if key.lower().startswith(("aws:", "schlouder:")):
        return "keys that begin with aws: or schlouder: are taken"
    if not re.fullmatch(r"[\w +=.:/@-]*", key + value):
        return "EC2 takes letters, digits, blanks and + - = . _ : / @"
    return ""


def _words(text: Optional[str]) -> tuple[str, ...]:
    return words_in(text or "")


def _given(resources: Mapping[str, Any], name: str) -> Any:
    """A resource of ours; None if it is not given, or empty."""
    assert name in RESOURCES, f"{name} is not in the table of resources"
    value = known(resources.get(name))
    return None if text_of(value) == "" else value


def _strategy(rule: str, resources: Mapping[str, Any], config: Config) -> str:
    given = _given(resources, "schlouder_strategy")
    name = config.strategy if given is None else text_of(given)
    if name is None:
        raise SchlouderError(
            f"rule {rule}: schlouder_strategy: {shown(given)} is not allowed; it must be a name"
        )
    _check_goal(name, config.goal, f"rule {rule}: schlouder_")
    return name


def _spot(rule: str, value: Any) -> Optional[str]:
    if value is not None and value not in SPOT_CHOICES:
        raise SchlouderError(
            f"rule {rule}: schlouder_spot: {shown(value)} is not allowed; it is {', '.join(SPOT_CHOICES)}"
        )
    return None if value is None else str(value)


def _switch(rule: str, resource: str, value: Any) -> Optional[bool]:
    """Snakemake's resources are numbers or text."""
    words = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}
    if value is None:
        return None
    word = (text_of(value) or "").lower()
    if word not in words:
        raise SchlouderError(
            f"rule {rule}: {resource}: {shown(value)} is not allowed; it is 1 or 0"
        )
    return words[word]
