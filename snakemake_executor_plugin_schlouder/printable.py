"""Text that others wrote, made fit for a person's terminal: no escape sequence in it is carried out."""

from __future__ import annotations

import re

_LONGEST = 200
"""Characters of a value in an error message."""

_MOST = 300
"""Characters of a cell of a table."""

_DIGITS = 12
"""Python neither reads nor writes numbers of some thousands."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def shown(value: object) -> str:
    """A value that was given, for an error message: as Python writes it, which escapes whatever is not
    printable, and not longer than a person reads."""
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        return f"a number of more than {_DIGITS} digits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def plain(text: str) -> str:
    """`text` without colours, and with every other character that a terminal would not print written as
    Python does; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(map(_plain, _COLOURS.sub("", text)))


def one_line(text: str) -> str:
    """The same for what belongs into one line, such as a name."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def brief(text: str) -> str:
    """The same, not longer than a cell of a table bears."""
    return one_line(text if len(text) <= _MOST else f"{text[:_MOST]}…")


def _plain(character: str) -> str:
    is_plain = character in "\n\t" or character.isprintable()
    return character if is_plain else repr(character)[1:-1]
