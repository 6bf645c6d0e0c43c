"""The command of a job, quoted for the shell.

Snakemake quotes values as Python's `repr` does, and the names of rules not at all: a file name with both a
quote and `$(...)` would be run by the shell, and a backslash would arrive twice.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable

from snakemake_interface_executor_plugins.utils import format_cli_arg

_BEGIN = " -m snakemake --snakefile "
_QUOTED = re.compile(r"""(?<=\s)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?=\s|$)""")


def shell_command(command: str) -> str:
    """`command` with the values that `repr` has quoted in the arguments of its snakemake quoted for the
    shell; what comes before (`--precommand`) is the user's own shell code."""
    before, begin, arguments = command.partition(_BEGIN)
    return (
        before + begin.rstrip() + _QUOTED.sub(_for_the_shell, " " + arguments) if begin else before
    )


def quoted_rules(arguments: str, rules: Iterable[str]) -> str:
    """The arguments of a job with the names of its rules quoted as its other values are."""
    names = list(rules)
    bare = format_cli_arg("--allowed-rules", names, quote=False)
    return arguments.replace(bare, " ".join(["--allowed-rules", *map(repr, names)]), 1)


def _for_the_shell(found: re.Match[str]) -> str:
    """What is no literal was quoted by the user, whose quotes Snakemake keeps."""
    try:
        return shlex.quote(ast.literal_eval(found[0]))
    except (SyntaxError, ValueError):
        return found[0]
