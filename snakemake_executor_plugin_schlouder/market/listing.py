"""What EC2 tells of an instance type, and which of those a word matches the user means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model import InstanceType
from .tables import gpu_model


@dataclass(frozen=True)
class Listed:
    """A type, and whether it suits sustained computing: neither burstable nor bare metal nor of a previous
    generation."""

    kind: InstanceType
    is_common: bool

    @classmethod
    def described(cls, reply: Mapping[str, Any]) -> Listed:
        """From DescribeInstanceTypes. A type has GPUs of one model, or only a share of one, which counts as
        none. Of several architectures i386 is the older one."""
        gpus = reply.get("GpuInfo", {}).get("Gpus", [])
        count = sum(gpu["Count"] for gpu in gpus)
        architectures = reply.get("ProcessorInfo", {}).get("SupportedArchitectures", [])
        kind = InstanceType(
            reply["InstanceType"],
            reply["VCpuInfo"]["DefaultVCpus"],
            reply["MemoryInfo"]["SizeInMiB"],
            count,
            gpu_model(gpus[0]["Name"]) if count else "",
            next((arch for arch in architectures if arch != "i386"), "x86_64"),
        )
        is_special = reply.get("BurstablePerformanceSupported") or reply.get("BareMetal")
        return cls(kind, reply.get("CurrentGeneration", True) and not is_special)

    @classmethod
    def kept(cls, fields: Mapping[str, Any]) -> Listed:
        """From what was kept of it; KeyError or TypeError if that is of another version."""
        expected = {field.name for field in dataclasses.fields(InstanceType)}
        if set(fields["kind"]) != expected:
            raise KeyError("kind")
        return cls(InstanceType(**fields["kind"]), fields["is_common"])


def is_pattern(word: str) -> bool:
    return "*" in word or "?" in word


def filter_values(word: str) -> list[str]:
    """The values of EC2's filter instance-type for a word of the user's; one without a dot is a family, or
    all of a name in clouds that are not AWS."""
    return [word] if is_pattern(word) or "." in word else [word, f"{word}.*"]


def is_wanted(word: str, listed: Listed) -> bool:
    """Whether a word means this type at all: all it matches if it names the family."""
    return listed.is_common or not is_pattern(word.partition(".")[0])


def suits(word: str, listed: Listed, arch: str) -> bool:
    return is_wanted(word, listed) and arch in ("", listed.kind.arch)


def size(kind: InstanceType) -> tuple[int, int, int, str]:
    return kind.cpus, kind.memory, kind.gpus, kind.name
