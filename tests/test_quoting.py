"""Whatever Snakemake quotes as Python does arrives at a real shell as it was."""

from __future__ import annotations

import subprocess
from unittest.mock import Mock

import pytest
from snakemake_interface_executor_plugins.settings import SharedFSUsage
from snakemake_interface_executor_plugins.utils import (
    TargetSpec,
    encode_target_jobs_cli_args,
    format_cli_arg,
)

from snakemake_executor_plugin_schlouder.executor import Executor
from snakemake_executor_plugin_schlouder.quoting import shell_command

VALUES = [
    "plain",
    "a b",
    "it's",
    'say "hi"',
    "it's $(echo run) `echo run` $HOME",
    "both ' and \" $(echo run)",
    "back\\slash",
    "line\nbreak",
    "'quoted'",
    "üñí☃",
    "x;y&z|w>v",
    "-m snakemake --snakefile ",
    "--allowed-rules one --wait-for-files '/tmp'",
    "'a'$(echo run)",
    '"a"`echo run`',
    "'a' b",
    "'it's' \"$HOME\"",
    "'",
]


def words(arguments: str) -> list[str]:
    """What a program called with these arguments gets."""
    script = f"set -- {arguments}\nprintf '%s\\0' \"$@\""
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_arrives_as_it_was(value: str) -> None:
    target = format_cli_arg("--target-jobs", [f"one:n={value}", "two:"])
    command = f"python -m snakemake --snakefile 'Snakefile' {target} --cores 2"
    assert words(shell_command(command)) == [
        *("python", "-m", "snakemake", "--snakefile", "Snakefile"),
        *("--target-jobs", f"one:n={value}", "two:", "--cores", "2"),
    ]


def test_what_comes_before_snakemake_is_left_alone() -> None:
    command = 'echo "$HOME" \'a\' && python -m snakemake --snakefile "it\'s $HOME"'
    assert shell_command(command) == (
        "echo \"$HOME\" 'a' && python -m snakemake --snakefile 'it'\"'\"'s $HOME'"
    )


@pytest.mark.parametrize("value", VALUES)
def test_names_of_files_rules_and_wildcards_arrive_as_they_were(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Through what the interface makes of a job."""
    executor = Executor.__new__(Executor)
    workflow = Mock()
    workflow.dag.get_unneeded_temp_files.return_value = [value, "temp"]
    workflow.storage_settings.shared_fs_usage = list(SharedFSUsage)
    for name, given in (("workflow", workflow), ("_tmpdir", "/t"), ("_job_cores", 2)):
        monkeypatch.setattr(executor, name, given, raising=False)
    job = Mock(rules=[value, "one"], attempt=1, jobid=3, is_updated=False)
    job.is_group.return_value = True
    job.get_target_spec.return_value = [TargetSpec(value, {"n": value})]
    job.get_wait_for_files.return_value = ["in", value]
    target = encode_target_jobs_cli_args(job.get_target_spec())
    command = f"python -m snakemake --snakefile 'S' {executor.get_job_args(job)}"
    assert words(shell_command(command))[5:] == [
        *("--target-jobs", *target, "--allowed-rules", value, "one"),
        *("--local-groupid", "3", "--cores", "2", "--attempt", "1"),
        *("--unneeded-temp-files", value, "temp", "--wait-for-files", "/t", "in", value),
    ]
