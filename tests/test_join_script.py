"""The user data's body, templates/join.sh."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import snakemake_executor_plugin_schlouder

SCRIPT = Path(snakemake_executor_plugin_schlouder.__file__).parent / "templates" / "join.sh"
ASSIGNED_BY_THE_PLUGIN = {
    "SCHLOUDER_NODE",
    "SCHLOUDER_CONTROLLER",
    "SCHLOUDER_NODE_CONF",
    "SCHLOUDER_REGION",
    "SCHLOUDER_SSM_ENDPOINT",
    "SCHLOUDER_MUNGE_KEY_PARAMETER",
    "SCHLOUDER_MUNGE_SOCKET",
}


def test_is_a_posix_shell_script() -> None:
    subprocess.run(["sh", "-n", str(SCRIPT)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    # SC2154: the variables are assigned by the lines that the plugin writes above the script.
    command = ["shellcheck", "--shell=sh", "--exclude=SC2154", str(SCRIPT)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_reads_no_variable_that_the_plugin_does_not_assign() -> None:
    assert set(re.findall(r"\bSCHLOUDER_\w+", SCRIPT.read_text())) - {"SCHLOUDER_"} == (
        ASSIGNED_BY_THE_PLUGIN
    )


def test_fits_into_user_data() -> None:
    """EC2 allows 16 KiB; the plugin's assignments and additions need room too."""
    assert SCRIPT.stat().st_size < 12 * 1024
