"""Whatever Snakemake quotes as Python does arrives at a real shell as it was."""

from __future__ import annotations

import subprocess

import pytest
from snakemake_interface_executor_plugins.utils import format_cli_arg

from snakemake_executor_plugin_schlouder.quoting import quoted_rules, shell_command

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


def test_names_of_rules_are_quoted() -> None:
    rules = ["one", "a rule; $(echo run) 'x'"]
    bare = format_cli_arg("--allowed-rules", rules, quote=False)
    command = f"python -m snakemake --snakefile 'S' {quoted_rules(f'{bare} --cores 2', rules)}"
    assert words(shell_command(command))[5:] == ["--allowed-rules", *rules, "--cores", "2"]
