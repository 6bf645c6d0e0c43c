"""VMs that are kept for the next run: the store, what is handed over and taken, and who pays for what."""

from __future__ import annotations

import itertools
import math
import sqlite3
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fakes import World
from rig import BIG, SMALL, Rig

from snakemake_executor_plugin_schlouder import Executor, ExecutorSettings
from snakemake_executor_plugin_schlouder.costs import Account, account, keeping_bill
from snakemake_executor_plugin_schlouder.ec2.account import Ec2Settings
from snakemake_executor_plugin_schlouder.ec2.joining import Join, Mount
from snakemake_executor_plugin_schlouder.keeping import NEARLY_OVER, Keep, Kept, Mark, Shelf
from snakemake_executor_plugin_schlouder.launcher import Limits
from snakemake_executor_plugin_schlouder.lease import NOTICED, Lease
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    ON_DEMAND,
    SPOT,
    VM,
    VM_ENDED,
    Billing,
    Need,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.pool import Announcement, Goal
from snakemake_executor_plugin_schlouder.settings import validated

HOURS = Billing(3600, 0)
SECONDS = Billing(1, 60)
PAID = Keep(is_paid=True)
TEN_MINUTES = Keep(seconds=600)
TYPES = {kind.name: kind for kind in (SMALL, BIG)}
TARIFF = Tariff({SMALL.name: 0.36, BIG.name: 2.88}, {}, "a table")
MARK = Mark("head:6817", "schlouder", "eu-west-1", "https://ec2", "m")
KEPT = Kept(
    *("n1", "i-1", "r1", "r1", "asap", SMALL.name, ON_DEMAND, "a"),
    *(0.36, 0.36, 1000.0, 1002.0, 2000.0, 3000.0),
)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "kept.sqlite", MARK)


# -- for how long


@pytest.mark.parametrize(
    ("keep", "billing", "uptime", "idle_for", "left"),
    [
        (PAID, HOURS, 600, 0, 2890),
        (PAID, HOURS, 600, 500, 2890),
        (PAID, HOURS, 3590, 0, -100),
        (PAID, HOURS, 3610, 0, 3480),
        (TEN_MINUTES, HOURS, 3590, 0, 600),
        (TEN_MINUTES, SECONDS, 5, 100, 500),
        (Keep(), HOURS, 600, 0, 0),
    ],
)
def test_a_vm_stays_to_the_end_of_what_is_paid_or_for_so_long(
    keep: Keep, billing: Billing, uptime: float, idle_for: float, left: float
) -> None:
    assert keep.left(billing, uptime, idle_for) == left


def test_nothing_is_ever_paid_ahead_in_units_of_a_second() -> None:
    assert PAID.has_effect(HOURS)
    assert not PAID.has_effect(SECONDS)
    assert TEN_MINUTES.has_effect(SECONDS)
    assert not PAID.has_effect(Billing(160, 0)) and PAID.has_effect(Billing(171, 0))
    assert not any(PAID.left(SECONDS, up) > NEARLY_OVER for up in range(200))


# -- what must match


def mark(join: Join, billing: Billing = HOURS, **settings: Any) -> Mark:
    made = replace(Ec2Settings("eu-west-1", image="ami-1"), **settings)
    return Mark.of(made, join, billing, "schlouder", "eu-west-1", "https://ec2")


def test_a_machine_is_known_by_all_it_was_made_of() -> None:
    join = Join("head:6817", "/run/s", "ssm:/key")
    same = mark(join, types=("m5.large",), markets=(SPOT,))
    assert mark(join) == same, "of which type a VM is, and on which market, is asked of each"
    assert mark(replace(join, first_lease=77.0)) == same, "that ends when it has joined"
    others = [
        mark(replace(join, controller="other:6817")),
        mark(replace(join, key="ssm:/other")),
        mark(replace(join, mounts=(Mount("nas:/a", "/a", "defaults"),))),
        mark(join, SECONDS),
        mark(join, image="ami-2"),
        mark(join, subnets=("subnet-1",)),
        mark(join, security_groups=("sg-1",)),
        mark(join, launch_template="lt-1"),
        mark(join, volume_size=100),
        mark(join, volume_encrypted=True),
        mark(join, tags=(("a", "b"),)),
    ]
    assert len({same, *others}) == 1 + len(others)


# -- the store


def test_what_is_kept_is_the_owners_alone(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put([KEPT], now=2000)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_vm_is_offered_from_when_its_lease_is_known_until_shortly_before_its_end(
    shelf: Shelf,
) -> None:
    shelf.put([replace(KEPT, until=2000.0)], now=2000)
    assert shelf.offered(2000) == [], "its lease is still that of its run"
    shelf.promise({"n1": 3000.0})
    assert shelf.offered(2000) == [KEPT]
    assert shelf.offered(3000 - NEARLY_OVER) == []


def test_a_vm_is_offered_only_to_runs_with_the_same_mark(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put([KEPT], now=2000)
    for name in ("controller", "partition", "region", "endpoint", "machine"):
        other = Shelf(tmp_path / "kept.sqlite", replace(MARK, **{name: "other"}))
        assert other.offered(2000) == [], name


def test_a_damaged_store_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "kept.sqlite").write_bytes(b"no database" * 100)
    shelf = Shelf(tmp_path / "kept.sqlite", MARK)
    assert shelf.set_aside is not None and shelf.set_aside.exists()
    assert shelf.offered(0) == []


def test_many_runs_at_once_never_get_the_same_vm(tmp_path: Path) -> None:
    path, names = tmp_path / "kept.sqlite", [f"n{number}" for number in range(40)]
    Shelf(path, MARK).put([replace(KEPT, node=name) for name in names], now=2000)
    got: list[list[Kept]] = []
    barrier = threading.Barrier(8)

    def take() -> None:
        shelf = Shelf(path, MARK)
        barrier.wait()
        got.extend(shelf.take([name]) for name in names)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = sorted(kept.node for some in got for kept in some)
    assert taken == sorted(names)


# -- from run to run


def rig_of(
    directory: Path,
    run: str,
    shelf: Shelf,
    world: World | None = None,
    **changes: object,
) -> Rig:
    """A run in a workflow directory of its own."""
    values: dict[str, object] = {
        "billing": HOURS,
        "keep": PAID,
        "tariff": TARIFF,
        "types": (SMALL,),
    }
    return Rig(directory / run, world, shelf, run=run, **(values | changes))


def work(rig: Rig, count: int = 1, strategy: str = "asap", seconds: int = 20) -> list[VM]:
    """Does so many jobs, as the executor does; the VMs that were there for them."""
    announced = Announcement(strategy, "rule", Need(1, 1000), None)
    rig.broker.expect([announced] * count)
    taken = rig.broker.take_kept()
    rig.give(count, strategy, seconds=seconds)
    for _ in range(40 * seconds):
        rig.tick()
        if len(rig.ended) == rig.made:
            break
        rig.world.pass_time(1)
    assert rig.states() == [TaskState.COMPLETE] * rig.made
    return taken


def end(rig: Rig) -> None:
    rig.broker.hand_over()
    rig.broker.release()
    rig.journal.end_run(rig.config.run, rig.world.now)


def books(rig: Rig) -> Account:
    run = rig.config.run
    return account(rig.journal.vms(run), rig.journal.tasks(run), rig.config.billing, rig.world.now)


def provider_bills(world: World, billing: Billing) -> float:
    """Seconds that the cloud bills for all machines."""
    return sum(
        billing.billed((machine.instance.ended or world.now) - machine.started)
        for machine in world.machines.values()
    )


def owners(shelf: Shelf, *rigs: Rig) -> list[str]:
    """Of every VM one word for each run whose journal says that it has it, or for the store."""
    offered = [kept.node for kept in shelf.offered(-math.inf)]
    left = [rig.journal.remains(rig.config.run, TYPES).vms for rig in rigs]
    return [*offered, *(vm.name for vms in left for vm in vms if vm.state not in VM_ENDED)]


@pytest.mark.parametrize(
    "strategy", ["asap", "one-vm-per-job", "one-vm-for-all", "cheapest", "fastest"]
)
def test_every_strategy_uses_a_kept_vm_instead_of_a_new_one(
    strategy: str, shelf: Shelf, tmp_path: Path
) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first, strategy=strategy)
    end(first)
    (name,) = first.world.alive()
    assert first.world.leases[name].kept
    second = rig_of(tmp_path, "r2", shelf, first.world)
    (taken,) = work(second, strategy=strategy)
    assert taken.strategy == strategy
    assert second.cloud.launched == []
    assert [job.request.node for job in second.world.jobs.values()] == [name, name]
    assert second.world.leases[name].run == "r2" and not second.world.leases[name].kept
    second.broker.release()
    assert second.world.alive() == [] and name in second.slurm.deleted


@pytest.mark.parametrize("taker", ["one-vm-per-job", "cheapest"])
def test_a_vm_serves_another_strategy_than_before(taker: str, shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first, strategy="asap")
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world)
    (vm,) = work(second, strategy=taker)
    assert vm.strategy == taker and second.cloud.launched == []


def test_three_runs_in_one_hour_cost_one_hour(shelf: Shelf, tmp_path: Path) -> None:
    world = World()
    rigs = []
    for run in ("r1", "r2", "r3"):
        rigs.append(rig_of(tmp_path, run, shelf, world))
        work(rigs[-1], 3, "one-vm-for-all")
        end(rigs[-1])
        world.pass_time(300)
    assert len(world.machines) == 1
    assert [books(rig).units for rig in rigs] == [1, 0, 0]
    assert sum(books(rig).usd or 0.0 for rig in rigs) == pytest.approx(0.36)
    assert provider_bills(world, HOURS) == 3600
    lease = world.leases[world.alive()[0]]
    assert lease.kept and lease.until <= 1000 + 3600 - HOURS.margin - NOTICED


def test_by_the_second_each_run_pays_to_its_hand_over_and_the_next_one_from_there(
    shelf: Shelf, tmp_path: Path
) -> None:
    world = World()
    rigs = []
    for run in ("r1", "r2", "r3"):
        rigs.append(rig_of(tmp_path, run, shelf, world, billing=SECONDS, keep=TEN_MINUTES))
        work(rigs[-1], 2, "one-vm-for-all", seconds=100)
        end(rigs[-1])
        world.pass_time(200)
    (vm,) = rigs[0].journal.vms("r1")
    assert vm.state == VMState.HANDED_OVER and (vm.ended, vm.kept_until) == (1110, 1710)
    assert keeping_bill(vm, SECONDS) == pytest.approx((600 + NOTICED) * 0.36 / 3600)
    last = rig_of(tmp_path, "r4", shelf, world, billing=SECONDS, keep=Keep())
    work(last, 1, "one-vm-for-all")
    last.broker.release()
    rigs.append(last)
    billed = [books(rig).billed for rig in rigs]
    assert len(world.machines) == 1
    assert sum(billed) == provider_bills(world, SECONDS)
    assert billed[1] == pytest.approx(200 + 100, abs=5), "with the idle time before it"


def test_during_the_run_idle_vms_stay_as_long_as_they_would_after_it(
    shelf: Shelf, tmp_path: Path
) -> None:
    rig = rig_of(tmp_path, "r1", shelf, billing=SECONDS, keep=TEN_MINUTES)
    work(rig)
    rig.run(580)
    assert len(rig.world.alive()) == 1
    rig.run(60)
    assert rig.world.alive() == []


def test_a_vm_that_stays_stands_in_no_others_way(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf, types=(SMALL, BIG), keep=TEN_MINUTES, max_vms=1)
    work(rig)
    rig.give(1, "asap", need=Need(16, 1000))
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 2


@pytest.mark.parametrize("stop", ["hurry", "stop"])
def test_ctrl_c_and_sigterm_give_everything_back(stop: str, shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)
    getattr(rig.broker, stop)()
    end(rig)
    assert rig.world.alive() == [] and owners(shelf, rig) == []


def test_a_failed_run_keeps_its_idle_vms(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    rig.give(1, "asap", code=1, ends_run=True)
    rig.run(60)
    assert rig.states() == [TaskState.FAILED]
    end(rig)
    assert owners(shelf, rig) == rig.world.alive() == ["schlouder-r1-1"]


def test_nothing_is_kept_when_the_money_is_spent(shelf: Shelf, tmp_path: Path) -> None:
    for usd, is_kept in ((0.05, True), (0.04, False)):
        run, limits = f"r{usd}", Limits(max_spend=usd)
        rig = rig_of(tmp_path, run, shelf, billing=SECONDS, keep=TEN_MINUTES, limits=limits)
        work(rig)
        rig.world.pass_time(400)
        end(rig)
        assert bool(rig.world.alive()) == is_kept, "431 s cost 0.0431 USD"


def test_what_earlier_runs_have_paid_is_not_spent_again(shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world, limits=Limits(max_spend=0.01))
    work(second, strategy="one-vm-for-all")
    assert second.cloud.launched == [] and books(second).usd == 0.0


def test_a_budget_counts_what_this_run_adds(shelf: Shelf, tmp_path: Path) -> None:
    """With the 1200 s that the VM has cost before, it would have to do everything alone."""
    changes: dict[str, Any] = {"billing": SECONDS, "keep": TEN_MINUTES}
    first = rig_of(tmp_path, "r1", shelf, **changes)
    work(first, seconds=1200)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world, goal=Goal(budget=1500.0), **changes)
    second.broker.expect([Announcement("budget", "rule", Need(2, 1000), 100.0)] * 4)
    assert len(second.broker.take_kept()) == 1
    second.give(4, "budget", seconds=100, need=Need(2, 1000), planned=100.0)
    second.run(300)
    assert second.states() == [TaskState.COMPLETE] * 4
    assert len(second.cloud.launched) > 0 and books(second).billed <= 1500


def test_gangs_are_not_kept(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    rig.give(1, "asap", need=Need(1, 1000, nodes=2))
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]
    end(rig)
    assert rig.world.alive() == [] and shelf.offered(0) == []


def test_a_vm_with_a_job_of_somebody_else_is_not_handed_over(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)
    rig.slurm.foreign = {"schlouder-r1-1": ["77"]}
    end(rig)
    assert shelf.offered(rig.world.now) == []
    assert rig.world.alive() == ["schlouder-r1-1"], "and not ended either"


def test_too_little_paid_time_is_not_kept(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)
    rig.world.now = 1000 + 3600 - HOURS.margin - NOTICED - NEARLY_OVER
    end(rig)
    assert rig.world.alive() == [] and owners(shelf, rig) == []


# -- when something does not answer


def test_a_vm_that_did_not_hear_is_kept_as_long_as_its_lease_holds(
    shelf: Shelf, tmp_path: Path
) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)
    lease = rig.world.leases["schlouder-r1-1"]
    assert lease == Lease("r1", 600, lease.written)
    rig.slurm.away_for = {"renew"}
    end(rig)
    (kept,) = shelf.offered(rig.world.now)
    assert kept.until == pytest.approx(lease.until, abs=1)
    (vm,) = rig.journal.vms("r1")
    assert vm.kept_until == kept.until, "the table says so, too"


def test_without_slurms_word_nothing_is_kept(shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)
    rig.slurm.away = True
    end(rig)
    assert rig.world.alive() == [] and owners(shelf, rig) == []


@pytest.mark.parametrize("broken", ["journal", "shelf"])
def test_what_cannot_be_written_down_is_not_kept(broken: str, shelf: Shelf, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "r1", shelf)
    work(rig)

    def fails(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk full")

    if broken == "journal":
        rig.journal.write = fails  # type: ignore[method-assign]
    else:
        shelf.put = fails  # type: ignore[method-assign]
    rig.broker.hand_over()
    rig.broker.release()
    assert rig.world.alive() == [] and shelf.offered(0) == []


class Killed(BaseException):
    """SIGKILL: nothing catches it."""


def killed_at(rig: Rig, moment: int, action: Callable[[], object]) -> bool:
    """Whether the process was killed before (even) or after (odd) its so manieth effect."""
    counter = itertools.count()

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            if next(counter) == moment:
                raise Killed
            result = call(*arguments, **more)
            if next(counter) == moment:
                raise Killed
            return result

        return wrapper

    effects = [
        *((rig.journal, name) for name in ("write",)),
        *((rig.shelf, name) for name in ("put", "promise", "take")),
        *((rig.slurm, name) for name in ("renew", "cancel_run")),
        *((rig.cloud, name) for name in ("terminate",)),
    ]
    for port, name in effects:
        setattr(port, name, guarded(getattr(port, name)))
    try:
        action()
    except Killed:
        return True
    finally:
        for port, name in effects:
            delattr(port, name)
    return False


def restarted(rig: Rig) -> None:
    rig.broker = rig.make_broker()
    rig.broker.adopt(rig.journal.remains(rig.config.run, TYPES))


def test_killed_while_it_hands_over_no_vm_has_two_owners(tmp_path: Path) -> None:
    for moment in itertools.count():
        shelf = Shelf(tmp_path / f"{moment}.sqlite", MARK)
        first = rig_of(tmp_path / str(moment), "r1", shelf)
        work(first, 2, "one-vm-per-job")
        was_killed = killed_at(first, moment, first.broker.hand_over)
        names = owners(shelf, first)
        assert len(names) == len(set(names)), moment
        second = rig_of(tmp_path / str(moment), "r2", shelf, first.world)
        taken = {vm.name for vm in work(second, 2, "one-vm-per-job")}
        restarted(first)
        first.run(3)
        first.broker.release()
        assert taken <= set(second.world.alive()), "another run's VM is not touched"
        names = owners(shelf, first, second)
        assert len(names) == len(set(names)), moment
        second.broker.release()
        nobodys = set(second.world.alive())
        assert all(not second.world.leases[name].kept for name in nobodys) or was_killed
        if not was_killed:
            assert moment > 8 and len(taken) == 2 and not nobodys
            return


def test_killed_while_it_takes_no_vm_has_two_owners_or_is_started_anew(tmp_path: Path) -> None:
    for moment in itertools.count():
        shelf = Shelf(tmp_path / f"{moment}.sqlite", MARK)
        first = rig_of(tmp_path / str(moment), "r1", shelf)
        work(first)
        end(first)
        second = rig_of(tmp_path / str(moment), "r2", shelf, first.world)
        second.broker.expect([Announcement("asap", "rule", Need(1, 1000), None)])
        was_killed = killed_at(second, moment, second.broker.take_kept)
        assert len(owners(shelf, first, second)) <= 1
        is_known = len(owners(shelf, first, second)) == 1
        restarted(second)
        work(second)
        assert len(second.cloud.launched) == (0 if is_known else 1), moment
        second.broker.release()
        if not was_killed:
            assert moment > 4
            return


def test_a_run_that_took_a_vm_and_was_killed_goes_on_with_it(shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world, max_vms=2)
    work(second, 1, "one-vm-per-job")
    second.give(2, "one-vm-per-job", seconds=60)
    second.run(5)
    left = second.journal.remains("r2", TYPES)
    assert [vm.name for vm in left.vms] == ["schlouder-r1-1", "schlouder-r2-1"]
    assert left.vm_count == 1, "the name of the other one is not of this run's count"
    restarted(second)
    second.run(100)
    assert second.world.twice_at_a_time() == []
    assert len(second.cloud.launched) == 1
    (taken, _) = second.journal.vms("r2")
    assert (taken.origin, taken.state) == ("r1", VMState.READY)
    second.broker.release()
    assert second.world.alive() == []
    assert sum(books(rig).billed for rig in (first, second)) == provider_bills(second.world, HOURS)


# -- what is taken


def test_a_machine_that_has_ended_is_forgotten(shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    first.world.kill_machine("schlouder-r1-1")
    second = rig_of(tmp_path, "r2", shelf, first.world)
    assert work(second) == [] and len(second.cloud.launched) == 1
    assert shelf.offered(0) == []


@pytest.mark.parametrize("state", ["drained", "down", "unknown"])
def test_a_machine_that_slurm_does_not_use_is_ended(
    state: str, shelf: Shelf, tmp_path: Path
) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    (name,) = first.world.alive()
    if state == "unknown":
        first.world.remove_node(name)
    else:
        first.world.nodes[name] = state
    second = rig_of(tmp_path, "r2", shelf, first.world)
    assert work(second) == []
    assert name not in second.world.alive() and name in second.slurm.deleted
    assert shelf.offered(0) == []


def test_a_machine_on_which_something_runs_is_left_alone(shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    (name,) = first.world.alive()
    first.world.nodes[name] = "allocated"
    second = rig_of(tmp_path, "r2", shelf, first.world)
    assert work(second) == []
    second.broker.release()
    assert name in second.world.alive() and owners(shelf, first, second) == [name]


@pytest.mark.parametrize("who", ["cloud", "slurm"])
def test_while_somebody_does_not_answer_nothing_is_taken(
    who: str, shelf: Shelf, tmp_path: Path
) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world)
    getattr(second, who).away = True
    second.broker.expect([Announcement("asap", "rule", Need(1, 1000), None)])
    assert second.broker.take_kept() == []
    assert owners(shelf, first, second) == first.world.alive()


def test_no_more_are_taken_than_the_run_may_have_or_could_use(shelf: Shelf, tmp_path: Path) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first, 6, "one-vm-per-job")
    end(first)
    assert len(shelf.offered(first.world.now)) == 6
    second = rig_of(tmp_path, "r2", shelf, first.world, max_vms=3)
    assert len(work(second, 2, "asap")) == 2, "one for each job"
    third = rig_of(tmp_path, "r3", shelf, first.world, max_vms=3)
    assert len(work(third, 9, "one-vm-per-job")) == 3 and third.cloud.launched == []
    fourth = rig_of(tmp_path, "r4", shelf, first.world)
    assert len(work(fourth, 5, "one-vm-for-all")) == 1
    assert len(owners(shelf, first, second, third, fourth)) == 6


def test_a_machine_that_no_job_would_look_for_stays_for_others(
    shelf: Shelf, tmp_path: Path
) -> None:
    first = rig_of(tmp_path, "r1", shelf, types=(BIG,))
    work(first)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world, types=(SMALL, BIG))
    assert work(second) == [] and second.cloud.launched[0].type == SMALL
    assert "schlouder-r1-1" in [kept.node for kept in shelf.offered(first.world.now)]
    third = rig_of(tmp_path, "r3", shelf, first.world, types=(BIG,))
    assert [vm.name for vm in work(third)] == ["schlouder-r1-1"]


def test_a_run_without_the_setting_takes_what_is_there_and_keeps_nothing(
    shelf: Shelf, tmp_path: Path
) -> None:
    first = rig_of(tmp_path, "r1", shelf)
    work(first)
    end(first)
    second = rig_of(tmp_path, "r2", shelf, first.world, keep=Keep())
    assert len(work(second)) == 1
    end(second)
    assert second.world.alive() == [] and owners(shelf, first, second) == []


# -- what the executor makes of the settings


def opened(**settings: Any) -> tuple[Shelf | None, list[str]]:
    """The store that a run with these settings opens, and its warnings."""
    executor = Executor.__new__(Executor)
    executor._config = validated(ExecutorSettings(image="ami-1", **settings))
    executor.logger = Mock()
    shelf = executor._open_shelf(MARK)
    return shelf, [call.args[0] for call in executor.logger.warning.call_args_list]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "schlouder"


def test_who_keeps_nothing_opens_no_store_unless_there_is_one(state: Path) -> None:
    assert opened() == (None, [])
    assert not state.exists()
    assert opened(keep="10m")[0] is not None
    assert opened()[0] is not None


def test_a_setting_that_has_no_effect_is_told_once(state: Path) -> None:
    _, told = opened(keep="paid")
    assert len(told) == 1 and "units of 1 s (--schlouder-btu); no VM is kept" in told[0]
    assert opened(keep="paid", btu=3600.0)[1] == opened(keep="10m")[1] == []


def test_a_recorded_run_takes_and_keeps_nothing(state: Path) -> None:
    opened(keep="10m")
    record = str(state / "record.jsonl")
    shelf, told = opened(keep="10m", record=record)
    assert shelf is None and told == ["--schlouder-keep: a run that is recorded keeps no VMs."]
    assert opened(record=record) == (None, [])


def test_a_store_that_cannot_be_had_ends_no_run(state: Path) -> None:
    state.parent.mkdir(exist_ok=True)
    state.write_text("a file where the directory should be")
    shelf, told = opened(keep="10m")
    assert shelf is None and "no VM is taken over or kept" in told[0]


def test_a_damaged_store_is_told(state: Path) -> None:
    state.mkdir()
    (state / "kept.sqlite").write_bytes(b"no database" * 100)
    shelf, told = opened(keep="10m")
    assert shelf is not None and "kept.sqlite could not be read; it was moved to" in told[0]
