"""Task lists are read as they are meant, and every wrong line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder.model import SchlouderError
from snakemake_executor_plugin_schlouder.tasklist import RecordedBoot, RecordedTask, read

LIST = """
[boots]
46 10 2
45

[tasks]
a.mgf 0 561 ~ 548 543 21631662 4877033 2
b 1.5 20
c 2 30 ~ 31 29 -> a.mgf b
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "x.tasks"
    path.write_text(text)
    return path


def test_boots_and_tasks_are_read(tmp_path: Path) -> None:
    tasks = read(written(tmp_path, LIST))
    assert tasks.boots == (RecordedBoot(46, 10, 2), RecordedBoot(45))
    assert tasks.tasks == (
        RecordedTask("a.mgf", 0, 561, 548, (), 543),
        RecordedTask("b", 1.5, 20, 20),
        RecordedTask("c", 2, 30, 31, ("a.mgf", "b"), 29),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 0 1", "line 1: expected [boots] or [tasks] first"),
        ("[tasks]", "expected at least one line below [tasks]"),
        ("[tasks]\na 0", "line 2: expected: name submission walltime_prediction"),
        ("[tasks]\na zero 1", "line 2: expected seconds, found 'zero'"),
        ("[tasks]\n\na -1 1", "line 3: expected seconds of at least 0, found -1"),
        ("[tasks]\na 0 nan", "line 2: expected seconds of at least 0, found nan"),
        ("[tasks]\na 0 1 ~", "line 2: expected the real walltime behind ~"),
        ("[tasks]\na 0 1 ->", "line 2: expected the names of tasks behind ->"),
        ("[tasks]\na 0 1 -> b", "a waits for b, which is no task"),
        ("[tasks]\na 0 1\na 0 1", "expected every task once, found a twice"),
        ("[tasks]\na 0 1 -> b\nb 0 1 -> a", "tasks wait for each other"),
        (
            "[boots]\n1 2 3 4 5\n[tasks]\na 0 1",
            "line 2: expected 1 to 4 numbers for a boot, found 5",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SchlouderError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchlouderError, match="cannot be read"):
        read(tmp_path / "none")
