"""The owner's words in a node's comment."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig import Rig

from snakemake_executor_plugin_schlouder.lease import Lease, parse
from snakemake_executor_plugin_schlouder.slurm.cli import NodeRecord, parse_records


@pytest.mark.parametrize("kept", [False, True])
def test_a_lease_is_read_as_it_was_written(kept: bool) -> None:
    lease = Lease("ab12cd34", 600, 1_763_870_000, kept)
    assert parse(lease.text) == lease
    assert lease.until == 1_763_870_600


def test_words_of_others_are_no_lease() -> None:
    assert parse("") is None
    assert parse("schlouder run=x lease=soon at=1") is None
    assert parse(f"schlouder run=x lease={'9' * 5000} at=1") is None
    assert parse(f"schlouder run=x lease=600 at={'9' * 5000}") is None


def test_leases_of_a_node_list() -> None:
    lease = Lease("r1", 600, 17)
    text = (
        "NodeName=a Arch=x86_64 CPUTot=2 State=IDLE+DYNAMIC_NORM "
        f"Partitions=schlouder Comment={lease.text}  \n"
        "NodeName=b Arch=x86_64 Comment=rack 3, row 5\n"
        "NodeName=c Arch=x86_64\n"
        f"NodeName=d State=DOWN+DRAIN+DYNAMIC_NORM+NOT_RESPONDING Weight=1 Comment={lease.text}\n"
        "NodeName=e State=IDLE+NOT_RESPONDING Comment= State=DOWN+NOT_RESPONDING\n"
        "NodeName=f State=DOWN+DRAIN Reason=DOWN+NOT_RESPONDING\n"
    )
    assert parse_records(text) == {
        "a": NodeRecord(lease),
        "b": NodeRecord(),
        "c": NodeRecord(),
        "d": NodeRecord(lease, is_lost=True),
        "e": NodeRecord(),
        "f": NodeRecord(),
    }


def test_the_broker_renews_the_leases_of_what_has_joined(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.give(seconds=1000)
    rig.run(50)
    first = rig.world.leases["schlouder-r1-1"]
    assert (first.run, first.seconds, first.kept) == ("r1", 600, False)
    rig.run(160)
    assert rig.world.leases["schlouder-r1-1"].written >= first.written + 150
