"""What jobs leave in a bucket: the scripts that do, on a real S3 API (moto), and what we read there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from rig import Rig
from snakemake_interface_executor_plugins.settings import SharedFSUsage

from snakemake_executor_plugin_schlouder.model import SchlouderError, TaskState
from snakemake_executor_plugin_schlouder.objects import (
    Objects,
    Storage,
    connect,
    has_credentials,
    shares_files,
)
from snakemake_executor_plugin_schlouder.slurm.script import VOID, Exit, WitnessSilent, vm_log

KEY, SECRET = "only-in-the-environment", "of-storage-and-jobs"
ANY = SimpleNamespace(endpoint_url=None, region="us-east-1", signature_version=None)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclass
class Bench:
    """A bucket, a run in it, and a clock that only the test moves."""

    client: Any
    storage: Storage
    directory: Path
    now: float = 100.0
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = Objects(self.client, self.storage, "0123abcd", lambda: self.now)
        self.client.meta.events.register(
            "before-call.s3", lambda model, **_: self.requests.append(model.name)
        )

    def exit_file(self, number: int = 1) -> str:
        return f"/data/run/.snakemake/schlouder/0123abcd/{number}-rule.1.exit"

    def put(self, number: int, ending: str) -> None:
        key = f"{self.storage.prefix}.schlouder/0123abcd/{number}-rule.1.exit{ending}"
        self.client.put_object(Bucket=self.storage.bucket, Key=key, Body=b"")

    def names(self) -> set[str]:
        listed = self.client.list_objects_v2(Bucket=self.storage.bucket).get("Contents", ())
        return {each["Key"].rpartition("/")[2].removeprefix("1-rule.1.exit") for each in listed}

    def script(self, command: str, keep: bool = False, python: str = sys.executable) -> Path:
        made = self.objects.script(python, keep)("a\nrule", command, self.exit_file())
        path = self.directory / "script"
        path.write_text(made)
        return path

    def start(self, script: Path, **environment: str) -> subprocess.Popen[bytes]:
        """As Slurm does, with its output at the place that the script knows."""
        with Path(vm_log(self.exit_file())).open("wb") as log:
            return subprocess.Popen(
                ["sh", str(script)],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.directory), **environment},
                cwd="/tmp",
            )

    def run(self, command: str, keep: bool = False) -> int:
        return self.start(self.script(command, keep)).wait(60)

    def log(self) -> str:
        path = self.directory / "fetched"
        self.objects.fetch_log(self.exit_file(), path)
        return path.read_text()


@pytest.fixture
def bench(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ACCESS_KEY", KEY)
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_SECRET_KEY", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    secrets = SimpleNamespace(access_key=KEY, secret_key=SECRET, token=None)
    settings = SimpleNamespace(**vars(ANY) | vars(secrets) | {"endpoint_url": endpoint})
    bucket = f"bucket-{os.getpid()}-{time.monotonic_ns()}"
    storage = Storage.of("s3", f"s3://{bucket}/some/prefix", settings)
    client = connect(storage, settings)
    client.create_bucket(Bucket=bucket)
    return Bench(client, storage, tmp_path)


# -- settings


def test_all_is_shared_or_nothing() -> None:
    assert shares_files(SharedFSUsage.all())
    assert shares_files(SharedFSUsage.all() - {SharedFSUsage.SOFTWARE_DEPLOYMENT})
    assert not shares_files(frozenset())
    for missing in (SharedFSUsage.INPUT_OUTPUT, SharedFSUsage.PERSISTENCE, SharedFSUsage.SOURCES):
        with pytest.raises(SchlouderError, match=r"--shared-fs-usage: .*not supported.*or nothing"):
            shares_files(SharedFSUsage.all() - {missing})


@pytest.mark.parametrize(
    ("provider", "prefix", "message"),
    [
        ("fs", "/shared", "--default-storage-provider: 'fs' is not supported.*must be s3"),
        ("s3", "bucket/prefix", "--default-storage-prefix: 'bucket/prefix' is not allowed"),
        ("s3", "s3://bucket/a b", "letters, digits"),
        ("s3", "s3://bucket/$(id)", "letters, digits"),
        ("s3", None, "s3://BUCKET/PREFIX"),
    ],
)
def test_a_storage_that_is_not_fit_is_named(
    provider: str, prefix: str | None, message: str
) -> None:
    with pytest.raises(SchlouderError, match=message):
        Storage.of(provider, prefix, ANY)


def test_a_prefix_may_be_empty_and_end_with_a_slash() -> None:
    assert Storage.of("s3", "s3://bucket", ANY).prefix == ""
    assert Storage.of("s3", "s3://bucket/a/b/", ANY).prefix == "a/b/"


def test_a_bucket_that_cannot_be_read_is_told_with_the_rights_it_takes(bench: Bench) -> None:
    bench.objects.check()
    nowhere = Objects(bench.client, replace(bench.storage, bucket="not-there"), "0123abcd")
    with pytest.raises(SchlouderError, match=r"s3://not-there/.*NoSuchBucket.*s3:PutObject"):
        nowhere.check()


def test_jobs_need_a_key_of_their_own() -> None:
    assert has_credentials(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    assert has_credentials(["SNAKEMAKE_STORAGE_S3_REGION", "SNAKEMAKE_STORAGE_S3_ACCESS_KEY"])
    assert not has_credentials(["SNAKEMAKE_STORAGE_S3_REGION", "AWS_SECRET_ACCESS_KEY"])


def test_the_documented_rights_are_those_it_takes(bench: Bench) -> None:
    rights = {
        "HeadBucket": "s3:ListBucket",
        "ListObjectsV2": "s3:ListBucket",
        "GetObject": "s3:GetObject",
        "PutObject": "s3:PutObject",
        "DeleteObject": "s3:DeleteObject",
        "DeleteObjects": "s3:DeleteObject",
    }
    text = (Path(__file__).parents[1] / "docs/further.md").read_text()
    (policy,) = (
        json.loads(block)
        for block in re.findall(r"```json\n(.*?)```", text, re.S)
        if "s3:" in block
    )
    listed = [each["Action"] for each in policy["Statement"]]
    allowed = {action for one in listed for action in ([one] if isinstance(one, str) else one)}
    bench.objects.revoke(bench.exit_file(2))
    bench.put(1, ".log")
    bench.objects.fetch_log(bench.exit_file(), bench.directory / "log")
    bench.objects.exit_of(bench.exit_file())
    bench.objects.clear()
    assert {rights[request] for request in bench.requests} == allowed


# -- scripts


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 7", 7), ("false && true", 1)])
def test_a_script_leaves_its_exit_code_and_after_a_failure_its_log(
    bench: Bench, command: str, code: int
) -> None:
    assert bench.objects.exit_of(bench.exit_file()) is None
    assert bench.run(f"echo said; {command}") == code
    assert bench.objects.exit_of(bench.exit_file()) == Exit(code)
    assert bench.objects.has_begun(bench.exit_file())
    assert bench.names() == {".begun", f".{code}", *([".log"] if code else [])}
    if code:
        assert bench.log() == "said\n"


def test_a_script_leaves_nothing_on_the_vm(bench: Bench) -> None:
    before = set(bench.directory.iterdir())
    assert bench.run("pwd; touch here; mkdir -p .snakemake; ls; exit 3") == 3
    work, *made = bench.log().split()
    assert Path(work).parent == bench.directory and made == ["here"]
    assert set(bench.directory.iterdir()) - before == {
        bench.directory / "script",
        bench.directory / "fetched",
    }
    assert not Path(vm_log(bench.exit_file())).exists()


def test_the_log_of_a_success_is_kept_on_request(bench: Bench) -> None:
    assert bench.run("echo good", keep=True) == 0
    assert bench.log() == "good\n"


def test_a_script_holds_no_credentials(bench: Bench) -> None:
    text = bench.script("true").read_text()
    assert KEY not in text and SECRET not in text


def test_a_revoked_script_does_nothing_and_says_so(bench: Bench) -> None:
    assert not bench.objects.revoke(bench.exit_file())
    assert bench.run(f"touch {bench.directory}/ran") == VOID
    assert not (bench.directory / "ran").exists()
    assert bench.names() == {".revoked"}
    assert bench.objects.exit_of(bench.exit_file()) is None


def test_whoever_revokes_learns_that_the_script_has_begun(bench: Bench) -> None:
    assert bench.run("true") == 0
    assert bench.objects.revoke(bench.exit_file())


def test_a_script_that_runs_again_forgets_its_first_end(bench: Bench) -> None:
    bench.run("exit 4")
    bench.run("kill -9 $$")
    bench.now += 2
    assert bench.objects.exit_of(bench.exit_file()) is None
    assert bench.names() == {".begun"}


@pytest.mark.parametrize("code", [0, 1])
def test_a_script_that_slurm_ends_lives_as_long_as_its_command(code: int, bench: Bench) -> None:
    """Its failure is then none of the command's own, but its log is of use."""
    here = bench.directory
    script = bench.script(
        f"trap '' TERM; touch {here}/begun; sleep 1; echo over; touch {here}/over; exit {code}"
    )
    with bench.start(script) as process:
        while not (here / "begun").exists():
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == code
    assert (here / "over").exists()
    assert bench.objects.exit_of(bench.exit_file()) == (Exit(0) if code == 0 else None)
    if code:
        assert bench.log() == "over\n"


def test_nothing_of_the_submitting_machine_need_exist_on_the_vm(bench: Bench) -> None:
    odd = {"HOME": "/not/there", "TMPDIR": "/not/there", "XDG_CACHE_HOME": "/not/there"}
    told = 'echo "$PWD = $HOME, ${TMPDIR-none}, ${XDG_CACHE_HOME-none}"; exit 1'
    assert bench.start(bench.script(told), **odd).wait(60) == 1
    work, _, rest = bench.log().strip().partition(" = ")
    assert rest == f"{work}, none, none"
    assert not Path(work).exists()


def test_modules_of_the_workflow_are_not_taken_for_pythons_own(bench: Bench) -> None:
    assert bench.run("echo 'raise SystemExit(9)' >json.py; exit 3") == 3
    assert bench.objects.exit_of(bench.exit_file()) == Exit(3)


def test_without_the_storage_a_job_does_not_begin(bench: Bench) -> None:
    script = bench.script(f"touch {bench.directory}/ran")
    script.write_text(script.read_text().replace(bench.storage.bucket, "not-there"))
    assert bench.start(script).wait(60) == 1
    assert not (bench.directory / "ran").exists()
    assert bench.names() == set()


# -- what we read


def test_one_list_tells_of_all_that_have_ended(bench: Bench) -> None:
    for number in range(1, 11):
        bench.put(number, ".begun")
        bench.put(number, f".{number % 2}")
    bench.requests.clear()
    found = [bench.objects.exit_of(bench.exit_file(number)) for number in range(1, 11)]
    assert found == [Exit(number % 2) for number in range(1, 11)]
    assert all(bench.objects.has_begun(bench.exit_file(number)) for number in range(1, 11))
    assert bench.requests == ["ListObjectsV2"]


def test_what_was_not_there_is_looked_for_anew(bench: Bench) -> None:
    assert bench.objects.exit_of(bench.exit_file()) is None
    assert not bench.objects.has_begun(bench.exit_file())
    bench.put(1, ".begun")
    bench.put(1, ".0")
    assert bench.objects.has_begun(bench.exit_file())
    assert bench.objects.exit_of(bench.exit_file()) == Exit(0)


def test_a_storage_that_does_not_answer_says_nothing_and_is_let_alone(bench: Bench) -> None:
    endpoint = "http://127.0.0.1:9"
    storage = replace(bench.storage, client={**bench.storage.client, "endpoint": endpoint})
    silent = Bench(
        connect(storage, SimpleNamespace(access_key="k", secret_key="s", token=None)),
        storage,
        bench.directory,
    )
    with pytest.raises(WitnessSilent):
        silent.objects.exit_of(silent.exit_file())
    asked = len(silent.requests)
    assert silent.objects.has_begun(silent.exit_file()), "on doubt it has"
    assert silent.objects.revoke(silent.exit_file())
    assert len(silent.requests) == asked
    silent.now += 11
    assert silent.objects.has_begun(silent.exit_file())
    assert len(silent.requests) > asked


def test_what_ended_jobs_left_is_removed_and_in_the_end_everything(bench: Bench) -> None:
    for number in (1, 2):
        for ending in (".begun", ".0", ".log", ".revoked"):
            bench.put(number, ending)
    other = f"{bench.storage.prefix}.schlouder/ffffffff/1-rule.1.exit.0"
    bench.client.put_object(Bucket=bench.storage.bucket, Key=other, Body=b"")
    bench.objects.remove(["1-rule.1.exit", "1-rule.1.log"])
    assert {".revoked", "2-rule.1.exit.0", "2-rule.1.exit.log"} <= bench.names()
    assert ".begun" not in bench.names() and ".log" not in bench.names()
    bench.objects.clear()
    listed = bench.client.list_objects_v2(Bucket=bench.storage.bucket)["Contents"]
    assert [each["Key"] for each in listed] == [other]


# -- the broker


def test_while_exit_codes_cannot_be_read_no_end_is_concluded(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    silent = True

    def witness(exit_file: str) -> Exit | None:
        if silent:
            raise WitnessSilent("no answer")
        return Exit(0)

    rig.witness = witness
    (task,) = rig.give(seconds=20, code=1)
    rig.run(200)
    assert task.state in (TaskState.SUBMITTED, TaskState.RUNNING)
    silent = False
    rig.run(5)
    assert rig.states() == [TaskState.COMPLETE], "the script's own word counts beside FAILED"


def test_on_vms_that_share_nothing_slurm_writes_and_starts_where_every_machine_has_room(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, shares_files=False)
    rig.give()
    rig.run(60)
    (job,) = rig.world.jobs.values()
    assert job.request.workdir == Path("/tmp")
    assert job.request.log == "/tmp/schlouder-r1-1-rule.1.log"
