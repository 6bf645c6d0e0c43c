"""The simulator under the live broker, on task lists small enough to be worked out by hand.

One core a VM; the broker looks every second; a boot takes what the task list says.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder import cli, strategies
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need
from snakemake_executor_plugin_schlouder.prediction import LearnedBoots, LinearBoots
from snakemake_executor_plugin_schlouder.replay import read_runs, replay
from snakemake_executor_plugin_schlouder.simulate import Lags, Outcome, Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import RecordedBoot, RecordedTask, TaskList

HOURS = Billing(3600, 0, 50)


def batch(*walltimes: float, boots: int = 0) -> TaskList:
    tasks = tuple(RecordedTask(f"t{n}", 0, w, w) for n, w in enumerate(walltimes))
    return TaskList(tasks, (RecordedBoot(40),) * boots)


def played(tasks: TaskList, strategy: str, max_vms: int = 10, billing: Billing = HOURS) -> Outcome:
    return simulate(tasks, Scenario(strategy, max_vms, billing, LinearBoots(40, 0)))


def test_one_vm_for_all_runs_one_task_after_the_other() -> None:
    outcome = played(batch(100, 200, 300), "one-vm-for-all")
    assert (outcome.vms, outcome.units, outcome.makespan) == (1, 1, 640)
    assert outcome.busy == 600


def test_one_vm_per_job_runs_them_side_by_side() -> None:
    outcome = played(batch(100, 200, 300), "one-vm-per-job")
    assert (outcome.vms, outcome.makespan) == (3, 340)
    assert outcome.units == 3


def test_asap_takes_the_vm_that_is_idle_before_a_new_one_could_be_up() -> None:
    """At the second round the first VM is predicted to be idle at 40 + 30, a new one up at 41 + ..."""
    tasks = TaskList(
        (RecordedTask("a", 0, 30, 30), RecordedTask("b", 45, 10, 10), RecordedTask("c", 45, 10, 10))
    )
    outcome = played(tasks, "asap")
    assert outcome.vms == 1
    assert outcome.makespan == 90


def test_a_task_over_several_vms_takes_and_pays_for_them_all() -> None:
    wide = RecordedTask("wide", 0, 100, 100, need=Need(1, 1, nodes=3))
    boots = tuple(RecordedBoot(seconds) for seconds in (20, 60, 40))
    outcome = played(TaskList((wide, RecordedTask("one", 0, 50, 50)), boots), "one-vm-per-job")
    assert (outcome.vms, outcome.units, outcome.makespan) == (4, 4, 160)
    assert outcome.busy == 3 * 100 + 50


def test_asap_starts_a_vm_for_each_task_it_cannot_run_sooner() -> None:
    assert played(batch(100, 100, 100), "asap").vms == 3


def test_afap_fills_the_paid_hour_and_then_starts_another_vm() -> None:
    """40 s of boot and 3 x 1000 s fit into 3600 - 50 s, a fourth does not."""
    outcome = played(batch(*[1000] * 4), "afap")
    assert (outcome.vms, outcome.units) == (2, 2)
    assert outcome.makespan == 3040


@pytest.mark.parametrize("seconds", [3600, 5400, 7200])
def test_afap_runs_tasks_as_long_as_its_unit_side_by_side(seconds: float) -> None:
    """R(v,t) <= R(v) as it is written would hold on any VM."""
    assert played(batch(*[seconds] * 3), "afap").vms == 3


def test_afap_takes_the_tightest_fit_first_fit_the_first_worst_fit_the_widest() -> None:
    """VM 1 keeps 1510 s, VM 2 510 s; the last task of 500 s fits both."""
    tasks = batch(2000, 3000, 500)
    assert played(tasks, "afap").makespan == 3540
    assert played(tasks, "worst-fit").makespan == 3040
    assert played(tasks, "first-fit").makespan == 3040


def test_at_the_cap_the_vm_idle_first_gets_the_task() -> None:
    outcome = played(batch(3000, 2000, 3000), "afap", max_vms=2)
    assert outcome.makespan == 40 + 2000 + 3000
    assert outcome.units == 1 + 2


def test_an_idle_vm_ends_inside_the_margin_of_its_paid_hour() -> None:
    outcome = played(batch(100), "asap")
    assert 3550 <= outcome.uptime <= 3600
    assert outcome.billed == 3600


def test_with_seconds_an_idle_vm_ends_after_the_time_of_a_boot() -> None:
    tasks = TaskList((RecordedTask("a", 0, 100, 100), RecordedTask("b", 300, 100, 100)))
    outcome = played(tasks, "asap", billing=Billing(1, 60))
    assert outcome.vms == 2
    assert 40 + 100 + 40 <= outcome.uptime - (40 + 100) <= 40 + 100 + 45


def test_with_seconds_a_vm_ends_at_once_when_nothing_is_left_to_come() -> None:
    outcome = played(batch(100), "asap", billing=Billing(1, 60))
    assert 40 + 100 <= outcome.uptime <= 40 + 100 + 2


def test_with_seconds_afap_fills_vms_to_the_planning_quantum() -> None:
    """Boots of 40 s, a tenth of a life: VMs of about 400 s, so two tasks of 150 s each."""
    outcome = played(batch(*[150] * 6), "afap", billing=Billing(1, 60))
    assert outcome.vms == 3


def test_a_task_starts_when_the_last_one_it_waits_for_has_ended() -> None:
    tasks = TaskList(
        (
            RecordedTask("a", 0, 100, 100),
            RecordedTask("b", 0, 50, 50),
            RecordedTask("c", 0, 10, 10, ("a", "b")),
        )
    )
    outcome = played(tasks, "one-vm-per-job")
    assert outcome.makespan == 40 + 100 + 40 + 10


def test_decisions_rest_on_the_estimates_and_results_on_what_tasks_really_took() -> None:
    tasks = TaskList(tuple(RecordedTask(f"t{n}", 0, 1000, 1300) for n in range(3)))
    outcome = played(tasks, "afap")
    assert (outcome.vms, outcome.units) == (1, 2)
    assert outcome.makespan == 40 + 3 * 1300


def test_recorded_boots_count_in_the_order_of_the_requests() -> None:
    tasks = TaskList(batch(100, 100).tasks, (RecordedBoot(30, 10, 2), RecordedBoot(90)))
    assert played(tasks, "one-vm-per-job").makespan == 190


def test_tasks_share_a_vm_as_far_as_its_cpus_go() -> None:
    """Two, then two more, and the one that needs both CPUs when the others are done."""
    two_cores = InstanceType("two-cores", 2, 4096)
    tasks = [RecordedTask(f"t{n}", 0, 100, 100) for n in range(4)]
    tasks.append(RecordedTask("wide", 0, 50, 50, need=Need(2, 1)))
    scenario = Scenario("one-vm-for-all", 1, HOURS, LinearBoots(40, 0), types=(two_cores,))
    assert simulate(TaskList(tuple(tasks)), scenario).makespan == 40 + 100 + 100 + 50


def test_lags_lie_between_the_events() -> None:
    """One VM: a, then b that was queued behind it, then c that waited for both."""
    tasks = (
        RecordedTask("a", 0, 10, 10),
        RecordedTask("b", 0, 10, 10),
        RecordedTask("c", 0, 10, 10, ("a", "b")),
    )
    lags = Lags(notice=3, release=4)
    scenario = Scenario("one-vm-for-all", 1, HOURS, LinearBoots(40, 0), lags=lags)
    assert simulate(TaskList(tasks), scenario).makespan == 40 + 10 + 10 + 3 + 4 + 10


def test_boot_predictors() -> None:
    linear = LinearBoots(52.878, 3.855)
    assert (linear.predict(0), linear.predict(2)) == (57, 64)
    measured = LearnedBoots()
    assert measured.predict(0) == 60
    for seconds in (10, 20, 90):
        measured.learn(seconds)
    assert measured.predict(5) == 20


RUNS = """\
run,application,usecase,strategy,b0_s,b1_s,btu_s,shutdown_margin_s,max_vms,boots_recorded,real_vms,real_btu,real_makespan_s
small,demo,d,afap,40,0,3600,50,25,1,1,1,340
"""


def recorded(directory: Path, runs: str = RUNS) -> Path:
    (directory / "small.tasks").write_text("[boots]\n40\n[tasks]\na 0 100\nb 0 200 ~ 195\n")
    (directory / "runs.csv").write_text(runs)
    return directory / "runs.csv"


def test_a_recorded_run_is_compared_with_what_was_measured(tmp_path: Path) -> None:
    (run,) = read_runs(recorded(tmp_path))
    played_again = replay(run)
    assert played_again.same_vms
    assert played_again.same_units
    assert played_again.makespan_error == pytest.approx(5 / 340)
    assert replay(run, "one-vm-per-job").outcome.vms == 2


def test_the_commands_print_their_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = recorded(tmp_path)
    assert cli.main(["replay", str(runs)]) == 0
    assert "demo" in capsys.readouterr().out
    assert cli.main(["simulate", str(tmp_path / "small.tasks"), "--price", "3600"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines[1:]]
    assert shown == [name for name in strategies.known() if name not in ("budget", "deadline")]
    goals = ["--deadline", "2h", "--budget", "3h"]
    assert cli.main(["simulate", str(tmp_path / "small.tasks"), *goals]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == strategies.known()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--btu", "0"), ("--btu", "nan"), ("--max-vms", "-3"), ("--boot-seconds", "-1")],
)
def test_numbers_that_make_no_sense_are_named(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    assert cli.main(["simulate", str(tmp_path / "small.tasks"), option, value]) == 1
    assert f"schlouder: {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (RUNS.replace("340", "soon"), "line 2: expected a number"),
        (RUNS.replace("b0_s", "b"), "expected a column b0_s"),
    ],
)
def test_a_wrong_table_of_runs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: str, message: str
) -> None:
    assert cli.main(["replay", str(recorded(tmp_path, runs))]) == 1
    assert message in capsys.readouterr().err
