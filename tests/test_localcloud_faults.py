"""What the embedded cloud's dice decide, without a cloud."""

from __future__ import annotations

from typing import Any

import pytest

from snakemake_executor_plugin_schlouder.localcloud.faults import (
    ON_DEMAND,
    SPOT,
    Fate,
    FaultError,
    Faults,
    Injector,
    Reclaims,
    Throttle,
    best_zone,
    fulfilled,
)
from snakemake_executor_plugin_schlouder.localcloud.policy import PolicyError

POOL = ("c5.large", "us-east-1a", SPOT)
DOCUMENT = {"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}


def injector(**faults: Any) -> Injector:
    return Injector(Faults(**faults), now=1000.0)


class TestNone:
    def test_without_faults_nothing_happens(self) -> None:
        none = injector()
        assert not none.throttles("RunInstances", 1000.0)
        assert not none.loses_reply()
        assert none.fate(SPOT) == Fate()
        assert none.left(*POOL) is None
        assert not none.lacks("ec2", "RunInstances")
        assert none.policy is None and none.vm_policy is None


class TestCapacity:
    def test_an_instance_counts_in_every_pool_it_is_part_of(self) -> None:
        cloud = injector(capacity={"c5.*/*/spot": 3, "*/us-east-1a/*": 2})
        cloud.take(*POOL, 1)
        assert cloud.left(*POOL) == 1
        assert cloud.left("c5.large", "us-east-1b", SPOT) == 2
        assert cloud.left("m5.large", "us-east-1a", ON_DEMAND) == 1
        assert cloud.left("m5.large", "us-east-1b", ON_DEMAND) is None

    @pytest.mark.parametrize(
        ("left", "least", "most", "started"),
        [(None, 1, 5, 5), (9, 1, 5, 5), (3, 1, 5, 3), (3, 3, 5, 3), (3, 4, 5, 0), (0, 1, 1, 0)],
    )
    def test_as_many_start_as_can_but_none_below_the_minimum(
        self, left: int | None, least: int, most: int, started: int
    ) -> None:
        assert fulfilled(left, least, most) == started

    def test_a_zone_is_chosen_that_can_start_most(self) -> None:
        left = {"a": 1, "b": 4, "c": 4}
        assert best_zone(["a", "b", "c"], left.get, 1, 5) == ("b", 4)
        assert best_zone(["a", "b", "c"], left.get, 1, 1) == ("a", 1)
        assert best_zone(["a", "b", "c"], left.get, 5, 5) == ("a", 0)


class TestThrottle:
    def test_comes_in_bursts(self) -> None:
        cloud = injector(throttle=Throttle(share=1.0, period=10, seconds=3))
        answers = [cloud.throttles("DescribeInstances", 1000.0 + second) for second in range(20)]
        assert answers == ([True] * 3 + [False] * 7) * 2

    def test_hits_a_share_of_the_calls_named(self) -> None:
        throttle = Throttle(share=0.5, period=1, seconds=1, actions=("Run*",))
        cloud = injector(throttle=throttle)
        hits = sum(cloud.throttles("RunInstances", 1000.0) for _ in range(1000))
        assert 400 < hits < 600
        assert not any(cloud.throttles("DescribeInstances", 1000.0) for _ in range(100))


class TestFate:
    def test_only_spot_instances_are_reclaimed(self) -> None:
        cloud = injector(reclaim=Reclaims(share=1.0, after=(5.0, 9.0)))
        assert cloud.fate(ON_DEMAND) == Fate()
        moments = [cloud.fate(SPOT).reclaimed_after for _ in range(100)]
        assert all(moment is not None and 5 <= moment <= 9 for moment in moments)
        assert len(set(moments)) > 50

    def test_shares_are_kept(self) -> None:
        cloud = injector(never_join=0.05, reclaim=Reclaims(share=0.2), lost_replies=0.1)
        fates = [cloud.fate(SPOT) for _ in range(2000)]
        assert 60 < sum(not fate.joins for fate in fates) < 140
        assert 320 < sum(fate.reclaimed_after is not None for fate in fates) < 480
        assert 140 < sum(cloud.loses_reply() for _ in range(2000)) < 260

    def test_one_kind_of_fault_does_not_change_the_dice_of_another(self) -> None:
        faults: dict[str, Any] = {"never_join": 0.5, "lost_replies": 0.5, "seed": 7}
        alone, mixed = injector(**faults), injector(**faults)
        expected = [alone.fate(SPOT).joins for _ in range(50)]
        found = []
        for _ in range(50):
            mixed.loses_reply()
            found.append(mixed.fate(SPOT).joins)
        assert found == expected
        faults["seed"] = 8
        assert [injector(**faults).fate(SPOT).joins for _ in range(50)] != expected


class TestStruck:
    def test_what_has_happened_is_counted_by_its_kind(self) -> None:
        cloud = injector(throttle=Throttle(share=1.0, period=10, seconds=3), never_join=1.0)
        for second in range(10):
            cloud.throttles("DescribeInstances", 1000.0 + second)
        cloud.fate(SPOT)
        assert +cloud.struck == {"throttle": 3, "never_join": 1}

    def test_a_reclaim_is_not_counted_before_the_vm_is_taken(self) -> None:
        cloud = injector(reclaim=Reclaims(share=1.0))
        assert cloud.fate(SPOT).reclaimed_after is not None
        assert not +cloud.struck


class TestDocument:
    def test_survives_the_way_to_the_cloud(self) -> None:
        faults = Faults(
            seed=3,
            capacity={"*/*/spot": 0},
            throttle=Throttle(0.5, 10, 2, ("Run*",)),
            reclaim=Reclaims(0.2, (1.0, 2.0), 5.0),
            clock_off=-240.0,
            vcpu_quota={SPOT: 8},
            policy=DOCUMENT,
            missing=("DescribeInstanceTypes",),
        )
        assert Faults.from_json(faults.to_json()) == faults

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"lost_replies": 1.5}, "lost_replies is 1.5: allowed is a probability"),
            ({"throttle": Throttle(share=-1)}, "throttle.share is -1"),
            ({"throttle": Throttle(period=0)}, "throttle.period is 0"),
            ({"reclaim": Reclaims(after=(9, 3))}, r"reclaim.after is \(9, 3\)"),
            ({"clock_off": float("nan")}, "clock_off is nan: allowed is a number of seconds"),
            ({"describe_lag": float("inf")}, "describe_lag is inf"),
            ({"capacity": {"c5.large": 1}}, "'c5.large': allowed is type/zone/market"),
            ({"capacity": {"*/*/sopt": 1}}, "type/zone/market"),
            ({"capacity": {"*/*/spot": -1}}, "is -1: allowed is 0 or more"),
            ({"missing_code": "NoSuch"}, "allowed is InvalidAction or InvalidRequest"),
            ({"vcpu_quota": {"both": 1}}, "'both': allowed is on-demand or spot"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(FaultError, match=message):
            Faults(**fields)

    def test_a_policy_that_is_not_evaluated_in_full_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="NotAction is not evaluated"):
            Faults(policy={"Statement": {"Effect": "Allow", "NotAction": "x", "Resource": "*"}})

    def test_missing_actions_are_of_ec2_unless_they_say_otherwise(self) -> None:
        cloud = injector(missing=["*LaunchTemplate*", "pricing:*"])
        assert cloud.lacks("ec2", "CreateLaunchTemplate")
        assert not cloud.lacks("ssm", "CreateLaunchTemplate")
        assert cloud.lacks("pricing", "GetProducts")
        assert not cloud.lacks("ec2", "GetProducts")
