"""The adapter over pyslurm without Slurm: the choice, the translation, a stand-in pyslurm that misbehaves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from test_slurm_cli import CONFIG, REQUEST, commands, scontrol

from snakemake_executor_plugin_schlouder.model import SlurmOptions
from snakemake_executor_plugin_schlouder.slurm import (
    Cluster,
    ClusterUnavailable,
    ClusterUnfit,
    SubmissionRefused,
)
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands, parse_config
from snakemake_executor_plugin_schlouder.slurm.rpc import (
    SlurmRpc,
    choose,
    description,
    needs_sbatch,
    node_status,
    propagated,
)
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

PYSLURM = """\
import os

class RPCError(Exception):
    pass

class Record:
    def __init__(self, **fields):
        vars(self).update(fields)

class Undecodable(Record):
    @property
    def name(self):
        return b"\\xe9".decode()

class Nodes:
    @staticmethod
    def load():
        node = dict(state="ALLOCATED+DYNAMIC_NORM", reason=None, idle_cpus=3, partitions=["schlouder"])
        nodes = [Record(name="n1", **node), Record(name=None, partitions=[])]
        return {number: node for number, node in enumerate(nodes)}

class Jobs:
    @staticmethod
    def load():
        job = dict(id=7, state="RUNNING", state_reason=None, start_time=1790000000, end_time=4e9)
        job["user_id"] = os.getuid()
        free, limited = dict(job, time_limit=None), dict(job, time_limit=60)
        jobs = [Record(name="run", comment="free", **free)]
        jobs += [Record(name="run", comment="limited", **limited), Undecodable(comment="x", **free)]
        theirs = dict(free, user_id=os.getuid() + 1)
        jobs += [Record(name="run", comment="free", **theirs), Record(name="other", comment="y", **free)]
        return dict(enumerate(jobs))

class JobSubmitDescription:
    def __init__(self, script, **fields):
        self.script, self.fields = script, fields

    def submit(self):
        return 7
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with Slurm's commands, a controller of version 22.05 among them."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    commands(tmp_path, scontrol=scontrol(), sbatch="echo 12", sinfo="echo 'n1|idle|none'")
    return tmp_path


def install(path: Path, source: str, version: str = "22.5.3") -> None:
    """Puts a stand-in for pyslurm where Python finds it."""
    (path / "pyslurm.py").write_text(source)
    facts = path / f"pyslurm-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pyslurm\nVersion: {version}\n")


def chosen(api: str) -> Cluster:
    slurm = SlurmCommands("schlouder")
    return choose(api, slurm, slurm.check(), logging.getLogger("test"))


@pytest.mark.parametrize(
    ("source", "version", "reason"),
    [
        (PYSLURM, "25.11.2", r"pyslurm 25\.11\.2 is not made for the controller's Slurm 22\.05"),
        (
            "import os, sys\nprint('fatal: no configuration', file=sys.stderr, flush=True)\nos._exit(1)",
            "22.5.3",
            "its process has ended with code 1: fatal: no configuration",
        ),
        ("import libslurm_not_there", "22.5.3", "with code 1: ModuleNotFoundError: .*libslurm"),
        ("import os\nos.abort()", "22.5.3", "ended with code -6"),
        (
            PYSLURM.replace("node = dict", "raise RPCError('Zero Bytes'); node = dict"),
            "22.5.3",
            "Zero Bytes",
        ),
    ],
)
def test_a_pyslurm_that_does_not_fit_is_not_used(
    path: Path, caplog: pytest.LogCaptureFixture, source: str, version: str, reason: str
) -> None:
    caplog.set_level(logging.DEBUG)
    install(path, source, version)
    assert isinstance(chosen("auto"), SlurmCommands)
    (line,) = caplog.messages
    assert line.startswith("schlouder: Slurm through its commands: ")
    with pytest.raises(ClusterUnfit, match=rf"--schlouder-slurm-api: pyslurm .*{reason}"):
        chosen("pyslurm")


def test_without_pyslurm_no_process_is_started(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("sys.path", [str(path)])
    monkeypatch.setattr(SlurmRpc, "__init__", lambda *_: pytest.fail("a process was started"))
    assert isinstance(chosen("auto"), SlurmCommands)
    assert caplog.messages == ["schlouder: Slurm through its commands: pyslurm is not installed"]


def test_the_commands_are_used_when_asked_for(path: Path) -> None:
    install(path, PYSLURM)
    assert isinstance(chosen("cli"), SlurmCommands)


def test_a_pyslurm_that_fits_is_used(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    install(path, PYSLURM)
    slurm = chosen("auto")
    assert caplog.messages == ["schlouder: Slurm through pyslurm 22.5.3: it fits the controller"]
    view = slurm.view("run")
    assert list(view.jobs) == ["free", "limited"], "not those of others, nor names that are no text"
    assert {job.phase for job in view.jobs.values()} == {JobPhase.RUNNING}
    assert view.jobs["free"].started == 1790000000.0
    assert [job.ended for job in view.jobs.values()] == [None, 4e9], "as squeue shows it"
    assert list(view.nodes) == ["n1"]
    assert view.nodes["n1"].state == "mixed"
    assert slurm.submit([REQUEST] * 250) == ["7"] * 250


@pytest.mark.parametrize(
    ("error", "outcome", "message"),
    [
        ("RPCError('Invalid qos specification')", SubmissionRefused, "Invalid qos"),
        ("RPCError('Unable to contact slurm controller')", ClusterUnavailable, "Unable to contact"),
    ],
)
def test_a_refusal_is_told_from_silence(
    path: Path, error: str, outcome: type[Exception], message: str
) -> None:
    install(path, PYSLURM.replace("return 7", f"raise {error}"))
    outcomes = chosen("pyslurm").submit([REQUEST])
    assert [(type(one), str(one)) for one in outcomes] == [(outcome, str(outcomes[0]))]
    assert message in str(outcomes[0])


def test_what_pyslurm_cannot_express_goes_through_sbatch(path: Path) -> None:
    install(path, PYSLURM.replace("return 7", "raise ValueError('no idea')"))
    assert chosen("pyslurm").submit([REQUEST]) == ["12"]


def test_a_process_that_ends_amid_a_submission_leaves_it_open_and_the_commands_go_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(path, PYSLURM.replace("return 7", "import os; os.abort()"))
    slurm = chosen("pyslurm")
    (outcome,) = slurm.submit([REQUEST, REQUEST])
    assert isinstance(outcome, ClusterUnavailable)
    assert slurm.submit([REQUEST]) == ["12"]
    assert slurm.view("run").nodes["n1"].state == "idle"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "ended with code -6" in warning.getMessage()


def test_a_process_that_hangs_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snakemake_executor_plugin_schlouder.slurm.cli.TIMEOUT", 5.0)
    sign = path / "hang"
    hang = (
        f"import os, time\n        while os.path.exists({str(sign)!r}): time.sleep(0.1)\n        "
    )
    install(path, PYSLURM.replace("job = dict", f"{hang}job = dict"))
    slurm = chosen("pyslurm")
    assert isinstance(slurm, SlurmRpc)
    (worker,) = slurm._idle
    sign.touch()
    assert slurm.view("run").nodes["n1"].state == "idle"
    assert not worker.is_alive
    assert worker._process.poll() is not None


def test_what_a_rule_asks_of_slurm_is_what_sbatch_would_say() -> None:
    options = SlurmOptions("lab", "high", "today", "avx", tasks=3)
    fields = description(replace(REQUEST, options=options, log="/data/100%/log"))
    assert fields == {
        "name": "schlouder-r",
        "comment": "r-1.1",
        "partitions": "schlouder",
        "required_nodes": "n1",
        "nodes": 1,
        "ntasks": 3,
        "cpus_per_task": 1,
        "memory_per_node": "2000M",
        "is_requeueable": False,
        "environment": "ALL",
        "working_directory": "/data/it's here",
        "standard_output": "/data/100%%/log",
        "time_limit": 2,
        "account": "lab",
        "qos": "high",
        "reservations": "today",
        "constraints": "avx",
    }
    assert "time_limit" not in description(replace(REQUEST, limit=None))


def test_what_only_sbatch_understands() -> None:
    assert not needs_sbatch(REQUEST)
    assert needs_sbatch(replace(REQUEST, options=SlurmOptions(extra=("--nice",))))
    assert needs_sbatch(replace(REQUEST, options=SlurmOptions(gres="gpu:1")))
    assert needs_sbatch(replace(REQUEST, memory=0))
    assert needs_sbatch(replace(REQUEST, companions=("n2",)))
    assert needs_sbatch(replace(REQUEST, script="#!/bin/sh\necho 'a\rb'\n"))


@pytest.mark.parametrize(
    ("state", "word", "responding"),
    [
        ("IDLE+DYNAMIC_NORM", "idle", True),
        ("MIXED+DYNAMIC_NORM+NOT_RESPONDING", "mixed", False),
        ("IDLE+DRAIN+DYNAMIC_NORM", "drained", True),
        ("ALLOCATED+DRAIN", "draining", True),
        ("IDLE+COMPLETING+DRAIN", "draining", True),
        ("DOWN+DRAIN", "drained", True),
        ("DOWN+NOT_RESPONDING", "down", False),
        ("IDLE+COMPLETING", "completing", True),
        ("ALLOCATED+COMPLETING", "allocated", True),
        ("IDLE+PLANNED", "planned", True),
        ("IDLE+RESERVED", "reserved", True),
        ("IDLE+DRAIN+INVALID_REG", "inval", True),
        ("IDLE+FAIL", "fail", True),
        ("UNKNOWN", "unknown", True),
    ],
)
def test_the_words_of_sinfo_for_a_state_with_flags(state: str, word: str, responding: bool) -> None:
    status = node_status("n", state, "why")
    assert (status.state, status.responding, status.reason) == (word, responding, "why")


def test_limits_are_propagated_as_slurm_conf_says() -> None:
    def names(line: str) -> list[str]:
        return propagated(parse_config(f"{CONFIG}{line}\n"))

    everything = names("")
    assert len(everything) == 10
    assert names("PropagateResourceLimits = ALL") == everything
    assert names("PropagateResourceLimits = NONE") == []
    assert names("PropagateResourceLimits = STACK,CORE") == ["CORE", "STACK"]
    but = names("PropagateResourceLimits = (null)\nPropagateResourceLimitsExcept = NOFILE")
    assert set(everything) - set(but) == {"NOFILE"}
