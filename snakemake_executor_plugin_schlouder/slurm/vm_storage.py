"""Runs on a VM that shares no file system: says in the bucket that a job begins and how it has ended.

Its text travels in the job's script (`script.storage_job_script`), because this package need not be on a VM;
boto3 is, as the S3 storage plugin needs it too. Credentials come from the environment, as for Snakemake.

Usage: `begin WHERE` or `end WHERE LOG CODE TOLD`, with WHERE as JSON: `bucket`; `key` that the names of the
job's objects begin with; `client`, what boto3 is told; `keep`: whether the log of a success is of use.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

VOID = 75
"""Exit code of a script that was revoked (EX_TEMPFAIL)."""

LOG_BYTES = 8 << 20
"""The end of a log that is handed on."""


def main(action: str, where: str, *more: str) -> int:
    given = json.loads(where)
    try:
        objects = Objects(given)
        return objects.begin() if action == "begin" else objects.end(*more)
    except Exception as error:
        place = f"s3://{given['bucket']}/{given['key']}"
        print(f"schlouder: {place}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


class Objects:
    """Those of one attempt of a job."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.bucket, self.key, self.keep = given["bucket"], given["key"], given["keep"]
        self.client = connect(given["client"])

    def begin(self) -> int:
        """The exit code for the script: VOID if the job was revoked. The own mark is left before the other
        is looked for; what an earlier run of this script has left is removed."""
        self.put(".begun", b"")
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.key}.")
        found = {each["Key"][len(self.key) :] for each in listed.get("Contents", ())}
        revoked = ".revoked" in found
        for name in found:
            if name == ".begun" if revoked else name == ".log" or name[1:].isdigit():
                self.client.delete_object(Bucket=self.bucket, Key=self.key + name)
        return VOID if revoked else 0

    def end(self, log: str, code: str, told: str) -> int:
        """The log first: whoever sees the exit code finds it. `told` is empty for a job that Slurm has
        ended."""
        if self.keep or code != "0":
            self.put(".log", end_of(log))
        if told:
            self.put(f".{told}", b"")
        return 0

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.key + name, Body=content)


def connect(given: dict[str, Any]) -> Any:
    """With the credentials that Snakemake gives its S3 storage plugin, or else those boto3 finds."""
    # As the plugin does, for stores that know no checksums.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    import boto3
    from botocore.config import Config

    key, secret, token = (
        os.environ.get(f"SNAKEMAKE_STORAGE_S3_{name}")
        for name in ("ACCESS_KEY", "SECRET_KEY", "TOKEN")
    )
    return boto3.client(
        "s3",
        endpoint_url=given["endpoint"],
        region_name=given["region"],
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        config=Config(
            signature_version=given["signature"], retries={"max_attempts": 5, "mode": "standard"}
        ),
    )


def end_of(path: str) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return file.read()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
