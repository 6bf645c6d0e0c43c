"""Questions to EC2 and the Price List API, and why one was not answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

_DENIED = frozenset({"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"})
_NO_SUCH_CALL = frozenset(
    {
        "InvalidAction",
        "InvalidRequest",
        "NotImplemented",
        "UnknownOperationException",
        "UnsupportedOperation",
    }
)

_FILTER_VALUES = 200
"""Most values of one filter of EC2's calls."""


class Failed(Exception):
    """A question that was not answered; its text tells people why. `is_missing`: the cloud lacks the call."""

    def __init__(self, text: str, is_missing: bool = False) -> None:
        super().__init__(text)
        self.is_missing = is_missing


def answered(right: str, ask: Callable[[], list[_T]]) -> list[_T]:
    """The answer to a question that takes the IAM right `right`, or Failed. botocore makes the HTTP status
    the code of an error that is not in the form of AWS's."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    call = right.partition(":")[2]
    try:
        return ask()
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in _DENIED:
            raise Failed(f"these credentials lack the right {right} ({code})") from error
        if code in _NO_SUCH_CALL:
            raise Failed(f"this cloud has no call {call} ({code})", is_missing=True) from error
        if code.isdecimal():
            raise Failed(f"{call} failed (HTTP {code})", is_missing=True) from error
        message = error.response["Error"].get("Message", "")
        raise Failed(f"{call} failed ({code}: {message})") from error
    except BotoCoreError as error:
        raise Failed(
            f"{call} failed ({error}); check the network, the region and AWS_ENDPOINT_URL"
        ) from error
    except (ResponseParserError, KeyError, TypeError, ValueError) as error:
        raise Failed(f"the answer to {call} cannot be read ({error!r})", is_missing=True) from error


def is_aws(endpoint: str) -> bool:
    return "amazonaws.com" in endpoint or ".api.aws" in endpoint


def filters(wanted: Mapping[str, Sequence[str]]) -> Any:
    """EC2's filters, without those that let everything through."""
    return [{"Name": name, "Values": list(values)} for name, values in wanted.items() if values]


def batches(values: Sequence[str]) -> Iterator[list[str]]:
    """At least one, be it empty."""
    for start in range(0, max(1, len(values)), _FILTER_VALUES):
        yield list(values[start : start + _FILTER_VALUES])
