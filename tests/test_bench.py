"""What the bench reads and judges; the measurements themselves are `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import requests
from bench.comparison import ONE, rows
from bench.executors import CLUSTER_GENERIC, OURS, SLURM_PLUGIN
from bench.processes import Process, Processes, Usage
from bench.runs import Results, Run

SDIAG = """\
Latency for 1000 calls to gettimeofday(): 23 microseconds

Remote Procedure Call statistics by message type
\tREQUEST_STATS_INFO                      ( 2035) count:2      ave_time:156    total_time:313
\tREQUEST_SUBMIT_BATCH_JOB                ( 4003) count:12     ave_time:678    total_time:678
\tREQUEST_JOB_INFO                        ( 2003) count:3      ave_time:195    total_time:195

Remote Procedure Call statistics by user
\troot            (       0) count:17     ave_time:283    total_time:2832

Pending RPC statistics
\tNo pending RPCs
"""


def test_requests_are_counted_once_and_without_the_question() -> None:
    """As sdiag of Slurm 22.05 prints them."""
    assert requests.by_type(SDIAG) == {"REQUEST_SUBMIT_BATCH_JOB": 12, "REQUEST_JOB_INFO": 3}


def test_ended_vms_and_their_jobs_stay_in_the_sum() -> None:
    """The daemon (2) has waited for VMs that used 7 s; a third one (5) runs."""
    processes = Processes(
        [
            Process(1, 0, "unshare", 50.0, 50.0),
            Process(2, 1, "python", 100.0, 7.0),
            Process(3, 2, "slurmctld", 1.0, 0.0),
            Process(4, 3, "slurmscriptd", 0.25, 0.0),
            Process(5, 2, "unshare", 0.0, 0.0),
            Process(6, 5, "python", 0.5, 2.0),
            Process(7, 6, "slurmstepd", 0.25, 0.0),
        ]
    )
    assert processes.usage(2) == Usage(controller=1.25, vms=9.75)
    assert [process.pid for process in processes.vms(2)] == [5]
    assert [process.pid for process in processes.jobs(2)] == [7]


def test_the_kernels_books_know_a_child_that_has_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    before = Processes.now().usage(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True)
    used = Processes.now().usage(os.getpid()) - before
    assert used.vms >= 0.25
    assert used.controller == 0


def _run(seconds: float) -> Run:
    return Run(seconds, 1.0, 1.0, 0.1, {}, 0.5)


def test_medians_are_compared_with_the_goal() -> None:
    results = Results(
        {
            OURS: [_run(4), _run(5), _run(60)],
            CLUSTER_GENERIC: [_run(5)],
            SLURM_PLUGIN: [_run(10)],
        }
    )
    slurm, generic, notice = rows(ONE, results)
    assert (slurm.ok, generic.ok, notice.ok) == (False, True, True)
    assert slurm.value == "0.500 (5.0 s / 10.0 s)"


@pytest.mark.parametrize("place", ["ours", "peer"])
def test_a_failure_of_ours_falls_short_and_one_of_a_peer_is_not_measured(place: str) -> None:
    results = Results({OURS: [_run(4)], CLUSTER_GENERIC: [_run(5)], SLURM_PLUGIN: [_run(10)]})
    failed = OURS if place == "ours" else SLURM_PLUGIN
    del results.runs[failed]
    results.missing[failed] = "why"
    first = rows(ONE, results)[0]
    assert first.value == "why"
    assert first.ok is (False if place == "ours" else None)
