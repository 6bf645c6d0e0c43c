"""User data: what the plugin writes above templates/join.sh, and the script itself as text."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import snakemake_executor_plugin_schlouder
from snakemake_executor_plugin_schlouder.ec2.joining import (
    EFS_OPTIONS,
    LIMIT,
    ClusterKey,
    Join,
    Mount,
    node_configuration,
    oldest_slurmd,
    parse_mounts,
    user_data,
)
from snakemake_executor_plugin_schlouder.model import InstanceType, SchlouderError

SCRIPT = Path(snakemake_executor_plugin_schlouder.__file__).parent / "templates" / "join.sh"
JOIN = Join("head:6817", "/run/munge/munge.socket.2", "ssm:/schlouder/munge-key")
KIND = InstanceType("m5.large", 2, 8192)
AWKWARD = Join(
    "it's; rm -rf $HOME",
    "/run/s",
    "secretsmanager:arn:aws:secretsmanager:eu-west-1:1:secret:k-1",
    auth="slurm",
    slurm=(24, 11),
    mounts=(Mount("nas:/a", "/a", "defaults"), Mount("[fd00::1]:/b", "/b", "nfsvers=4.2,ro")),
    first_lease=660.5,
    unit=3600.0,
)


def script(join: Join = JOIN, nodes: tuple[str, ...] = ("n1",), market: str = "on-demand") -> str:
    return user_data(join, "eu-west-1", "https://ssm.eu-west-1.amazonaws.com", nodes, KIND, market)


def assigned(text: str) -> dict[str, str]:
    """The variables as a shell sees them after the lines above the script proper."""
    assignments = text.split("# Joins this machine")[0]
    names = re.findall(r"^(SCHLOUDER_\w+)=", assignments, re.MULTILINE)
    show = "".join(f'\nprintf "%s\\0" "${name}"' for name in names)
    shown = subprocess.run(
        ["sh"], input=assignments + show, capture_output=True, text=True, check=True
    )
    return dict(zip(names, shown.stdout.split("\0"), strict=False))


def test_a_node_declares_nine_tenths_of_its_memory() -> None:
    assert node_configuration(KIND) == "CPUs=2 RealMemory=7372 Feature=schlouder,m5.large"


def test_every_value_reaches_the_script_as_it_is() -> None:
    assert assigned(script(AWKWARD, ("n1", "n2"), "spot")) == {
        "SCHLOUDER_NODES": "n1 n2",
        "SCHLOUDER_NODE_CONF": "CPUs=2 RealMemory=7372 Feature=schlouder,m5.large",
        "SCHLOUDER_MARKET": "spot",
        "SCHLOUDER_CONTROLLER": "it's; rm -rf $HOME",
        "SCHLOUDER_OLDEST_SLURMD": "23.02",
        "SCHLOUDER_NEWEST_SLURMD": "24.11",
        "SCHLOUDER_AUTH": "slurm",
        "SCHLOUDER_MUNGE_SOCKET": "/run/s",
        "SCHLOUDER_KEY_SERVICE": "secretsmanager",
        "SCHLOUDER_KEY_NAME": "arn:aws:secretsmanager:eu-west-1:1:secret:k-1",
        "SCHLOUDER_KEY_ENDPOINT": "https://ssm.eu-west-1.amazonaws.com",
        "SCHLOUDER_REGION": "eu-west-1",
        "SCHLOUDER_MOUNTS": "nas:/a /a defaults\n[fd00::1]:/b /b nfsvers=4.2,ro",
        "SCHLOUDER_FIRST_LEASE": "661",
        "SCHLOUDER_UNIT": "3600",
    }


def test_the_script_reads_what_is_assigned_and_nothing_else() -> None:
    read = set(re.findall(r"\$\{?(SCHLOUDER_\w+)", SCRIPT.read_text()))
    assert read == set(assigned(script()))


@pytest.mark.parametrize(
    "text",
    [
        script(),
        script(replace(AWKWARD, controller="it's"), tuple(f"n{i}" for i in range(100)), "spot"),
    ],
)
def test_user_data_is_a_posix_script_of_which_shellcheck_has_nothing_to_say(text: str) -> None:
    assert text.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        ["shellcheck", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_its_python_is_python_of_the_oldest_distribution() -> None:
    """Debian 11 has Python 3.9, Ubuntu 22.04 3.10: no syntax of this interpreter's own."""
    import ast

    (program,) = re.findall(r"^READ_KEY='\n(.*?)^'$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    ast.parse(program, feature_version=(3, 9))


def test_comments_stay_at_home_except_for_what_the_script_is() -> None:
    text = script()
    head = SCRIPT.read_text().partition("set -eu\n")[0]
    assert head in text
    rest = text.partition("set -eu\n")[2].splitlines()
    assert [line for line in rest if re.match(" *#(?! shellcheck)", line)] == []
    code = [line for line in SCRIPT.read_text().splitlines() if not re.match(" *#", line)]
    assert [line for line in text.splitlines() if line in code][-len(code) :] == code


def test_a_hundred_names_leave_room_and_too_many_are_refused() -> None:
    names = tuple(f"schlouder-58ab12cd-{number}" for number in range(1, 101))
    assert len(script(AWKWARD, names).encode()) < 0.9 * LIMIT
    with pytest.raises(ValueError, match="longer than EC2's 16384 bytes"):
        script(AWKWARD, names * 10)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("ssm:/a/b", ClusterKey("ssm", "/a/b")),
        ("/a/b", ClusterKey("ssm", "/a/b")),
        ("secretsmanager:a/b", ClusterKey("secretsmanager", "a/b")),
        ("secretsmanager:arn:aws:x:1", ClusterKey("secretsmanager", "arn:aws:x:1")),
    ],
)
def test_keys_are_in_the_parameter_store_or_the_secrets_manager(text: str, key: ClusterKey) -> None:
    assert ClusterKey.parse(text) == key


@pytest.mark.parametrize(
    "text", ["", "ssm:", "ssm:a b", "s3:/key", 'secretsmanager:a"b', "ssm:x:y"]
)
def test_a_key_that_is_nowhere_is_refused(text: str) -> None:
    with pytest.raises(SchlouderError, match=r"cluster-key: .* is not allowed; it is ssm:/NAME"):
        ClusterKey.parse(text)


def test_mounts_are_separated_by_commas_or_blanks_and_so_are_their_options_by_commas() -> None:
    efs = "fs-0a1b.efs.eu-west-1.amazonaws.com"
    text = f"nas:/export/a=/data,nfsvers=4.2,ro,[fd00::1]:/=/b {efs}:/x=/efs/,tls_no"
    assert parse_mounts(text) == (
        Mount("nas:/export/a", "/data", "nfsvers=4.2,ro"),
        Mount("[fd00::1]:/", "/b", "defaults"),
        Mount(f"{efs}:/x", "/efs", f"{EFS_OPTIONS},tls_no"),
    )
    assert parse_mounts("") == ()


@pytest.mark.parametrize(
    ("controller", "oldest"),
    [
        ((22, 5), (22, 5)),
        ((23, 11), (22, 5)),
        ((24, 5), (23, 2)),
        ((24, 11), (23, 2)),
        ((25, 5), (23, 11)),
        ((26, 5), (24, 11)),
    ],
)
def test_the_oldest_slurmd_that_a_controller_takes(
    controller: tuple[int, int], oldest: tuple[int, int]
) -> None:
    assert oldest_slurmd(controller) == oldest
