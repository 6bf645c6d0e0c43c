"""What a VM must know to join Slurm, and the script it runs at first boot."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from .. import lease
from ..model import ON_DEMAND, InstanceType, SchlouderError
from ..printable import shown
from ..slurm.cli import OLDEST

LIMIT = 16384
"""Bytes that EC2 allows for user data, counted before they are encoded."""

EFS_OPTIONS = "nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport"
"""What AWS recommends for EFS, and its own mount helper uses."""

_SERVICES = ("ssm", "secretsmanager")
_SYSTEM = re.compile("/(bin|boot|dev|etc|lib|lib64|proc|root|run|sbin|sys|usr|var)?")
_MOUNT = re.compile(
    r"(?P<server>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(?P<path>/[A-Za-z0-9_.@/+-]*)"
    r"=(?P<point>/[A-Za-z0-9_.@/+-]*)(?P<options>(?:,[a-z0-9_]+(?:=[A-Za-z0-9_.:/+-]+)?)*)"
)


@dataclass(frozen=True)
class ClusterKey:
    """Where the key is by which the machines of the cluster know each other: in the `service` ssm
    (Parameter Store) or secretsmanager, under `name`."""

    service: str
    name: str

    @classmethod
    def parse(cls, text: str) -> ClusterKey:
        """`ssm:/name`, `secretsmanager:name` (or its ARN), or a bare name, which is SSM's."""
        service, colon, name = text.partition(":")
        if not colon:
            service, name = "ssm", text
        letters = r"[A-Za-z0-9_./-]+" if service == "ssm" else r"[A-Za-z0-9_./+=@:-]+"
        if service not in _SERVICES or not re.fullmatch(rf"(?!-){letters}", name):
            raise SchlouderError(
                f"cluster-key: {shown(text)} is not allowed; it is ssm:/NAME (letters, digits and _ . - /) "
                "or secretsmanager:NAME"
            )
        return cls(service, name)


@dataclass(frozen=True)
class Mount:
    """One NFS file system: `source` is server:/path, `point` the directory of the VM."""

    source: str
    point: str
    options: str


@dataclass(frozen=True)
class Join:
    """What a VM must know to join Slurm, and to leave. `key` is as in `ClusterKey.parse`; `auth` is munge or
    slurm, the controller's AuthType; `slurm` the controller's release. `first_lease`: seconds after its start
    until which its owner must have renewed the lease; `unit`: the billing unit in seconds."""

    controller: str
    munge_socket: str
    key: str
    auth: str = "munge"
    slurm: tuple[int, int] = OLDEST
    mounts: tuple[Mount, ...] = ()
    first_lease: float = 2 * lease.DEFAULT
    unit: float = 1.0


def parse_mounts(text: str) -> tuple[Mount, ...]:
    """`SERVER:/PATH=/MOUNTPOINT[,OPTION...]`, several separated by commas or blanks."""
    pieces = re.split(r"\s+|,(?=[^\s,=]+:/[^\s,=]*=/)", text.strip())
    mounts = tuple(_mount(piece) for piece in pieces if piece)
    points = [mount.point for mount in mounts]
    twice = sorted({point for point in points if points.count(point) > 1})
    if twice:
        raise SchlouderError(
            f"mount: {', '.join(twice)} is given twice; one file system can be there"
        )
    return mounts


def _mount(text: str) -> Mount:
    found = _MOUNT.fullmatch(text)
    if found is None:
        raise SchlouderError(
            f"mount: {shown(text)} is not allowed; it is SERVER:/PATH=/MOUNTPOINT[,OPTION...], such as "
            "nas.example.org:/export=/data,nfsvers=4.2"
        )
    server, point = found["server"], found["point"].rstrip("/") or "/"
    if _SYSTEM.fullmatch(point) or ".." in point.split("/"):
        raise SchlouderError(
            f"mount: {shown(text)} would hide {found['point']} of the VM; "
            "take a directory of its own, such as /data"
        )
    if re.fullmatch(r"fs-[0-9a-f]+", server):
        raise SchlouderError(
            f"mount: {shown(text)} names an EFS file system by its id; "
            f"write {server}.efs.REGION.amazonaws.com"
        )
    efs = EFS_OPTIONS if re.match(r"fs-[0-9a-f]+\.efs\.", server) else ""
    options = ",".join(filter(None, [efs, found["options"].lstrip(",")]))
    return Mount(f"{server}:{found['path']}", point, options or "defaults")


def oldest_slurmd(controller: tuple[int, int]) -> tuple[int, int]:
    """The oldest release whose slurmd can join a controller of this one: Slurm speaks with the two releases
    before its own, from 24.11 on with three, and nodes are dynamic from 22.05 on."""
    release = controller
    for _ in range(3 if controller >= (24, 11) else 2):
        release = _release_before(release)
    return max(release, OLDEST)


def _release_before(release: tuple[int, int]) -> tuple[int, int]:
    """One every nine months until 23.11, then one every May and November."""
    early = {(23, 11): (23, 2), (23, 2): (22, 5), (22, 5): (21, 8)}
    year, month = release
    return early.get(release) or ((year, 5) if month > 5 else (year - 1, 11))


def node_configuration(instance_type: InstanceType) -> str:
    """What slurmd -Z declares; less memory than the type has, or Slurm drains the node (R20)."""
    return (
        f"CPUs={instance_type.cpus} RealMemory={instance_type.node_memory} "
        f"Feature={','.join(instance_type.features)}"
    )


def user_data(
    join: Join,
    region: str,
    endpoint: str,
    nodes: Sequence[str],
    instance_type: InstanceType,
    market: str = ON_DEMAND,
) -> str:
    """The script that VMs of one launch run at first boot: assignments, then `templates/join.sh`, of whose
    comments only the head goes along: EC2 takes little.

    Each VM takes the one of `nodes` at its launch index. `endpoint` is the URL of the service that holds
    the cluster's key. On the `market` spot a VM drains itself when EC2 is about to take it back.
    """
    key = ClusterKey.parse(join.key)
    assignments = {
        "NODES": " ".join(nodes),
        "NODE_CONF": node_configuration(instance_type),
        "MARKET": market,
        "CONTROLLER": join.controller,
        "OLDEST_SLURMD": release_name(oldest_slurmd(join.slurm)),
        "NEWEST_SLURMD": release_name(join.slurm),
        "AUTH": join.auth,
        "MUNGE_SOCKET": join.munge_socket,
        "KEY_SERVICE": key.service,
        "KEY_NAME": key.name,
        "KEY_ENDPOINT": endpoint,
        "REGION": region,
        "MOUNTS": "\n".join(f"{m.source} {m.point} {m.options}" for m in join.mounts),
        "FIRST_LEASE": str(math.ceil(join.first_lease)),
        "UNIT": str(math.ceil(join.unit)),
    }
    lines = [f"SCHLOUDER_{name}={shlex.quote(value)}" for name, value in assignments.items()]
    body = resources.files(__package__.rpartition(".")[0]).joinpath("templates/join.sh").read_text()
    head, begin, rest = body.partition("set -eu\n")
    program = re.sub(r"^ *# (?!shellcheck).*\n", "", rest, flags=re.MULTILINE)
    text = "\n".join(["#!/bin/sh", *lines, head + begin + program])
    if len(text.encode()) > LIMIT:
        raise ValueError(f"user data for {len(nodes)} nodes is longer than EC2's {LIMIT} bytes")
    return text


def release_name(release: tuple[int, int]) -> str:
    """As Slurm writes it: 22.05."""
    return f"{release[0]}.{release[1]:02}"
