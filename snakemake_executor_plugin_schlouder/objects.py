"""What jobs leave in the workflow's default storage, an S3 bucket, when they share no file system with us.

All of a run are below `PREFIX/.schlouder/RUN/`: for every attempt `NUMBER-RULE.ATTEMPT.exit` with an ending,
`.begun`, `.revoked`, `.log`, or the exit code: so that one list tells all codes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from snakemake_interface_executor_plugins.settings import SharedFSUsage

from .model import SchlouderError
from .slurm.script import BEGUN, REVOKED, Exit, WitnessSilent, storage_job_script

FOLDER = ".schlouder"
LOG = ".log"

_T = TypeVar("_T")
_SHARED = (SharedFSUsage.INPUT_OUTPUT, SharedFSUsage.PERSISTENCE, SharedFSUsage.SOURCES)
"""What the directory of the workflow is used for; jobs' logs and exit-code files are there, too."""

_PREFIX = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)(?:/([A-Za-z0-9._/=+-]*))?")
_FRESH = 1.0
_REST = 10.0
_AT_ONCE = 1000
"""Objects that S3 deletes with one request."""

_CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "SNAKEMAKE_STORAGE_S3_ACCESS_KEY"),
)


def shares_files(usage: Collection[SharedFSUsage]) -> bool:
    """Whether the VMs see the directory of the workflow; SchlouderError for what is neither one nor the
    other."""
    if all(use in usage for use in _SHARED):
        return True
    if not usage:
        return False
    given = " ".join(sorted(use.item_to_choice() for use in usage))
    needed = ", ".join(use.item_to_choice() for use in _SHARED)
    raise SchlouderError(
        f"--shared-fs-usage: {given!r} is not supported; either the VMs share the directory of the workflow "
        f"({needed}, and more if you like), or nothing: none"
    )


@dataclass(frozen=True)
class Storage:
    """The default storage: bucket, prefix (empty, or with a slash at its end), and what boto3 is told besides
    credentials."""

    bucket: str
    prefix: str
    client: Mapping[str, Any]

    @staticmethod
    def of(provider: str | None, prefix: str | None, settings: Any) -> Storage:
        """`settings` are those of the storage plugin. SchlouderError if that is not the one for S3."""
        if provider != "s3":
            raise SchlouderError(
                f"--default-storage-provider: {provider!r} is not supported with --shared-fs-usage none; "
                "it must be s3, through which jobs leave their exit codes and logs"
            )
        found = _PREFIX.fullmatch(prefix or "")
        if found is None:
            raise SchlouderError(
                f"--default-storage-prefix: {prefix!r} is not allowed; it must be s3://BUCKET/PREFIX, the "
                "prefix of letters, digits and . _ - = + /"
            )
        folder = (found[2] or "").strip("/")
        client = {
            "endpoint": settings.endpoint_url,
            "region": settings.region,
            "signature": settings.signature_version,
        }
        return Storage(found[1], f"{folder}/" if folder else "", client)


def has_credentials(names: Iterable[str]) -> bool:
    """Whether one of these environment variables, which jobs get, can give them access to a bucket."""
    return any(name in _CREDENTIALS for name in names)


class Objects:
    """The objects of one run. Names are those of exit-code files, as with a shared file system.

    Every look is one list of all of them, which holds for a second as to what is there; what is not there is
    looked for anew, so that it was not there when it was asked for.
    """

    def __init__(
        self,
        client: Any,
        storage: Storage,
        run: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._storage = storage
        self._folder = f"{storage.prefix}{FOLDER}/{run}/"
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._exits: dict[str, Exit] = {}
        self._seen = -_FRESH
        self._rested = -math.inf

    def of_run(self, run: str) -> Objects:
        """Those of another run."""
        return Objects(self._client, self._storage, run, self._clock)

    def check(self) -> None:
        """SchlouderError if the bucket cannot be read."""
        try:
            self._look()
        except WitnessSilent as error:
            raise SchlouderError(
                f"--default-storage-prefix: {self.address('')} cannot be read: {error}; bucket and rights "
                "(s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject) are needed"
            ) from error

    def exit_of(self, exit_file: str) -> Exit | None:
        """How the script with this exit-code file ended; None if it has not, or not by itself. WitnessSilent
        if that is not known."""
        name = Path(exit_file).name
        if name not in self._exits or self._clock() - self._seen > _FRESH:
            self._look()
        return self._exits.get(name)

    def has_begun(self, exit_file: str) -> bool:
        """Whether the script with this exit-code file has begun. On doubt it has: what may run must not be
        run again."""
        name = Path(exit_file).name + BEGUN
        try:
            if name not in self._names:
                self._look()
        except WitnessSilent:
            return True
        return name in self._names

    def revoke(self, exit_file: str) -> bool:
        """Forbids the script with this exit-code file to begin. True: it has begun, or may have."""
        try:
            self._ask(
                lambda: self._client.put_object(
                    Bucket=self._storage.bucket,
                    Key=self._key(Path(exit_file).name + REVOKED),
                    Body=b"",
                )
            )
        except WitnessSilent:
            return True
        return self.has_begun(exit_file)

    def script(self, python: str, keep: bool) -> Callable[[str, str, str], str]:
        """What makes the script of a job from its name, command and exit-code file; `python` is that of the
        VMs, `keep`: logs of successes are kept."""

        def made(name: str, command: str, exit_file: str) -> str:
            where = {
                "bucket": self._storage.bucket,
                "key": self._key(Path(exit_file).name),
                "client": dict(self._storage.client),
                "keep": keep,
            }
            return storage_job_script(name, command, exit_file, python, where)

        return made

    def address(self, name: str) -> str:
        return f"s3://{self._storage.bucket}/{self._key(name)}"

    def fetch_log(self, exit_file: str, path: Path) -> None:
        """Writes the job's log to `path`; WitnessSilent if there is none or it cannot be read."""
        key = self._key(Path(exit_file).name + LOG)
        answer = self._ask(
            lambda: self._client.get_object(Bucket=self._storage.bucket, Key=key)["Body"].read()
        )
        path.write_bytes(answer)

    def remove(self, names: Iterable[str]) -> None:
        """Removes what the scripts with these exit-code files have left; marks that revoke one stay, as its
        submission may come late."""
        ended = set(names)
        self._delete(
            name
            for name in self._list()
            if name.rpartition(".")[0] in ended and not name.endswith(REVOKED)
        )

    def clear(self) -> None:
        """Removes all of the run's objects."""
        self._delete(self._list())

    def _look(self) -> None:
        now = self._clock()
        names = frozenset(self._list())
        self._names = names
        self._exits = dict(_exits(names))
        self._seen = now

    def _list(self) -> list[str]:
        """The names of the run's objects."""

        def listed() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._storage.bucket, Prefix=self._folder
            )
            found = (each["Key"] for page in pages for each in page.get("Contents", ()))
            return [key.removeprefix(self._folder) for key in found]

        return self._ask(listed)

    def _delete(self, names: Iterable[str]) -> None:
        keys = [{"Key": self._key(name)} for name in names]
        for begin in range(0, len(keys), _AT_ONCE):
            some = {"Objects": keys[begin : begin + _AT_ONCE], "Quiet": True}
            self._ask(
                lambda some=some: self._client.delete_objects(  # type: ignore[misc]
                    Bucket=self._storage.bucket, Delete=some
                )
            )

    def _key(self, name: str) -> str:
        return self._folder + name

    def _ask(self, act: Callable[[], _T]) -> _T:
        """What `act` gives; WitnessSilent if the storage refuses it, or does not answer: then nobody asks for
        some seconds, or a question for every job would be waited for."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._clock() < self._rested:
            raise WitnessSilent("no answer a moment ago")
        try:
            return act()
        except ClientError as error:
            raise WitnessSilent(str(error)) from error
        except BotoCoreError as error:
            self._rested = self._clock() + _REST
            raise WitnessSilent(str(error)) from error


def connect(storage: Storage, settings: Any) -> Any:
    """A client of S3 with the settings, credentials included, of Snakemake's storage plugin."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=storage.client["endpoint"],
        region_name=storage.client["region"],
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        aws_session_token=settings.token,
        config=Config(
            signature_version=storage.client["signature"],
            connect_timeout=5,
            read_timeout=10,
            retries={"max_attempts": 2, "mode": "standard"},
        ),
    )


def _exits(names: Iterable[str]) -> Iterator[tuple[str, Exit]]:
    for name in names:
        stem, _, code = name.rpartition(".")
        if code.isdecimal():
            yield stem, Exit(int(code))
