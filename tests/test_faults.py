"""The rows of `make faults`: from what runs have left, without any run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.faults.everyday import DAYS, LEAST_STRUCK, PROMISES, STRUCK, faults, trial
from bench.faults.kept import Kept
from bench.faults.trial import Outcome

GOOD = Outcome(
    name="1-asap",
    wrong="",
    seconds=60.0,
    struck=dict.fromkeys(STRUCK, 1),
    launches=9,
    calls=50,
    vms=12,
    spot_vms=11,
    leaked=(),
    unknown=(),
    twice=(),
    nodes=(),
    billed_books=720.0,
    billed_meter=720,
    usd_books=0.005,
    usd_meter=0.005,
    worst_billed=0.0,
    worst_usd=0.0,
)


def falling_short(*outcomes: Outcome) -> list[str]:
    return [name for name, _, measure in PROMISES if not measure(outcomes)[1]]


def test_good_runs_keep_all_promises() -> None:
    assert falling_short(*[GOOD] * len(DAYS)) == []


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        ({"wrong": "exit code 1: oh"}, "cloud: runs complete, results as without faults"),
        ({"leaked": ["i-1"]}, "cloud: VMs leaked"),
        ({"twice": ["vm-1"]}, "cloud: VMs launched twice"),
        ({"unknown": ["i-1"]}, "cloud: instances the journal does not know"),
        ({"nodes": ["vm-1"]}, "cloud: Slurm nodes left"),
        ({"worst_billed": 1.0}, "cloud: books - meter, time billed, worst VM"),
        ({"billed_books": 721.0}, "cloud: books - meter, time billed, worst VM"),
        ({"worst_usd": 0.0002}, "cloud: books - meter, USD, worst VM"),
        ({"usd_books": 0.5}, "cloud: books - meter, USD, worst VM"),
    ],
)
def test_one_bad_run_is_enough(change: dict[str, object], promise: str) -> None:
    bad = replace(GOOD, **change)  # type: ignore[arg-type]
    assert falling_short(*[GOOD] * (len(DAYS) - 1), bad) == [promise]


def test_a_run_that_is_missing_is_not_complete() -> None:
    assert falling_short(*[GOOD] * (len(DAYS) - 1)) == [PROMISES[0][0]]


@pytest.mark.parametrize("kind", STRUCK)
def test_a_fault_that_hardly_struck_shows_nothing(kind: str) -> None:
    spared = replace(GOOD, struck={**GOOD.struck, kind: 0})
    seldom = [GOOD] * (LEAST_STRUCK - 1) + [spared] * (len(DAYS) - LEAST_STRUCK + 1)
    assert falling_short(*seldom) == ["cloud: how often each fault struck"]


def test_every_run_has_dice_of_its_own_and_three_pools_in_ten_without_capacity() -> None:
    documents = [trial(day).faults for day in DAYS]
    assert len({document.to_json() for document in documents}) == len(DAYS) == 10
    assert len({trial(day).name for day in DAYS}) == 10
    for document in documents:
        left = list(document.capacity.values())
        assert left.count(0) / len(left) == pytest.approx(0.3)
    assert faults(1) == faults(1)


def test_results_are_kept_until_all_is_done(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    assert kept.get("a") is None
    kept.put("a", {"seconds": 1.5})
    assert Kept(tmp_path / "kept").get("a") == {"seconds": 1.5}
    for path in (tmp_path / "kept").iterdir():
        path.rename(path.with_name("a.of-other-code.json"))
    assert kept.get("a") is None
    kept.forget()
    assert not (tmp_path / "kept").exists()
