"""The life of instances: what moto keeps of them brought in step with real VMs, faults, and the meter.

Every method must be called with the EC2 lock held, except `report`, which takes it.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Protocol

from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.ec2.models.instances import StateReason

from snakemake_executor_plugin_schlouder.localcloud.authorization import REGION
from snakemake_executor_plugin_schlouder.localcloud.faults import SPOT, Fate, Faults, Injector
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import Event
from snakemake_executor_plugin_schlouder.localcloud.imds import (
    Credentials,
    Machine,
    interruption_notice,
)
from snakemake_executor_plugin_schlouder.localcloud.meter import (
    Billing,
    MeterEntry,
    Usage,
    metered,
)
from snakemake_executor_plugin_schlouder.localcloud.prices import SpotMarket

PENDING, RUNNING = ("pending", 0), ("running", 16)
SHUTTING_DOWN, TERMINATED = ("shutting-down", 32), ("terminated", 48)
ENDED = ("shutting-down", "terminated")
BILLED = ("pending", "running")


class Hypervisor(Protocol):
    """Every method returns at once: they are called while the EC2 lock is held."""

    def launch(self, machine: Machine) -> None: ...
    def terminate(self, instance_id: str) -> None: ...
    def console(self, instance_id: str) -> bytes: ...
    def notify(self, instance_id: str, notices: Mapping[str, bytes]) -> None: ...


class Cause(Enum):
    """Why an instance ended: StateReason's code and message, and StateTransitionReason.

    Codes: EC2 API reference, StateReason. StateTransitionReason has no documented form. As seen in published
    outputs of describe-instances: what the API or EC2 itself ended carries the time, to the second; what shut
    itself down does not ("User initiated"), so that its end can only be observed.
    """

    USER = (
        "Client.UserInitiatedShutdown",
        "User initiated shutdown",
        "User initiated ({time:%Y-%m-%d %H:%M:%S} GMT)",
    )
    ITSELF = ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown", "User initiated")
    RECLAIM = (
        "Server.SpotInstanceTermination",
        "Spot instance termination",
        "Service initiated ({time:%Y-%m-%d %H:%M:%S} GMT)",
    )
    FAILURE = ("Server.InternalError", "Internal error on launch", "Server.InternalError")


_CAUSES = {
    Event.TERMINATED: Cause.USER,
    Event.POWERED_OFF: Cause.ITSELF,
    Event.FAILED: Cause.FAILURE,
}


@dataclass
class Life:
    """What this cloud knows of one instance beyond moto's `instance`. Times: seconds since the epoch."""

    instance: Any
    market: str
    fate: Fate
    injector: Injector
    launched: int
    visible: float
    ended: int | None = None
    cause: Cause | None = None
    noticed: bool = False
    gone: bool = False
    stopped: bool = False

    @property
    def is_billed(self) -> bool:
        return self.ended is None

    def end(self, cause: Cause) -> None:
        """The meter stops; the first cause stays the cause."""
        if self.cause is None:
            self.cause, self.ended = cause, int(time.time())

    def explain(self) -> None:
        """Lets Describe tell why and when it ended; moto writes the same for every end."""
        assert self.cause is not None and self.ended is not None
        code, text, transition = self.cause.value
        self.instance.state_reason = StateReason(f"{code}: {text}", code)
        self.instance._reason = transition.format(time=datetime.fromtimestamp(self.ended, UTC))

    def usage(self) -> Usage:
        return Usage(
            instance_id=self.instance.id,
            instance_type=self.instance.instance_type,
            market=self.market,
            zone=self.instance.availability_zone,
            launched=self.launched,
            ended=self.ended,
            interrupted=self.cause is Cause.RECLAIM,
        )


@dataclass(frozen=True)
class VmCredentials:
    """Temporary credentials, and whose they are."""

    credentials: Credentials
    arn: str


@dataclass
class Instances:
    lock: threading.RLock
    spot_market: SpotMarket
    billing: Billing
    hypervisor: Hypervisor | None = None
    injector: Injector = field(default_factory=lambda: Injector(Faults(), time.time()))
    credentials: dict[str, VmCredentials] = field(default_factory=dict)
    _lives: dict[str, Life] = field(default_factory=dict)

    def inject(self, faults: Faults) -> None:
        """Replaces all faults; a reclaim that was drawn but not yet announced does not happen."""
        self.injector = Injector(faults, time.time())

    def begin(self, instances: Sequence[Any], market: str) -> None:
        """Takes over what moto has just created, and starts its VMs."""
        now = time.time()
        for instance in instances:
            # EC2 shows whole seconds.
            instance.launch_time = instance.launch_time.replace(microsecond=0)
            _set_state(instance, PENDING)
            if market == SPOT:
                instance.lifecycle = SPOT
                instance.spot_instance_request_id = f"sir-{secrets.token_hex(4)}"
            fate = self.injector.fate(market)
            visible = now + self.injector.faults.describe_lag
            launched = int(instance.launch_time.replace(tzinfo=UTC).timestamp())
            life = Life(instance, market, fate, self.injector, launched, visible)
            self._lives[instance.id] = life
            self._launch(life)

    def terminate(self, instance_ids: Sequence[str]) -> None:
        """For ids that moto has terminated just now. What has ended before keeps its state and its first
        cause, which moto has overwritten."""
        for instance_id in instance_ids:
            life = self._lives.get(instance_id)
            if life is None:
                continue
            if life.is_billed:
                self._end(life, Cause.USER)
            elif not life.stopped:
                _set_state(life.instance, TERMINATED if life.gone else SHUTTING_DOWN)
                life.explain()

    def reclaim(self, instance_id: str, notice: float) -> bool:
        """Announces that EC2 takes a spot VM back, `notice` seconds before it does; False for another
        instance.

        Notices are best effort, and the shortest is none (EC2 user guide, Spot Instance interruption
        notices).
        """
        life = self._lives.get(instance_id)
        if life is None or life.market != SPOT or not life.is_billed:
            return False
        if not life.noticed:
            life.noticed = True
            now = time.time()
            if notice > 0:
                times = (datetime.fromtimestamp(moment, UTC) for moment in (now, now + notice))
                self._hypervisor.notify(instance_id, interruption_notice(*times))
            self._later(notice, self._take_back, life)
        return True

    def report(self, instance_id: str, event: Event) -> None:
        """The hypervisor's news about an instance."""
        with self.lock:
            life = self._lives[instance_id]
            if event is Event.RUNNING:
                self._run(life)
            else:
                self._finish(life, event)

    def meter(self) -> list[MeterEntry]:
        """What every instance that ever was would be billed, in the order of their launches."""
        now = time.time()
        return [
            metered(life.usage(), now, self.billing, self.spot_market)
            for life in self._lives.values()
        ]

    def vcpus(self, market: str) -> int:
        """Of the instances that count against the quota of this market."""
        return sum(
            vcpus(life.instance.instance_type)
            for life in self._lives.values()
            if life.market == market and life.is_billed
        )

    @contextlib.contextmanager
    def as_described(self, nothing: bool = False) -> Iterator[None]:
        """Hides from moto what Describe does not show yet (EC2 API reference, Eventual consistency), or all
        with `nothing`."""
        now = time.time()
        reservations = backend().reservations
        late = {life.instance.id for life in self._lives.values() if nothing or life.visible > now}
        hidden = {
            name: reservation
            for name, reservation in reservations.items()
            if any(instance.id in late for instance in reservation.instances)
        }
        for name in hidden:
            del reservations[name]
        try:
            yield
        finally:
            reservations.update(hidden)

    def _launch(self, life: Life) -> None:
        instance = life.instance
        user_data = instance.user_data
        self._hypervisor.launch(
            Machine(
                instance_id=instance.id,
                instance_type=instance.instance_type,
                image_id=instance.image_id,
                address=instance.private_ip_address,
                launch_index=instance.ami_launch_index,
                zone=instance.availability_zone,
                user_data=None if user_data is None else base64.b64decode(str(user_data)),
                credentials=self._issue_credentials(instance.id),
                life_cycle=life.market,
                hangs=not life.fate.joins,
                clock_off=life.injector.faults.clock_off,
            )
        )

    def _issue_credentials(self, instance_id: str) -> Credentials | None:
        association = backend().iam_instance_profile_associations.get(instance_id)
        if association is None:
            return None
        credentials = Credentials(
            role=association.iam_instance_profile.roles[0].name,
            access_key="ASIA" + base64.b32encode(secrets.token_bytes(10)).decode(),
            secret_key=base64.b64encode(secrets.token_bytes(30)).decode(),
            token=base64.b64encode(secrets.token_bytes(180)).decode(),
        )
        role = f"assumed-role/{credentials.role}/{instance_id}"
        arn = f"arn:aws:sts::{DEFAULT_ACCOUNT_ID}:{role}"
        self.credentials[credentials.access_key] = VmCredentials(credentials, arn)
        return credentials

    def _run(self, life: Life) -> None:
        if life.instance.state != "pending":
            return
        _set_state(life.instance, RUNNING)
        if life.fate.reclaimed_after is not None:
            self._later(life.fate.reclaimed_after, self._reclaim_as_drawn, life)

    def _reclaim_as_drawn(self, life: Life) -> None:
        if life.injector is self.injector:
            self.reclaim(life.instance.id, life.injector.faults.reclaim.notice)

    def _take_back(self, life: Life) -> None:
        if life.is_billed:
            life.injector.struck["reclaim"] += 1
            self._end(life, Cause.RECLAIM)

    def _end(self, life: Life, cause: Cause) -> None:
        life.end(cause)
        _set_state(life.instance, SHUTTING_DOWN)
        life.explain()
        slow = self.injector.faults.slow_end
        if slow > 0:
            self._later(slow, self._switch_off, life)
        else:
            self._switch_off(life)

    def _switch_off(self, life: Life) -> None:
        self._hypervisor.terminate(life.instance.id)

    def _finish(self, life: Life, event: Event) -> None:
        """Brings an instance whose VM is gone to its final state, and frees its address."""
        instance = life.instance
        life.end(_CAUSES[event])
        life.gone = True
        stops = instance.instance_initiated_shutdown_behavior == "stop"
        if life.cause is Cause.ITSELF and stops:
            life.stopped = True
            instance.stop()
        else:
            instance.terminate()
            # moto frees it only when Python collects the instance, which the list of reservations prevents.
            address = instance.private_ip_address
            backend().get_subnet(instance.subnet_id).del_subnet_ip(address)
        life.explain()

    def _later(self, seconds: float, action: Any, life: Life) -> None:
        def act() -> None:
            with self.lock:
                action(life)

        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()

    @property
    def _hypervisor(self) -> Hypervisor:
        assert self.hypervisor is not None
        return self.hypervisor


def backend() -> Any:
    return ec2_backends[DEFAULT_ACCOUNT_ID][REGION]


def vcpus(instance_type: str) -> int:
    return int(INSTANCE_TYPES[instance_type]["VCpuInfo"]["DefaultVCpus"])


def _set_state(instance: Any, state: tuple[str, int]) -> None:
    instance._state.name, instance._state.code = state
