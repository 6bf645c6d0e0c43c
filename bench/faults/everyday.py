"""A cloud on a bad day: ten runs of the example workflow, each with dice and a strategy of its own.

Thirty percent of the pools have no capacity, calls are throttled in bursts, a tenth of the replies to
launches is lost, a twentieth of the VMs never joins, a fifth of the spot VMs is taken back.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.faults.kept import Kept
from bench.faults.trial import Outcome, Trial, clean_results, run
from bench.rows import Row
from snakemake_executor_plugin_schlouder.localcloud import (
    Faults,
    LocalCloudError,
    Reclaims,
    Throttle,
    check_machine,
)

HERE = Path("build/faults-cloud").resolve()
RULES = ("make_input", "decoys", "split", "search", "merge", "plot")
CHUNKS = 20
MAX_VMS = 12
TYPES = ("c5a.large", "c6a.large", "c5.large", "c6i.large", "m5a.large")
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
MARKETS = ("on-demand", "spot")
OUT_OF_CAPACITY = 0.3
LEFT = 3
"""How many VMs every other pool has."""

BOOT_SECONDS = (2.0, 5.0)
BOOT_TIMEOUT = 45
SPOT_PRICE_SECONDS = 60
USD_GOAL = 0.0001
"""A hundredth of a cent, for one VM and for all together."""

LEAST_STRUCK = 3
"""How often each kind of fault must have happened in all runs, for them to show anything."""


@dataclass(frozen=True)
class Day:
    """Units in seconds."""

    seed: int
    strategy: str
    spot: str = "prefer"
    unit: int = 1

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.strategy}"


DAYS = (
    Day(131, "one-vm-per-job"),
    Day(132, "fastest"),
    Day(133, "cheapest"),
    Day(134, "asap"),
    Day(135, "afap"),
    Day(136, "one-vm-per-job", "only", 60),
    Day(137, "fastest", "prefer", 60),
    Day(138, "all-par-exceed"),
    Day(139, "asap", "never"),
    Day(140, "one-vm-per-job"),
)


def faults(seed: int) -> Faults:
    pools = ["/".join(pool) for pool in product(TYPES, ZONES, MARKETS)]
    out = random.Random(seed).sample(pools, round(OUT_OF_CAPACITY * len(pools)))
    return Faults(
        seed=seed,
        capacity={pool: 0 if pool in out else LEFT for pool in pools},
        throttle=Throttle(share=1.0, period=20.0, seconds=4.0),
        lost_replies=0.1,
        never_join=0.05,
        reclaim=Reclaims(share=0.2, after=(3.0, 25.0), notice=10.0),
    )


def trial(day: Day) -> Trial:
    chosen = ", ".join(f"{rule}: {day.strategy}" for rule in RULES)
    return Trial(
        name=day.name,
        faults=faults(day.seed),
        options=[
            *("--schlouder-instance-types", ",".join(TYPES), "--schlouder-spot", day.spot),
            *("--schlouder-max-vms", str(MAX_VMS), "--schlouder-btu", str(day.unit)),
            *("--schlouder-boot-timeout", str(BOOT_TIMEOUT)),
            *("--config", f"chunks={CHUNKS}", f"strategies={{{chosen}}}"),
        ],
        boot_seconds=BOOT_SECONDS,
        unit=day.unit,
        spot_price_seconds=SPOT_PRICE_SECONDS,
    )


# -- the promises


def _complete(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    wrong = [f"{outcome.name}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    complete = len(outcomes) - len(wrong)
    return "; ".join([f"{complete}/{len(DAYS)}", *wrong]), complete == len(DAYS)


def _none(named: Callable[[Outcome], Sequence[str]]) -> Callable[..., tuple[str, bool]]:
    """That no run has left any of these."""

    def measure(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
        found = [f"{outcome.name}: {name}" for outcome in outcomes for name in named(outcome)]
        return "; ".join([str(len(found)), *found]), not found

    return measure


def _units(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    worst = max(outcome.worst_billed for outcome in outcomes)
    books, meter = (sum(o.billed_books for o in outcomes), sum(o.billed_meter for o in outcomes))
    return f"{worst:.0f} s (all: {books:.0f} s / {meter} s)", worst == 0 and books == meter


def _usd(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    worst = max(outcome.worst_usd for outcome in outcomes)
    books, meter = (sum(o.usd_books for o in outcomes), sum(o.usd_meter for o in outcomes))
    fits = max(worst, abs(books - meter)) <= USD_GOAL
    return f"{worst:.6f} (all: {books:.5f} / {meter:.5f})", fits


def _struck(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    def total(kind: str) -> int:
        return sum(outcome.struck.get(kind, 0) for outcome in outcomes)

    launches, calls = (sum(o.launches for o in outcomes), sum(o.calls for o in outcomes))
    vms, spot = (sum(o.vms for o in outcomes), sum(o.spot_vms for o in outcomes))
    value = (
        f"no capacity {total('capacity')} and replies lost {total('lost_replies')} of {launches} "
        f"RunInstances, throttled {total('throttle')} of {calls} calls, never joined {total('never_join')} "
        f"of {vms} VMs, taken back {total('reclaim')} of {spot} spot VMs"
    )
    return value, all(total(kind) >= LEAST_STRUCK for kind in STRUCK)


STRUCK = {
    "capacity": "no capacity",
    "throttle": "throttled",
    "lost_replies": "lost",
    "never_join": "never joined",
    "reclaim": "taken back",
}
PROMISES: Sequence[tuple[str, str, Callable[[Sequence[Outcome]], tuple[str, bool]]]] = (
    ("cloud: runs complete, results as without faults", f"{len(DAYS)}/{len(DAYS)}", _complete),
    ("cloud: VMs leaked", "0", _none(lambda outcome: outcome.leaked)),
    ("cloud: VMs launched twice", "0", _none(lambda outcome: outcome.twice)),
    ("cloud: instances the journal does not know", "0", _none(lambda outcome: outcome.unknown)),
    ("cloud: Slurm nodes left", "0", _none(lambda outcome: outcome.nodes)),
    ("cloud: books - meter, time billed, worst VM", "0 s, all equal", _units),
    ("cloud: books - meter, USD, worst VM", f"<= {USD_GOAL}", _usd),
    ("cloud: how often each fault struck", f">= {LEAST_STRUCK} each", _struck),
)


def rows() -> list[Row]:
    missing = _missing()
    if missing:
        return [Row(name, missing, goal, None) for name, goal, _ in PROMISES]
    outcomes = _outcomes(Kept(HERE / "kept"))
    _show(outcomes)
    return [Row(name, *_judged(measure(outcomes), goal)) for name, goal, measure in PROMISES]


def _judged(measured: tuple[str, bool], goal: str) -> tuple[str, str, bool]:
    value, holds = measured
    return value, goal, holds


def _missing() -> str:
    try:
        check_machine()
    except LocalCloudError as error:
        return str(error)
    searches = shutil.which("comet-ms") or shutil.which("comet")
    return "" if searches else "no comet-ms: apt install comet-ms"


def _outcomes(kept: Kept) -> list[Outcome]:
    """Of all days; runs that an interrupted command has left are not repeated. The directories of
    the runs, with their logs, stay."""
    found = []
    expected = None
    for day in DAYS:
        known = kept.get(day.name)
        if known is None:
            if expected is None:
                expected = clean_results(_new(HERE / "clean"))
            outcome = run(trial(day), _new(HERE / day.name), expected)
            kept.put(day.name, dataclasses.asdict(outcome))
        else:
            outcome = Outcome(**known)
        print(_line(outcome), flush=True)
        found.append(outcome)
    kept.forget()
    return found


def _new(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def _line(outcome: Outcome) -> str:
    return " | ".join(["faults: run", *_cells(outcome), outcome.wrong or "complete"])


def _cells(outcome: Outcome) -> list[str]:
    return [
        outcome.name,
        *(str(outcome.struck.get(kind, 0)) for kind in STRUCK),
        f"{outcome.seconds:.0f}",
        f"{outcome.vms} ({outcome.spot_vms})",
        f"{outcome.billed_books:.0f} / {outcome.billed_meter}",
        f"{outcome.usd_books:.5f} / {outcome.usd_meter:.5f}",
    ]


def _show(outcomes: Sequence[Outcome]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("run", *STRUCK.values(), "seconds", "VMs (spot)", "billed: books / meter, s", "USD")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    Console(width=150).print(table)
