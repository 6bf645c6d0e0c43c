"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from workflows import Site

from snakemake_executor_plugin_schlouder.localcloud import (
    LocalCloud,
    LocalCloudError,
    Options,
    check_machine,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for Slurm come first, so that the quick ones fill what is left of the workers' time."""
    slow = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many bad inputs were tried, in however many tests."""
    passed = terminalreporter.stats.get("passed", [])
    tried = sum(
        value for report in passed for name, value in report.user_properties if name == "bad inputs"
    )
    if tried:
        terminalreporter.write_line(f"bad inputs: {tried}, each one clear error or shown harmless")


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A running embedded cloud whose VMs boot without delay and share pytest's temporary directories."""
    try:
        check_machine()
    except LocalCloudError as error:
        pytest.skip(str(error))
    shared = tmp_path_factory.getbasetemp()
    options = Options(name=f"pytest-{os.getpid()}", boot_seconds=(0.0, 0.0), share=[shared])
    with LocalCloud.up(options, attached=True) as running:
        yield running


@pytest.fixture
def site(cloud: LocalCloud, tmp_path: Path) -> Iterator[Site]:
    """A workflow directory. Whatever the test did, nothing of it may be left on the cloud."""
    made = Site.make(cloud, tmp_path)
    yield made
    made.assert_nothing_left()
