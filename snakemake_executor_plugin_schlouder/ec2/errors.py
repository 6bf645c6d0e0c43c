"""What EC2's errors mean, told by their codes and never by their texts (R14), and what to say of them.

Codes: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from ..model import SPOT


class Meaning(Enum):
    ALLOWED = auto()
    """The call was not to be carried out, and would have been."""
    CAPACITY = auto()
    """No machine of this type, market and zone just now; others may be had."""
    THROTTLED = auto()
    """Too many calls; says nothing about capacity."""
    AWAY = auto()
    """A fault of the cloud that passes."""
    QUOTA = auto()
    """The account may not have more."""
    RIGHTS = auto()
    """These credentials, or this account, may not do it."""
    SPENT = auto()
    """The client token is of no further use."""
    UNKNOWN = auto()
    """The cloud does not know this call, or a parameter of it: it is no EC2, but like it."""
    WRONG = auto()
    """The call names something that does not exist or is not allowed."""


CODES: Mapping[Meaning, frozenset[str]] = {
    Meaning.ALLOWED: frozenset({"DryRunOperation"}),
    Meaning.CAPACITY: frozenset(
        {
            "InsufficientInstanceCapacity",
            "InsufficientHostCapacity",
            "InsufficientReservedInstanceCapacity",
            "InsufficientCapacity",
            "InsufficientFreeAddressesInSubnet",
            "ReservationCapacityExceeded",
            "SpotMaxPriceTooLow",
            "UnfulfillableCapacity",
            "Unsupported",  # above all: the zone does not have the type
        }
    ),
    Meaning.THROTTLED: frozenset(
        {
            "429",
            "RequestLimitExceeded",
            "Throttling",
            "ThrottlingException",
            "ThrottledException",
            "RequestThrottled",
            "RequestThrottledException",
            "TooManyRequestsException",
            "EC2ThrottledException",
            "BandwidthLimitExceeded",
            "SlowDown",
        }
    ),
    Meaning.AWAY: frozenset(
        {
            "500",
            "502",
            "503",
            "504",
            "InternalError",
            "InternalFailure",
            "InternalServerError",
            "ServerInternal",
            "ServiceUnavailable",
            "Unavailable",
            "RequestTimeout",
            "ConcurrentTagAccess",
        }
    ),
    # MaxSpotInstanceCountExceeded: "request a quota increase if you receive the error",
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/using-spot-limits.html
    Meaning.QUOTA: frozenset(
        {
            "VcpuLimitExceeded",
            "InstanceLimitExceeded",
            "MaxSpotInstanceCountExceeded",
            "VolumeLimitExceeded",
            "MaxIOPSLimitExceeded",
            "NetworkInterfaceLimitExceeded",
            "AddressLimitExceeded",
            "ResourceLimitExceeded",
        }
    ),
    Meaning.RIGHTS: frozenset(
        {
            "UnauthorizedOperation",
            "AccessDenied",
            "AccessDeniedException",
            "AuthFailure",
            "OptInRequired",
            "PendingVerification",
            "Blocked",
            "InvalidClientTokenId",
            "MissingAuthenticationToken",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "RequestExpired",
        }
    ),
    Meaning.SPENT: frozenset({"IdempotentInstanceTerminated", "IdempotentParameterMismatch"}),
    # InvalidRequest and TypeError: OpenStack's ec2-api, of calls and of parameters.
    Meaning.UNKNOWN: frozenset(
        {
            "InvalidAction",
            "InvalidRequest",
            "UnknownParameter",
            "UnsupportedOperation",
            "NotImplemented",
            "TypeError",
        }
    ),
}
_MEANINGS = {code: meaning for meaning, codes in CODES.items() for code in codes}

_ACCESS = frozenset({"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"})
"""The codes that a policy is the cure of."""

_FAMILIES = {
    "dl": "DL",
    "f": "F",
    "g": "G and VT",
    "gr": "G and VT",
    "vt": "G and VT",
    "hpc": "HPC",
    "inf": "Inf",
    "p": "P",
    "trn": "Trn",
    "u": "High Memory",
    "x": "X",
}
"""Quotas of instance families by the letters a type's name begins with; all others are Standard."""

_OTHER_QUOTAS = {
    "VolumeLimitExceeded": "Storage for ... volumes, in TiB (Amazon EBS)",
    "MaxIOPSLimitExceeded": "IOPS for ... volumes (Amazon EBS)",
    "NetworkInterfaceLimitExceeded": "Network interfaces per Region (Amazon VPC)",
    "AddressLimitExceeded": "EC2-VPC Elastic IPs",
}


@dataclass(frozen=True)
class Ec2Error:
    """An error that EC2 answered `operation` with."""

    operation: str
    code: str
    message: str

    @classmethod
    def of(cls, error: Any) -> Ec2Error:
        """`error`: botocore's ClientError."""
        told = error.response.get("Error", {})
        return cls(error.operation_name, str(told.get("Code", "")), str(told.get("Message", "")))

    @property
    def meaning(self) -> Meaning:
        family = self.code.partition(".")[0]
        return _MEANINGS.get(self.code) or _MEANINGS.get(family, Meaning.WRONG)

    @property
    def right(self) -> str:
        """The missing right, such as iam:PassRole, as EC2 tells it, else that of the operation itself; empty
        if it is not a policy that is wrong."""
        if self.code not in _ACCESS:
            return ""
        told = _DENIED.search(self.message)
        return told[1] if told else f"ec2:{self.operation}"

    @property
    def resource(self) -> str:
        """What the missing right would have to be given on, as far as EC2 tells it."""
        told = _DENIED.search(self.message)
        return (told[2] or "") if told else ""

    def __str__(self) -> str:
        """Without what EC2 adds for administrators, an encoded text of a thousand characters."""
        text = self.message.partition("Encoded authorization failure message")[0].strip()
        return f"{self.code}: {text}"


_DENIED = re.compile(r"is not authorized to perform: ([\w-]+:\w+)(?: on resource: (\S+))?")

HOW_TO_GET_RIGHTS = "`schlouder init` prints the policy to give to these credentials"


def rights_text(error: Ec2Error) -> str:
    if not error.right:
        return f"EC2 refuses these credentials or this account ({error})"
    where = f" on {error.resource}" if error.resource else ""
    return f"the right {error.right}{where} is missing; {HOW_TO_GET_RIGHTS} ({error})"


def quota_text(error: Ec2Error, type_name: str, market: str) -> str:
    return (
        f"the quota {quota_name(error.code, type_name, market)!r} of this account and region is used up "
        f"({error}); ask for more in the Service Quotas console, or allow types of another family"
    )


def quota_name(code: str, type_name: str, market: str) -> str:
    """As the Service Quotas console calls it."""
    if code in _OTHER_QUOTAS:
        return _OTHER_QUOTAS[code]
    letters = re.match(r"[a-z]*", type_name)
    family = _FAMILIES.get(letters[0] if letters else "", "Standard (A, C, D, H, I, M, R, T, Z)")
    if market != SPOT:
        return f"Running On-Demand {family} instances"
    if family == "P":
        family = "P5" if type_name.startswith("p5") else "P4, P3 and P2"
    return f"All {family} Spot Instance Requests"
