"""Tables for people, made from the journal."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .costs import IDLE, Account, Bill, account, keeping_bill
from .journal import Journal, RunRecord, TaskRecord, VMRecord, journal_path
from .model import SPOT, Billing, SchlouderError, TaskState, VMState
from .printable import brief, one_line, plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from .gc import Finding, Survey
    from .replay import Replay
    from .simulate import Outcome

NOTHING = "–"  # noqa: RUF001 - the sign the original table used for an unknown value

_ID_WIDTH = 6

NARROWEST = 100
"""Columns a table takes when the output is no terminal, and at least."""


def show(directory: Path, run: str | None) -> None:
    """Prints the report of one run in `directory`, the newest if `run` is None."""
    path = journal_path(directory)
    if not path.exists():
        raise SchlouderError(f"no run of schlouder is known in {directory.resolve()}")
    journal = Journal.reading(path)
    known = [record.run for record in journal.runs()]
    if not known:
        raise SchlouderError(f"no run of schlouder is known in {directory.resolve()}")
    if run is not None and run not in known:
        raise SchlouderError(f"--run: {run!r} is unknown here; known are {', '.join(known)}")
    show_table(run_report(journal, run or known[-1]))


def show_table(renderable: RenderableType) -> None:
    from rich.console import Console

    Console(width=_width()).print(renderable)


def outcome_table(outcomes: Mapping[str, Outcome], price: float | None = None) -> RenderableType:
    """Simulated strategies side by side; `price` is that of one VM for an hour."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("strategy", "VMs", "units", "billed", "cost", "makespan", "idle share"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for name, outcome in outcomes.items():
        cost = NOTHING if price is None else f"{outcome.billed / 3600 * price:.2f}"
        table.add_row(
            Text(name),
            str(outcome.vms),
            str(outcome.units),
            f"{outcome.billed:.0f} s",
            cost,
            f"{outcome.makespan:.0f} s",
            f"{outcome.idle_share:.0%}",
        )
    return table


def replay_table(replays: Sequence[Replay]) -> RenderableType:
    """Agreement with the measured runs, by application and strategy."""
    from rich.table import Table
    from rich.text import Text

    from .replay import Fidelity

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in (
        "application",
        "strategy",
        "runs",
        "VMs agree",
        "units agree",
        "makespan error",
    ):
        table.add_column(heading)
    groups: dict[tuple[str, str], list[Replay]] = {}
    for replay in replays:
        groups.setdefault((replay.run.application, replay.run.strategy), []).append(replay)
    for (application, strategy), group in sorted(groups.items()):
        fidelity = Fidelity.of(group)
        table.add_row(
            Text(one_line(application)),
            Text(one_line(strategy)),
            str(fidelity.runs),
            str(fidelity.same_vms),
            str(fidelity.same_units),
            f"median {fidelity.median_makespan_error:.4f}",
        )
    return table


def run_report(journal: Journal, run: str) -> RenderableType:
    """The per-VM table of one run: a header for each VM, then its tasks in the order in which they ran; one
    that ran on several VMs is shown on each. VMs that never came to be are only counted."""
    from rich.console import Group
    from rich.text import Text

    vms, tasks = journal.vms(run), journal.tasks(run)
    record = next(record for record in journal.runs() if record.run == run)
    parts: list[RenderableType] = [Text(_run_line(record, vms, tasks))]
    billing = Billing(record.unit, record.minimum)
    spent = account(vms, tasks, billing, record.ended or time.time())
    bills = {bill.name: bill for bill in spent.bills}
    void = []
    for vm in vms:
        home = vm.leader or vm.name
        ran = [task for task in tasks if task.vm == home and not _never_started(task)]
        if vm.instance_id is None and vm.state == VMState.GONE and not ran:
            void.append(vm)
            continue
        lines = plain(f"\n{_vm_lines(vm, bills.get(vm.name), billing)}")
        parts.append(Text(lines, style="bold"))
        parts.append(_task_table(ran) if ran else Text(" nothing ran here to its end"))
    if void:
        parts.append(Text(f"\n{_count(void, 'VM')} more asked for and not started"))
    homeless = [task for task in tasks if task.vm is None or _never_started(task)]
    if homeless:
        parts.append(Text("\nNot on any VM"))
        parts.append(_task_table(homeless))
    parts.append(Text(f"\n{_cost_lines(spent, record)}"))
    if spent.usd:
        parts.append(_rule_table(spent))
    return Group(*parts)


def leftovers(survey: Survey) -> RenderableType:
    """What `schlouder gc` has found: machines, those without an owner first, and what they cost."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if survey.findings:
        parts.append(_machine_table(survey.findings))
    parts += [Text(f"Slurm node without a machine: {brief(node)}") for node in survey.nodes]
    doomed = survey.doomed
    if doomed:
        known = [f.cost.hourly for f in doomed if f.cost.hourly is not None]
        so_far = sum(f.cost.so_far or 0.0 for f in doomed)
        unknown = len(doomed) - len(known)
        priced = f"{_usd(sum(known))} an hour, {_usd(so_far)} so far" if known else "price unknown"
        more = f" (price unknown of {unknown})" if known and unknown else ""
        noun = "machine" if len(doomed) == 1 else "machines"
        parts.append(Text(f"To be deleted: {len(doomed)} {noun}, {priced}{more}"))
    elif not survey.nodes:
        parts.append(Text("Nothing to delete."))
    return Group(*parts)


def _machine_table(findings: Sequence[Finding]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("Machine", "Run", "Type", "Age"):
        table.add_column(heading, overflow="fold")
    for heading in ("USD/h", "USD"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Owner", overflow="fold", ratio=1)
    now = time.time()
    for finding in findings:
        machine, verdict = finding.machine, finding.verdict
        spot = " spot" if machine.instance.market == SPOT else ""
        state = "" if machine.instance.state == "running" else f"\n{machine.instance.state}"
        until = "" if verdict.until is None else f" until {_stamp(verdict.until)}"
        cells = (
            f"{machine.id}\n{machine.region}",
            machine.run,
            f"{machine.instance.type}{spot}{state}",
            _age(now - machine.launched),
            _price(finding.cost.hourly),
            _price(finding.cost.so_far),
            f"{verdict.status}{until}: {verdict.why}\n{machine.owner}",
        )
        # Text, because tags may hold rich's markup.
        table.add_row(*(Text("\n".join(map(brief, cell.split("\n")))) for cell in cells))
    return table


def _price(usd: float | None) -> str:
    return "unknown" if usd is None else f"{usd:.4f}"


def _age(seconds: float) -> str:
    minutes = int(max(0.0, seconds) // 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def as_text(renderable: RenderableType) -> str:
    """The renderable as plain text, as wide as the terminal, or NARROWEST columns."""
    from rich.console import Console

    console = Console(width=_width(), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


def _width() -> int:
    return max(NARROWEST, shutil.get_terminal_size((NARROWEST, 24)).columns)


def _run_line(run: RunRecord, vms: list[VMRecord], tasks: list[TaskRecord]) -> str:
    complete = sum(1 for task in tasks if task.state == "complete")
    end = run.ended or time.time()
    started = [vm for vm in vms if vm.instance_id is not None]
    uptime = sum((vm.ended or end) - (vm.taken or vm.requested) for vm in started)
    return (
        f"schlouder run {run.run} of {_stamp(run.started)}: {complete} of {len(tasks)} jobs complete "
        f"in {end - run.started:.0f} s, {_count(started, 'VM')}, {uptime:.0f} VM seconds"
    )


def _cost_lines(spent: Account, run: RunRecord) -> str:
    """The account: units, price, idle share, what spot machines have saved."""
    many = "" if spent.units == 1 else "s"
    parts = [f"Cost: {spent.units} unit{many} of {run.unit:g} s"]
    if spent.usd is not None:
        parts.append(f" = {_usd(spent.usd)}")
    elif spent.bills:
        parts.append(" at unknown prices")
    if spent.bills:
        parts.append(f"; nothing ran in {spent.idle:.0%} of the VMs' time")
    if spent.saving:
        normal = (spent.usd or 0.0) + spent.saving
        parts.append(f"\nSpot machines saved {_usd(spent.saving)} ({spent.saving / normal:.0%})")
    parts.append(f"\nPrices: {run.prices or 'unknown'}")
    parts.append("\nStorage, addresses and transfer are not in it.")
    return "".join(parts)


def _rule_table(spent: Account) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("Rule", "Cost", "Share"):
        table.add_column(heading, justify="left" if heading == "Rule" else "right")
    for rule, usd in sorted(spent.rules.items(), key=lambda item: (item[0] == IDLE, -item[1])):
        table.add_row(
            Text(one_line(rule)), _usd(usd), f"{usd / spent.usd:.0%}" if spent.usd else NOTHING
        )
    return table


def _usd(amount: float) -> str:
    """Cents where there are many, else as many digits as tell something."""
    return f"{amount:.2f} USD" if abs(amount) >= 10 else f"{amount:.4f} USD"


def _vm_lines(vm: VMRecord, bill: Bill | None, billing: Billing) -> str:
    """Name and boot; what it is, and what it cost; why it ended, if there is a reason, or how long it stays
    for another run."""
    boot = "never joined" if vm.ready is None else f"+ {vm.ready - vm.requested:.0f} seconds"
    if vm.taken is not None:
        boot = f"kept by an earlier run since {_clock(vm.taken)}"
    reason = f"\n {vm.reason}" if vm.reason else ""
    if vm.state == VMState.HANDED_OVER:
        reason += f"\n {_kept(vm, billing)}"
    state = "terminated" if vm.state == VMState.GONE else vm.state
    header = f"{vm.instance_id or 'not started'} - {vm.name} ({_clock(vm.requested)}) {boot}"
    gang = f", companion of {vm.leader}" if vm.leader else ""
    where = f" in {vm.zone}" if vm.zone else ""
    market = " spot" if vm.market == SPOT else ""
    cost = ""
    if bill is not None:
        cost = f", {bill.units} unit{'' if bill.units == 1 else 's'}"
        cost += f" = {_usd(bill.usd)}" if bill.usd is not None else ""
    return f"{header}\n [{vm.instance_type}{market}{where}, {state}{gang}{cost}]{reason}"


def _kept(vm: VMRecord, billing: Billing) -> str:
    usd = keeping_bill(vm, billing)
    cost = "" if usd is None else f"; if none takes it, that costs at most {_usd(usd)} more"
    return f"stays for the next run until {_clock(vm.kept_until)}{cost}"


def _task_table(tasks: list[TaskRecord]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    table.add_column("\nID", width=_ID_WIDTH)
    table.add_column("\nState", width=9)
    table.add_column("\nName", ratio=1, overflow="fold")
    table.add_column("\nSubmission", width=10)
    table.add_column("Duration\n(real / planned)", width=16)
    table.add_column("\nStart Date", width=10)
    table.add_column("End Date\n(real / planned)", width=19)
    remarks: list[RenderableType] = []
    for task in sorted(tasks, key=lambda task: (task.started or float("inf"), task.received)):
        table.add_row(
            task.jobid if len(task.jobid) <= _ID_WIDTH else f"{task.jobid[: _ID_WIDTH - 1]}…",
            task.state,
            Text(one_line(task.name)),
            _clock(task.received),
            f"{_seconds(_duration(task))} / {_seconds(task.planned)}",
            _clock(task.started),
            f"{_clock(task.ended)} / {_clock(_planned_end(task))}",
        )
        if task.reason and task.state != TaskState.CANCELLED:
            remarks.append(Text(plain(f"   {task.name}: {task.reason}")))
    return Group(table, *remarks)


def _never_started(task: TaskRecord) -> bool:
    return task.state == TaskState.CANCELLED and task.started is None


def _count(things: list[VMRecord], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _duration(task: TaskRecord) -> float | None:
    if task.started is None or task.ended is None:
        return None
    return task.ended - task.started


def _planned_end(task: TaskRecord) -> float | None:
    if task.started is None or task.planned is None:
        return None
    return task.started + task.planned


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f} s"


def _clock(moment: float | None) -> str:
    return NOTHING if moment is None else time.strftime("%H:%M:%S", time.localtime(moment))


def _stamp(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
