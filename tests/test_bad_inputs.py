"""Every setting and every resource of a rule, each way it can be wrong: one clear error, or a reason why it
may be given.

The cases are made from the tables of settings and resources themselves: one that is added later has to be
entered here, with what may be given all the same.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from snakemake_executor_plugin_schlouder import ExecutorSettings
from snakemake_executor_plugin_schlouder.model import SchlouderError
from snakemake_executor_plugin_schlouder.printable import shown
from snakemake_executor_plugin_schlouder.resources import RESOURCES
from snakemake_executor_plugin_schlouder.settings import rule_settings, validated
from snakemake_executor_plugin_schlouder.slurm.cli import COMMANDS

HOSTILE: dict[str, Any] = {
    "a list": ["m5.large"],
    "a mapping": {"x": 1},
    "bytes": b"x",
    "empty": "",
    "blank": " \t ",
    "unknown": "no-such-word",
    "long": "x" * 100_000,
    "many digits": 10**5000,
    "large": 10**11,
    "nan": float("nan"),
    "infinite": float("inf"),
    "zero": 0,
    "negative": -1,
    "true": True,
    "a bell": "a\x07b",
    "an escape": "a\x1b]0;owned\x07b",
    "a line end": "a\nb",
    "a carriage return": "a\rb",
    "nul": "a\0b",
    "right to left": "a\u202eb",
    "half a character": "a\udcffb",
    "shell": "$(touch hacked); `id` & | > x",
    "quotes": "a'b\"c\\",
    "not ascii": "é漢",
    "other digits": "٣",
    "an option": "--help",
    "a short option": "-x",
    "parents": "../../etc/passwd",
    "a pipe": "a|b",
}

NOT_GIVEN = dict.fromkeys(("empty", "blank"), "counts as not given")
ZERO = {"zero": "counts as not given"}
LOOKED_UP = {"unknown": "its form is right; EC2 is asked whether there is one before any VM starts"}
VALUE = "is a value of its own in a call of EC2's, never a word of a command; EC2 is asked first"
FILE = "names a file that is opened, and is never a word of a command"
NEVER_FITS = {"large": "no instance type has so much, which is told before any VM starts"}
SLURMS = "at worst a name that Slurm does not know, in one word of sbatch's arguments"
OWN_DEFAULT = {"negative": "means Slurm's own default, as for the slurm plugin"}
IGNORED = "is told to be ignored"

_EMPTY = {"empty": NOT_GIVEN["empty"]}
_FACTOR = {**NOT_GIVEN, **ZERO, **NEVER_FITS, **OWN_DEFAULT}
_AMOUNT = {**NOT_GIVEN, **ZERO, **NEVER_FITS}
_PLAIN_TEXT = (
    "unknown",
    "large",
    "zero",
    "negative",
    "shell",
    "quotes",
    "not ascii",
    "other digits",
    *("an option", "a short option", "parents", "a pipe"),
)
_NAMES = {
    **NOT_GIVEN,
    **dict.fromkeys(("unknown", "large", "zero", "not ascii", "other digits"), SLURMS),
}
_NOT_USED = {**NOT_GIVEN, **dict.fromkeys(_PLAIN_TEXT, IGNORED)}

SETTINGS: dict[str, dict[str, str]] = {
    "strategy": {},
    "order": {},
    "deadline": {},
    "budget": {},
    "sharing": {},
    "bundle": {},
    "max_vms": {},
    "max_booting": {},
    "max_spend": {},
    "spot": {},
    "btu": {},
    "min_charge": {"zero": "there may be no least charge"},
    "margin": {"zero": "a VM may be kept to the very end of its unit"},
    "boot_overhead": {},
    "instance_types": LOOKED_UP,
    "prices": _EMPTY,
    "type_table": _EMPTY,
    "image": LOOKED_UP,
    "launch_template": {
        **_EMPTY,
        **LOOKED_UP,
        **dict.fromkeys(("an option", "parents"), VALUE),
    },
    "subnets": {**NOT_GIVEN, **LOOKED_UP},
    "security_groups": {**NOT_GIVEN, **LOOKED_UP},
    "key_name": {
        **_EMPTY,
        **LOOKED_UP,
        **dict.fromkeys(
            ("shell", "quotes", "an option", "a short option", "parents", "a pipe"), VALUE
        ),
    },
    "instance_profile": {**_EMPTY, **LOOKED_UP},
    "volume_size": {},
    "volume_encrypted": {"true": "is allowed"},
    "tags": NOT_GIVEN,
    "region": {**_EMPTY, "unknown": "its form is right; boto3 finds no such endpoint"},
    "cluster_key": {
        "unknown": "its form is right; a VM that finds no such key says so and powers off",
        "parents": "a name of a parameter, not of a file: VMs ask the Parameter Store for it",
    },
    "mount": NOT_GIVEN,
    "partition": {"unknown": "its form is right; Slurm is asked before any VM starts"},
    "slurm_api": {},
    "boot_timeout": {},
    "lease": {},
    "keep": {},
    "keep_logs": {"true": "is allowed"},
    "log_days": {},
    "record": {
        **_EMPTY,
        **dict.fromkeys(
            ("blank", "unknown", "shell", "quotes", "not ascii", "other digits", "an option"), FILE
        ),
        **dict.fromkeys(("a short option", "a pipe"), FILE),
    },
}
"""What may be given of HOSTILE for each setting, and why."""

RULES: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("tasks", "tasks_per_node", "mem_mb", "mem_mb_per_cpu", "gpu", "gpus"), _AMOUNT
    ),
    **dict.fromkeys(("tasks_per_gpu", "cpus_per_task", "cpus_per_gpu"), _FACTOR),
    "nodes": {**NOT_GIVEN, **ZERO},
    "disk_mb": {**NOT_GIVEN, **ZERO, "large": "nothing is done with it"},
    "runtime": {**NOT_GIVEN, **ZERO},
    **dict.fromkeys(("slurm_account", "qos", "slurm_qos", "reservation"), _NAMES),
    "slurm_extra": NOT_GIVEN,
    "mpi": {
        **NOT_GIVEN,
        **dict.fromkeys(_PLAIN_TEXT, "the workflow's own shell command; schlouder does not run it"),
    },
    "gpu_model": NOT_GIVEN,
    "gres": NOT_GIVEN,
    "constraint": {
        **NOT_GIVEN,
        **dict.fromkeys(
            ("unknown", "large", "zero", "negative", "an option", "a short option", "a pipe"),
            "features that no VM has, which is told before any VM starts",
        ),
    },
    "schlouder_instance_type": {
        **NOT_GIVEN,
        **dict.fromkeys(("unknown", "large", "zero"), LOOKED_UP["unknown"]),
    },
    "schlouder_strategy": NOT_GIVEN,
    "schlouder_walltime": NOT_GIVEN,
    "schlouder_bundle": {**NOT_GIVEN, "zero": "means off", "true": "means on"},
    "schlouder_spot": NOT_GIVEN,
    **dict.fromkeys(("slurm_partition", "cluster", "clusters", "slurm_cluster"), _NOT_USED),
}
"""The same for each resource."""

LONGEST = 700
"""Characters of an error about one value."""

SAYS_WHAT_IS_ALLOWED = (
    *("must be", "it is", "known are", "allowed are", "needed", "there is no file", "no directory"),
    *("EC2 takes", "no option of sbatch", "VMs have gpu", "name of a Slurm partition"),
    *("quotes are not closed", "only a job with the resource mpi", "schlouder's own"),
)


def option(setting: str) -> str:
    return f"--schlouder-{setting.replace('_', '-')}"


def given(**values: Any) -> ExecutorSettings:
    return ExecutorSettings(**{"image": "ami-1", **values})


def check(error: SchlouderError, subject: str, value: object) -> None:
    """Every line names what is wrong, what was given and what is allowed, is fit for a terminal and short."""
    for line in str(error).splitlines():
        assert line.startswith(f"{subject}: "), line
        assert line.isprintable() and len(line) < LONGEST, line
        parts = [value, *(value.split() if isinstance(value, str) else ())]
        assert any(shown(part) in line for part in parts) or "not given" in line, line
        assert any(words in line for words in SAYS_WHAT_IS_ALLOWED), line


def test_every_setting_and_resource_is_in_the_tables() -> None:
    assert set(SETTINGS) == {field.name for field in fields(ExecutorSettings)}
    assert set(RULES) == set(RESOURCES)


@pytest.mark.parametrize("setting", [field.name for field in fields(ExecutorSettings)])
def test_a_bad_setting_is_one_clear_error(
    setting: str,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for what, value in HOSTILE.items():
        try:
            validated(given(**{setting: value}))
        except SchlouderError as error:
            assert what not in SETTINGS[setting], f"{what}: {error}"
            check(error, option(setting), value)
        else:
            assert what in SETTINGS[setting], f"{what} is taken; why may it be given?"
    record_property("bad inputs", len(HOSTILE))


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_bad_resource_is_one_clear_error(
    resource: str, record_property: Callable[[str, object], None]
) -> None:
    config = validated(given())
    for what, value in HOSTILE.items():
        try:
            rule_settings("r", 1, {resource: value}, config)
        except SchlouderError as error:
            assert what not in RULES[resource], f"{what}: {error}"
            check(error, f"rule r: {resource}", value)
        else:
            assert what in RULES[resource], f"{what} is taken; why may it be given?"
    record_property("bad inputs", len(HOSTILE))


def test_all_bad_settings_are_told_at_once() -> None:
    names = [field.name for field in fields(ExecutorSettings)]
    with pytest.raises(SchlouderError) as caught:
        validated(ExecutorSettings(**dict.fromkeys(names, HOSTILE["an escape"])))
    told = [line.partition(": ")[0] for line in str(caught.value).splitlines()]
    assert sorted(told) == sorted(map(option, names))


def test_all_bad_resources_are_told_at_once() -> None:
    with pytest.raises(SchlouderError) as caught:
        rule_settings("r", 1, dict.fromkeys(RESOURCES, HOSTILE["an escape"]), validated(given()))
    told = {line.split(": ")[1] for line in str(caught.value).splitlines()}
    assert told == set(RESOURCES)


def test_a_misspelt_resource_of_ours_is_told() -> None:
    with pytest.raises(
        SchlouderError, match=r"rule r: 'schlouder_waltime' is no resource .*walltime"
    ):
        rule_settings("r", 1, {"schlouder_waltime": "2m"}, validated(given()))


@pytest.mark.parametrize("rule", [v for v in HOSTILE.values() if isinstance(v, str) and v.strip()])
def test_the_name_of_a_rule_does_nothing_to_the_terminal(rule: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        rule_settings(rule, 1, {"mem_mb": -1}, validated(given()))
    (line,) = str(caught.value).splitlines()
    assert line.isprintable() and len(line) < LONGEST


class Listener:
    """A cloud that only counts who comes."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return
            self.calls += 1

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def bad_options() -> dict[str, str]:
    """As the command line takes them: its parser itself refuses what is no number."""
    hints = get_type_hints(ExecutorSettings)
    kinds = {name: next(iter(get_args(hint)), hint) for name, hint in hints.items()}
    values = {str: HOSTILE["an escape"], int: "-1", float: "-1"}
    return {
        option(field.name): values[kinds[field.name]]
        for field in fields(ExecutorSettings)
        if kinds[field.name] in values
    }


def test_nothing_is_asked_of_slurm_or_the_cloud_with_bad_settings(
    tmp_path: Path, listener: Listener
) -> None:
    called = tmp_path / "called"
    for command in COMMANDS:
        (tmp_path / command).write_text(f"#!/bin/sh\necho $0 $* >>{called}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / "Snakefile").write_text("rule one:\n    output: 'a'\n    shell: 'touch a'\n")
    access = {"AWS_ENDPOINT_URL": listener.url, "AWS_ACCESS_KEY_ID": "a"}
    access |= {"AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--executor", "schlouder", "--jobs", "1"),
            *(f"{name}={value}" for name, value in bad_options().items()),
        ],
        cwd=tmp_path,
        env={**os.environ, **access, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    for name in bad_options():
        assert told.count(f"{name}: ") == 1, (name, told)
    assert "Traceback" not in told
    assert listener.calls == 0 and not called.exists() and not (tmp_path / "a").exists()
