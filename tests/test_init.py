"""`schlouder init`: every file it writes, held against what it is for."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from snakemake.cli import parse_args
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry
from test_localcloud import Vms
from workflows import Site as SiteOfRun
from workflows import wait_for

import snakemake_executor_plugin_schlouder
from snakemake_executor_plugin_schlouder import cli
from snakemake_executor_plugin_schlouder.ec2.account import PROBE_INSTANCE
from snakemake_executor_plugin_schlouder.init import (
    Site,
    broker_policy,
    slurm_conf,
    vm_policy,
    vm_trust,
)
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.localcloud.authorization import ACCOUNT
from snakemake_executor_plugin_schlouder.localcloud.controller import free_port, slurm_version
from snakemake_executor_plugin_schlouder.localcloud.faults import Faults
from snakemake_executor_plugin_schlouder.model import SchlouderError
from snakemake_executor_plugin_schlouder.settings import validated
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

PACKAGE = Path(snakemake_executor_plugin_schlouder.__file__).parent
FILES = {
    *("README.md", "slurm.conf", "vm-trust.json", "vm-policy.json", "broker-policy.json"),
    *("user-data.sh", "profile/config.yaml"),
}
SERVICES = ("ec2", "ssm", "secretsmanager", "pricing", "sts", "iam", "s3", "service-quotas")
IMPLIED = {"ec2:CreateTags", "iam:PassRole"}
"""What RunInstances needs besides itself, for tags and for the instance profile."""


def made(directory: Path, *options: str) -> Path:
    assert cli.main(["init", str(directory), "--slurm", "22.05", *options]) == 0
    return directory


def statements(policy: dict[str, Any], action: str) -> list[dict[str, Any]]:
    return [entry for entry in policy["Statement"] if action in entry["Action"]]


def actions(policy: dict[str, Any]) -> set[str]:
    return {action for entry in policy["Statement"] for action in entry["Action"]}


def calls_of_the_package() -> set[str]:
    """`service:Operation` of every call of boto3 in the source, paginators and waiters included; the embedded
    cloud is an account of its own."""
    session = botocore.session.get_session()
    names = {
        xform_name(operation): f"{service}:{operation}"
        for service in SERVICES
        for operation in session.get_service_model(service).operation_names
    }
    sources = [path for path in PACKAGE.rglob("*.py") if "localcloud" not in path.parts]
    calls = [
        node
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    found = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "get_paginator":
            (argument,) = call.args
            assert isinstance(argument, ast.Constant), "the policy is checked against literal names"
            found.add(str(argument.value))
    return {names[name] for name in found & names.keys()}


def test_the_policy_allows_the_calls_that_the_package_makes_and_no_other() -> None:
    """The rights on the storage of a workflow are those of the workflow: see test_objects.py."""
    calls = {call for call in calls_of_the_package() if not call.startswith("s3:")}
    assert "ec2:RunInstances" in calls
    assert actions(broker_policy(Site())) == calls | IMPLIED


def test_what_changes_something_is_bound_to_our_tags_and_to_the_role_of_vms() -> None:
    policy = broker_policy(Site(account="210987654321", vm_role="node"))
    assert not any("*" in action for action in actions(policy))
    unbound = {a for s in policy["Statement"] if s["Resource"] == ["*"] for a in s["Action"]}
    assert all(action.startswith(("ec2:Describe", "pricing:Get")) for action in unbound)
    probe = f"arn:aws:ec2:eu-west-1:210987654321:instance/{PROBE_INSTANCE}"
    for action in ("ec2:TerminateInstances", "ec2:GetConsoleOutput"):
        (statement,) = [s for s in statements(policy, action) if s["Resource"] != [probe]]
        assert statement["Condition"] == {
            "StringLike": {
                "aws:ResourceTag/schlouder:owner": "?*",
                "aws:ResourceTag/schlouder:run": "?*",
            }
        }
    (tagging,) = statements(policy, "ec2:CreateTags")
    assert tagging["Condition"] == {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    making = [s for s in statements(policy, "ec2:RunInstances") if "Condition" in s]
    kinds = {arn.rpartition(":")[2] for s in making for arn in s["Resource"]}
    assert kinds == {"instance/*", "volume/*"}
    (passing,) = statements(policy, "iam:PassRole")
    assert passing["Resource"] == ["arn:aws:iam::210987654321:role/node"]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}


@pytest.mark.parametrize(
    ("key", "action", "resource"),
    [
        ("/a/b", "ssm:GetParameter", "arn:aws:ssm:eu-west-1:123456789012:parameter/a/b"),
        (
            "secretsmanager:a/b",
            "secretsmanager:GetSecretValue",
            "arn:aws:secretsmanager:eu-west-1:123456789012:secret:a/b-??????",
        ),
        (
            "secretsmanager:arn:aws:secretsmanager:eu-west-1:1:secret:a-x",
            "secretsmanager:GetSecretValue",
            "arn:aws:secretsmanager:eu-west-1:1:secret:a-x",
        ),
    ],
)
def test_a_vm_may_read_the_clusters_key_and_nothing_else(
    key: str, action: str, resource: str
) -> None:
    (statement,) = vm_policy(Site(cluster_key=key))["Statement"]
    assert (statement["Action"], statement["Resource"]) == ([action], [resource])


def test_a_vm_may_decrypt_with_a_key_of_ones_own_only_for_that() -> None:
    arn = "arn:aws:kms:eu-west-1:123456789012:key/1-2"
    (statement,) = statements(vm_policy(Site(kms_key=arn)), "kms:Decrypt")
    assert statement["Resource"] == [arn]
    assert statement["Condition"]["StringEquals"] == {
        "kms:ViaService": "ssm.eu-west-1.amazonaws.com"
    }


def test_other_partitions_of_aws_have_other_names() -> None:
    site = Site(region="cn-north-1")
    assert vm_trust(site)["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com.cn"}
    (statement,) = vm_policy(site)["Statement"]
    assert statement["Resource"][0].startswith("arn:aws-cn:ssm:cn-north-1:")


def test_snakemake_takes_the_profile_and_the_plugin_its_settings(tmp_path: Path) -> None:
    options = ["--image", "ami-1", "--partition", "cloud", "--cluster-key", "secretsmanager:k"]
    mount = "nas:/a=/data,nfsvers=4.2,nas:/b=/b"
    profile = made(tmp_path, *options, "--mount", mount) / "profile"
    _, arguments = parse_args(["--profile", str(profile)])
    assert (arguments.executor, arguments.jobs) == ("schlouder", 200)
    plugin = ExecutorPluginRegistry().get_plugin("schlouder")
    config = validated(plugin.get_settings(arguments))
    assert (config.image, config.partition, config.max_vms) == ("ami-1", "cloud", 20)
    assert config.cluster_key == "secretsmanager:k"
    assert config.subnets == (Site().subnets,)
    assert [mount.point for mount in config.mounts] == ["/data", "/b"]
    assert config.instance_profile == Site().vm_role


def test_user_data_is_shown_as_it_will_be(tmp_path: Path) -> None:
    text = (made(tmp_path, "--controller", "head:7000") / "user-data.sh").read_text()
    assert "SCHLOUDER_CONTROLLER=head:7000\n" in text
    assert "SCHLOUDER_KEY_ENDPOINT=https://ssm.eu-west-1.amazonaws.com\n" in text
    subprocess.run(["sh", "-n", str(tmp_path / "user-data.sh")], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(tmp_path / "user-data.sh")], check=True)


def test_writes_all_files_and_tells_of_placeholders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "new", "--region", "us-east-1", "--account", "210987654321")
    written = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*.*")}
    assert written == FILES
    for name in ("vm-trust", "vm-policy", "broker-policy"):
        json.loads((tmp_path / "new" / f"{name}.json").read_text())
    told = capsys.readouterr().err
    assert "placeholders stand for --image, --subnets, --security-groups, --controller\n" in told
    readme = (tmp_path / "new" / "README.md").read_text()
    assert "$" not in readme.replace("$put_key", "$")
    assert all(name in readme for name in FILES - {"README.md"})


def test_the_key_is_on_no_command_line(tmp_path: Path) -> None:
    for number, key in enumerate(("ssm:/k", "secretsmanager:k")):
        readme = (made(tmp_path / str(number), "--cluster-key", key) / "README.md").read_text()
        (line,) = [line for line in readme.splitlines() if "munge.key" in line]
        assert line.startswith("sudo base64 -w0 /etc/munge/munge.key | aws ")
        assert line.endswith(" file:///dev/stdin")


def test_replaces_nothing_unless_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm.conf").write_text("mine\n")
    assert cli.main(["init", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"schlouder: {tmp_path}/slurm.conf: already there; --force replaces them\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["slurm.conf"]
    made(tmp_path, "--force")
    assert "MaxNodeCount" in (tmp_path / "slurm.conf").read_text()


def test_a_directory_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["init", str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"account": "12"}, "--account: '12' is not allowed; it has 12 digits"),
        ({"region": "mars-1"}, "--region: 'mars-1' is no AWS region such as eu-west-1"),
        ({"controller": "head"}, "--controller: 'head' is not allowed; it is HOST:PORT"),
        ({"cluster_key": "x y"}, "--cluster-key: 'x y' is not allowed"),
        ({"mount": "nas"}, "--mount: 'nas' is not allowed"),
        ({"vm_role": "a b"}, "--vm-role: 'a b' is not allowed"),
        ({"kms_key": "key/1"}, "--kms-key: 'key/1' is not allowed; it is the ARN"),
        ({"slurm": "22"}, "--slurm: '22' is not allowed"),
        ({"auth": "none"}, "--auth: 'none' is not allowed; it is munge or slurm"),
        ({"auth": "slurm", "slurm": "23.02"}, "--auth: slurm needs Slurm 23.11 or later"),
        ({"max_nodes": 0}, "--max-nodes: 0 is not allowed"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        Site(**{"slurm": "22.05", **values})
    assert message in str(caught.value)


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(SchlouderError) as caught:
        Site(account="", image="x", region="y", mount="z")
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(("slurm", "needed"), [("22.05", True), ("23.02", True), ("23.11", False)])
def test_lines_that_only_old_releases_need(slurm: str, needed: bool) -> None:
    text = slurm_conf(Site(slurm=slurm))
    assert ("TreeWidth=65533" in text, "cloud_reg_addrs" in text) == (needed, needed)


BASE = """\
ClusterName=init
SlurmctldHost={host}({gateway})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
StateSaveLocation={state}
SlurmctldPidFile={state}/pid
SlurmdSpoolDir=/var/spool/slurmd
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile=/var/log/slurm/slurmd.log
MpiDefault=none
"""
NAMESPACES = """\
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
"""
"""VMs made of namespaces have no cgroups, and this machine's size."""


@pytest.fixture
def controller(
    cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The slurm.conf of a slurmctld whose own lines are those that init writes for it."""
    gateway = cloud.gateway
    base = BASE.format(
        host=os.uname().nodename.split(".")[0],
        gateway=gateway,
        port=free_port(IPv4Address("0.0.0.0")),
        munge=cloud.folder / "munge" / "munge.socket",
        state=tmp_path,
    )
    release = "{}.{:02}".format(*slurm_version())
    lines = (made(tmp_path / "site", "--slurm", release) / "slurm.conf").read_text()
    conf = tmp_path / "slurm.conf"
    conf.write_text(base + lines + NAMESPACES)
    (tmp_path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["slurmctld", "-D", "-i", "-f", str(conf)], stdout=log, stderr=log
        )
    try:
        yield conf
    finally:
        process.terminate()
        process.wait()


@pytest.mark.integration
def test_slurmctld_takes_the_lines_and_a_vm_joins(
    cloud: LocalCloud, controller: Path, tmp_path: Path
) -> None:
    def is_up() -> bool:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, check=False)
        return b"is UP" in ping.stdout

    log = tmp_path / "log"
    wait_for(is_up, log.read_text)
    slurm = SlurmCommands("schlouder")
    info = slurm.check()
    config = slurm.config()
    assert (config["MaxNodeCount"], config["SlurmdTimeout"]) == ("1024", "120 sec")
    assert (config["SelectType"], config["ReturnToService"]) == ("select/cons_tres", "2")
    vms = Vms(cloud)
    try:
        joins = {"controller": info.controller, "munge_socket": info.munge_socket}
        instance_id = vms.run(vms.user_data("fresh", **joins))
        wait_for(
            lambda: "fresh" in slurm.view("none").nodes,
            lambda: f"{vms.console(instance_id)}\n{log.read_text()}",
        )
        wait_for(lambda: slurm.view("none").nodes["fresh"].accepts_jobs, log.read_text)
        output = tmp_path / "out"
        begun = time.monotonic()
        subprocess.run(
            ["sbatch", "--wait", "-pschlouder", "-wfresh", f"-o{output}", "--wrap=hostname"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        assert output.read_text() == "fresh\n"
        assert time.monotonic() - begun < 15
        slurm.drain(["fresh"], "done")
        wait_for(lambda: slurm.delete("fresh"), log.read_text)
    finally:
        vms.terminate_all()


RUN = """
rule all:
    input: "out.txt"
rule one:
    output: "out.txt"
    resources: schlouder_walltime="5s"
    shell: "hostname > {output}"
"""


@pytest.fixture
def account(site: SiteOfRun) -> Iterator[tuple[SiteOfRun, Site]]:
    """A workflow on the embedded cloud, and what init is told of that cloud; faults end with the test."""
    site.write(RUN)
    site.cloud.calls(reset=True)
    settings = site.cloud.environment()
    told = Site(
        region=settings["AWS_DEFAULT_REGION"],
        account=ACCOUNT,
        vm_role=settings["SNAKEMAKE_SCHLOUDER_INSTANCE_PROFILE"],
        cluster_key=settings["SNAKEMAKE_SCHLOUDER_CLUSTER_KEY"],
    )
    yield site, told
    site.cloud.inject(Faults())


@pytest.mark.integration
def test_a_run_needs_no_more_rights_than_the_policies_give(
    account: tuple[SiteOfRun, Site],
) -> None:
    site, told = account
    site.cloud.inject(Faults(policy=broker_policy(told), vm_policy=vm_policy(told)))
    done = site.run("--schlouder-spot", "prefer")
    assert done.returncode == 0, done.stdout
    assert (site.directory / "out.txt").exists()
    allowed = actions(broker_policy(told))
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= site.cloud.calls().keys() <= allowed


@pytest.mark.integration
def test_a_right_that_is_missing_is_named(account: tuple[SiteOfRun, Site]) -> None:
    site, told = account
    policy = broker_policy(told)
    kept = [statement for statement in policy["Statement"] if statement["Sid"] != "GiveRole"]
    site.cloud.inject(Faults(policy={**policy, "Statement": kept}))
    done = site.run()
    assert done.returncode != 0
    assert f"iam:PassRole (on arn:aws:iam::{ACCOUNT}:role/{told.vm_role})" in done.stdout
    assert site.alive() == []


@pytest.mark.integration
def test_a_vm_without_its_right_says_which(account: tuple[SiteOfRun, Site]) -> None:
    site, told = account
    other = vm_policy(replace(told, cluster_key="ssm:/another"))
    site.cloud.inject(Faults(vm_policy=other))
    vms = Vms(site.cloud)
    instance_id = vms.run(vms.user_data("poor"))
    vms.wait_for_state(instance_id, "terminated")
    console = vms.console(instance_id)
    assert "is not authorized to perform: ssm:GetParameter on resource: arn:aws:ssm:" in console
