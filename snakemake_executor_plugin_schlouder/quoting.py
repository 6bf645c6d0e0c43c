"""The command of a job, quoted for the shell.

Snakemake quotes values as Python's `repr` does, but not those that begin with a quote, nor the names of
rules: a file name with both a quote and `$(...)` would be run by the shell, and a backslash would arrive
twice.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Sequence

from snakemake_interface_executor_plugins.utils import format_cli_arg

RULES = "--allowed-rules"
"""The option whose values Snakemake does not quote at all."""

_BEGIN = " -m snakemake --snakefile "
_QUOTED = re.compile(r"""(?<=\s)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?=\s|$)""")


def shell_command(command: str) -> str:
    """`command` with the values that `repr` has quoted in the arguments of its snakemake quoted for the
    shell; what comes before (`--precommand`) is the user's own shell code."""
    before, begin, arguments = command.partition(_BEGIN)
    return (
        before + begin.rstrip() + _QUOTED.sub(_for_the_shell, " " + arguments) if begin else before
    )


def quoted_options(arguments: str, options: Iterable[tuple[str, Sequence[object]]]) -> str:
    """The arguments of a job with the values of these options quoted as `repr` does, also where a value
    begins with a quote or is the name of a rule. The options are those that Snakemake puts text of the
    user into, in its order: none is looked for in the values of those before it."""
    done, rest = "", arguments
    for flag, values in options:
        given = format_cli_arg(flag, values, quote=flag != RULES)
        if given and given in rest:
            before, _, rest = rest.partition(given)
            done += before + " ".join([flag, *(repr(str(value)) for value in values)])
    return done + rest


def _for_the_shell(found: re.Match[str]) -> str:
    """What is no literal was quoted by the user, whose quotes Snakemake keeps."""
    try:
        return shlex.quote(ast.literal_eval(found[0]))
    except (SyntaxError, ValueError):
        return found[0]
