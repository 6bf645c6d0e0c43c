"""`--shared-fs-usage none`: VMs that see nothing of the workflow's directory, and an S3 bucket between them
and us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from workflows import Site

from snakemake_executor_plugin_schlouder.localcloud import (
    LocalCloud,
    LocalCloudError,
    Options,
    check_machine,
)

pytestmark = pytest.mark.integration

WORKFLOW = Path(__file__).parents[1] / "example_workflow"
BUCKET = "no-shared-files"
SECRET = "only-in-the-environment"
STORAGE = ("--shared-fs-usage", "none", "--default-storage-provider", "s3")

PROJECT = Path.cwd()
"""The directory in which the embedded cloud is started."""

ONE_FAILS = """
rule all:
    input: "good.txt", "bad.txt"
rule good:
    output: "good.txt"
    shell: "echo said by good; hostname >{{output}}"
rule bad:
    output: "bad.txt"
    shell:
        "echo sees $(cat {here}/secret-of-the-host || echo nothing);"
        " echo files $(ls -A {project}; ls -A {home});"
        " mkdir -p {here}; echo x >{here}/written-by-a-vm;"
        " ps -eo args; echo this is why; exit 3"
"""


def one_fails(site: Site) -> str:
    return ONE_FAILS.format(here=site.directory, project=PROJECT, home=Path.home())


@pytest.fixture(scope="module")
def cloud() -> Iterator[LocalCloud]:
    """An embedded cloud whose VMs share nothing with this machine."""
    try:
        check_machine()
    except LocalCloudError as error:
        pytest.skip(str(error))
    options = Options(name=f"nofs-{os.getpid()}", boot_seconds=(0.0, 0.0), shared=False)
    with LocalCloud.up(options, attached=True) as running:
        yield running


@pytest.fixture
def site(site: Site) -> Site:
    """What is on the VMs' image is found by PATH. Jobs have a key to the storage, and none to EC2."""
    site.environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{site.environment['PATH']}",
        "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "storage",
        "SNAKEMAKE_STORAGE_S3_SECRET_KEY": SECRET,
    }
    return site


class Bucket:
    """What a run has left in the storage under its prefix."""

    def __init__(self, cloud: LocalCloud, prefix: str) -> None:
        access = cloud.environment()
        self.prefix = prefix
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=access["AWS_ENDPOINT_URL"],
            region_name=access["AWS_DEFAULT_REGION"],
            aws_access_key_id=access["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=access["AWS_SECRET_ACCESS_KEY"],
        )

    @property
    def options(self) -> tuple[str, ...]:
        return (*STORAGE, "--default-storage-prefix", f"s3://{BUCKET}/{self.prefix}")

    def names(self) -> set[str]:
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        return {each["Key"].removeprefix(f"{self.prefix}/") for each in listed.get("Contents", ())}

    def content(self, name: str) -> bytes:
        answer = self._client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")
        return bytes(answer["Body"].read())


def under_git(directory: Path) -> None:
    """Snakemake gives jobs what git manages."""
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=directory, check=True)


@pytest.mark.thorough
def test_the_example_workflow_makes_the_same_as_with_shared_files(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(WORKFLOW, site.directory, dirs_exist_ok=True)
    under_git(site.directory)
    bucket = Bucket(site.cloud, "projects/example=1")
    here = tmp_path_factory.mktemp("here")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "chunks=2"]
    command += ["--snakefile", str(WORKFLOW / "Snakefile"), "--directory", str(here)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as beside:
        done = site.run(*bucket.options, "--config", "chunks=2")
    assert beside.returncode == 0
    assert done.returncode == 0, done.stdout
    assert "7 of 7 jobs complete" in done.stdout
    assert SECRET not in done.stdout
    assert not (site.directory / "results").exists()
    made = {str(path.relative_to(here)) for path in here.glob("results/**/*") if path.is_file()}
    assert bucket.names() == made
    for name in ("results/peptides.tsv", "results/psms.tsv", "results/summary.json"):
        assert bucket.content(name) == (here / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schlouder-bundle", "on"), "--schlouder-bundle: 'on' is not supported"),
        (
            ("--set-resources", "bad:nodes=2", "bad:tasks=2", "bad:mpi=srun"),
            "rule bad: nodes: 2 is not supported",
        ),
        (("--default-storage-prefix", f"s3://{BUCKET}/a b"), f"'s3://{BUCKET}/a b' is not allowed"),
    ],
)
def test_what_takes_shared_files_is_refused_before_a_vm_starts(
    site: Site, options: tuple[str, ...], message: str
) -> None:
    site.write(one_fails(site))
    before = len(site.instances())
    done = site.run(*Bucket(site.cloud, "refused").options, *options)
    assert done.returncode == 1
    assert message in done.stdout
    assert len(site.instances()) == before


def test_a_failing_job_shows_its_log_and_the_vms_see_nothing_of_the_host(site: Site) -> None:
    site.write(one_fails(site))
    (site.directory / "secret-of-the-host").write_text("everything\n")
    bucket = Bucket(site.cloud, "failing")
    done = site.run(*bucket.options, "--keep-going")
    assert done.returncode == 1
    assert "Job bad on VM" in done.stdout and "ended with exit code 1" in done.stdout
    assert "this is why" in done.stdout
    (log,) = site.directory.glob(".snakemake/schlouder/*/*-bad.1.log")
    text = log.read_text(errors="replace")
    assert "sees nothing" in text and "python" in text and SECRET not in text + done.stdout
    (files,) = [line.split()[1:] for line in text.splitlines() if line.startswith("files ")]
    assert not set(files) & {"pyproject.toml", "tests", ".bashrc", ".profile", ".cache"}
    assert not (site.directory / "written-by-a-vm").exists()
    assert "said by good" not in done.stdout
    assert SECRET not in site.slurm("scontrol", "--details", "show", "job")
    assert bucket.names() == {"good.txt"}
