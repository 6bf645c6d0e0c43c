"""The dead-man's switch: what a VM does whose owner says nothing more. The script's functions in virtual
time, and VMs side by side on an embedded cloud."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from test_join_script import recorder, shell
from test_localcloud import SLEEP, Vms
from workflows import PATIENCE, vm_pids, wait_for

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.localcloud.network import host_link
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

STEPD = "slurmstepd: [1.batch]\0"

VIRTUAL = """
PROC={folder}/proc NODE_FILE={folder}/node
SCHLOUDER_FIRST_LEASE={first} SCHLOUDER_UNIT={unit}
sleep() {{ echo "$(($(uptime) + $1)).99 1.00" >"$PROC/uptime"; }}
has_job() {{ [ "$(uptime)" -ge {job[0]} ] && [ "$(uptime)" -lt {job[1]} ]; }}
shutdown() {{ echo "off at $(uptime)" >&2; exit; }}
ask_slurm() {{
    case $1 in
        show) awk -F '|' -v now="$(uptime)" '$1 <= now {{ t = $2 }} END {{ print "   " t }}' "{folder}/$3" ;;
        update) echo "$*" >&2; ! grep -q away "{folder}/n1" ;;
    esac
}}
watch_lease
"""


def machine(folder: Path, uptime: float = 0, first_process: int = 0) -> None:
    """A /proc of a machine that is up for so many seconds; its first process came after so many."""
    (folder / "proc" / "1").mkdir(parents=True)
    (folder / "proc" / "uptime").write_text(f"{uptime} 1.00\n")
    fields = " ".join(str(number) for number in range(4, 22))
    stat = f"1 (in it) 9) S {fields} {100 * first_process} 23 24\n"
    (folder / "proc" / "1" / "stat").write_text(stat)


def process(folder: Path, pid: int, name: str, command: str) -> None:
    made = folder / "proc" / str(pid)
    made.mkdir()
    (made / "comm").write_text(f"{name}\n")
    (made / "cmdline").write_text(command)


def renewed(at: int, seconds: int = 600) -> str:
    return f"Comment={Lease('r1', seconds, at).text}"


def off_at(
    folder: Path,
    comments: Mapping[int, str] | None = None,
    first: int = 1200,
    unit: int = 1,
    job: tuple[int, int] = (0, 0),
) -> float:
    """When a machine powers off that is up since 0 and whose node record says these things from then on;
    None: it never joined. `job`: from when till when one runs there."""
    machine(folder)
    if comments is not None:
        (folder / "node").write_text("n1\n")
        lines = [f"{since}|{text}\n" for since, text in comments.items()]
        (folder / "n1").write_text("".join(lines))
    told = shell(folder, VIRTUAL.format(folder=folder, first=first, unit=unit, job=job))
    found = re.search(r"off at (\d+)", told)
    assert found, told
    return float(found[1])


class TestWatch:
    """At most one look (30 s) and the pause after the drain (5 s) beyond the lease."""

    def test_a_machine_that_never_joins_goes_after_its_first_lease(self, tmp_path: Path) -> None:
        assert 1200 <= off_at(tmp_path) <= 1230

    def test_one_that_joined_and_heard_nothing_too(self, tmp_path: Path) -> None:
        assert 1200 <= off_at(tmp_path, {0: "State=IDLE"}) <= 1235

    def test_a_lease_holds_from_when_it_was_seen_to_change(self, tmp_path: Path) -> None:
        comments = {at: renewed(at) for at in range(100, 5000, 150)}
        last = max(comments)
        assert last + 600 <= off_at(tmp_path, comments) <= last + 30 + 600 + 35

    def test_what_the_owner_says_of_its_clock_does_not_matter(self, tmp_path: Path) -> None:
        comments = {at: renewed(1_800_000_000 - 7 * at) for at in range(100, 3000, 150)}
        last = max(comments)
        assert last + 600 <= off_at(tmp_path, comments) <= last + 30 + 600 + 35

    def test_a_lease_may_be_longer_or_shorter_than_the_last_one(self, tmp_path: Path) -> None:
        comments = {100: renewed(1), 300: f"{renewed(2, 7200)} kept"}
        assert 7500 <= off_at(tmp_path, comments) <= 7565

    def test_a_shorter_one_ends_sooner(self, tmp_path: Path) -> None:
        assert 160 <= off_at(tmp_path, {100: renewed(1, 60)}) <= 195

    @pytest.mark.parametrize(
        "comment",
        [
            "",
            "Comment=rack 3, row 5",
            "Comment=schlouder run=r1 lease=soon at=1",
            "Comment=schlouder run=r1 lease=99999 at=$(reboot)",
            "Comment=schlouder run=r1 lease=0600 at=1",
            "Comment=schlouder run=r1 lease=9999999999 at=1",
            "Comment=schlouder run=r1 lease=-1 at=1",
            "Comment=schlouder run=r1 lease=60+60 at=1",
            "Comment=schlouder run= lease=99999 at=1",
            "Comment=schlouder run=r1 lease=99999 at=1 for ever",
            "Reason=Comment=schlouder run=r1 lease=99999 at=1",
            "Comment=$(echo schlouder run=r1 lease=99999 at=1)",
        ],
    )
    def test_words_of_others_renew_nothing(self, tmp_path: Path, comment: str) -> None:
        assert 700 <= off_at(tmp_path, {100: renewed(1), 400: comment}) <= 765

    def test_a_job_may_end(self, tmp_path: Path) -> None:
        assert 3000 <= off_at(tmp_path, {100: renewed(1)}, job=(200, 3000)) <= 3035

    def test_a_job_that_came_with_the_drain_too(self, tmp_path: Path) -> None:
        assert 900 <= off_at(tmp_path, {0: renewed(1)}, job=(632, 900)) <= 935

    def test_a_lease_that_came_late_holds_all_the_same(self, tmp_path: Path) -> None:
        comments = {0: renewed(1), 1000: renewed(2)}
        assert 1600 <= off_at(tmp_path, comments, job=(200, 1100)) <= 1665

    def test_a_paid_hour_is_used_up_to_its_last_two_minutes(self, tmp_path: Path) -> None:
        assert 3480 <= off_at(tmp_path, {100: renewed(1)}, unit=3600) <= 3515

    def test_so_is_the_hour_in_which_a_job_ends(self, tmp_path: Path) -> None:
        comments = {100: renewed(1)}
        assert 7080 <= off_at(tmp_path, comments, unit=3600, job=(0, 3700)) <= 7115

    def test_a_lease_that_ends_at_the_end_of_an_hour_ends_with_it(self, tmp_path: Path) -> None:
        assert 3510 <= off_at(tmp_path, {0: renewed(1, 3510)}, unit=3600) <= 3595

    def test_without_slurm_it_goes_too(self, tmp_path: Path) -> None:
        assert 900 <= off_at(tmp_path, {0: renewed(1), 300: renewed(2), 400: "away"}) <= 965


@pytest.mark.parametrize(
    ("uptime", "first_process", "unit", "is_over"),
    [
        (10, 0, 1, True),
        (10, 0, 120, True),
        (10, 0, 3600, False),
        (3479.99, 0, 3600, False),
        (3480, 0, 3600, True),
        (3599, 0, 3600, True),
        (3601, 0, 3600, False),
        (7100, 0, 3600, True),
        (3500, 1000, 3600, False),
        (100_000 + 3500, 100_000, 3600, True),
        (190, 0, 300, True),
        (170, 0, 300, False),
    ],
)
def test_the_unit_is_counted_by_the_age_of_the_first_process(
    tmp_path: Path, uptime: float, first_process: int, unit: int, is_over: bool
) -> None:
    machine(tmp_path, uptime, first_process)
    ask = f"STEP=asking PROC={tmp_path}/proc SCHLOUDER_UNIT={unit}\nis_unit_over || exit 7"
    shell(tmp_path, ask, 0 if is_over else 7)


def test_a_job_is_known_by_its_slurmstepd(tmp_path: Path) -> None:
    machine(tmp_path)
    process(tmp_path, 12, "slurmd", "slurmd\0-Z\0")
    process(tmp_path, 13, "slurmstepd", "/usr/sbin/slurmstepd\0infinity\0")
    ask = f"STEP=asking PROC={tmp_path}/proc\nhas_job || exit 7"
    shell(tmp_path, ask, 7)
    process(tmp_path, 14, "slurmstepd", STEPD)
    shell(tmp_path, ask)


def test_the_watch_outlives_a_hangup(tmp_path: Path) -> None:
    machine(tmp_path)
    said = shell(
        tmp_path,
        f"PROC={tmp_path}/proc NODE_FILE={tmp_path}/node SCHLOUDER_FIRST_LEASE=9000 SCHLOUDER_UNIT=1\n"
        "sleep() { command sleep 0.1; }\nwatch_lease & watch=$!\ncommand sleep 0.5\nkill -HUP $watch\n"
        "command sleep 0.5\nkill -0 $watch && echo lives >&2\nkill $watch",
    )
    assert "lives" in said


def test_a_machine_that_is_booted_again_powers_off_and_one_of_its_image_does_not(
    tmp_path: Path,
) -> None:
    init = tmp_path / "cloud"
    install = f"CLOUD_INIT={init}\nend_at_reboot"
    shell(tmp_path, install)
    assert not init.exists(), "an image without cloud-init stays as it is"
    (init / "scripts" / "per-boot").mkdir(parents=True)
    (init / "instance").mkdir()
    shell(tmp_path, install)
    recorder(tmp_path / "shutdown", failures=0)
    (script,) = (init / "scripts" / "per-boot").iterdir()
    boot = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CONF": ""}
    subprocess.run([script], env=boot, check=True)
    assert (tmp_path / "shutdown.calls").read_text() == "|-h|now|\n"
    for left in (init / "instance").iterdir():
        left.unlink()
    subprocess.run([script], env=boot, check=True)
    assert (tmp_path / "shutdown.calls").read_text() == "|-h|now|\n"


# -- VMs

FIRST, SECONDS = 20, 8
"""Of the leases: until the owner is heard first, and after each of its words."""

UNIT = 160
"""Seconds of which a VM that is not needed stays 40."""


@dataclass
class Fleet:
    """VMs by name, whose owner renews the leases of some. `ended`: when they were first seen terminated, in
    seconds since `begun`; so are all times."""

    vms: Vms
    folder: Path
    begun: float = field(default_factory=time.monotonic)
    ids: dict[str, str] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    words: int = 0
    job_ended: float = 0.0

    @property
    def now(self) -> float:
        return time.monotonic() - self.begun

    def start(self, name: str, *, sabotage: str = "", unit: float = 1.0) -> None:
        text = self.vms.user_data(name, first_lease=FIRST, unit=unit)
        end = "\nSTEP='installing packages'\n"
        assert text.count(end) == 1
        self.ids[name] = self.vms.run(text.replace(end, f"\n{sabotage}{end}"))

    def joined(self) -> set[str]:
        return set(self.vms.slurm("sinfo", "-hN", "-tidle", "-o%N").split())

    def renew(self, *names: str) -> None:
        """In words that are new, and of a clock hours behind."""
        self.words += 1
        written = int(time.time()) - 5 * 3600 - 10 * self.words
        SlurmCommands("schlouder").renew(names, Lease("ab12cd34", SECONDS, written))
        self.heard |= dict.fromkeys(names, self.now)

    def look(self) -> None:
        for name, instance_id in self.ids.items():
            if name not in self.ended and self.vms.state(instance_id) == "terminated":
                self.ended[name] = self.now

    def keep(self, name: str, condition: Callable[[], bool]) -> None:
        """Renews one lease until that is so."""

        def goes_on() -> bool:
            self.renew(name)
            self.look()
            return condition()

        wait_for(goes_on, lambda: f"only {self.ended}: {self.told(*self.ids)}", 2 * PATIENCE)

    def told(self, *names: str) -> str:
        return "\n".join(self.vms.console(self.ids[name]) for name in names)


@pytest.fixture(scope="module")
def fleet(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The whole story, in which all VMs are up at a time."""
    fleet = Fleet(Vms(cloud), tmp_path_factory.mktemp("lease"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environment().items():
            patch.setenv(name, value)
        try:
            story(fleet)
            yield fleet
        finally:
            (fleet.folder / "go").touch()
            fleet.vms.terminate_all()


def story(fleet: Fleet) -> None:
    fleet.start("hung", sabotage="sleep 1000")
    for name in ("alone", "kept", "busy", "cut"):
        fleet.start(name)
    fleet.start("paid", unit=UNIT)
    fleet.ids["foreign"] = fleet.vms.run(SLEEP)
    named = {"alone", "kept", "busy", "cut", "paid"}
    wait_for(lambda: fleet.joined() >= named, lambda: fleet.told(*named))
    script = f"while [ ! -e {fleet.folder}/go ]; do sleep 0.2; done; echo done"
    fleet.vms.slurm(
        *("sbatch", "--nodelist=busy", f"-o{fleet.folder}/output", f"--chdir={fleet.folder}"),
        f"--wrap={script}",
    )
    wait_for(lambda: "busy" not in fleet.joined(), lambda: fleet.vms.slurm("squeue"))
    fleet.renew(*named)
    cut_off(fleet, "cut")
    fleet.keep("kept", lambda: fleet.now > fleet.heard["busy"] + 3 * SECONDS)
    fleet.job_ended = fleet.now
    (fleet.folder / "go").touch()
    fleet.keep("kept", lambda: fleet.ended.keys() >= {"hung", "alone", "busy", "cut", "paid"})


def cut_off(fleet: Fleet, name: str) -> None:
    """From the network."""
    address = IPv4Address(fleet.vms.describe(fleet.ids[name])["PrivateIpAddress"])
    subprocess.run(["ip", "link", "set", host_link(address), "down"], check=True)


def ended_itself(fleet: Fleet, name: str) -> bool:
    reason = fleet.vms.describe(fleet.ids[name])["StateReason"]["Code"]
    return bool(reason == "Client.InstanceInitiatedShutdown")


def watches(fleet: Fleet) -> list[list[str]]:
    """Standard input, output and error of all that runs user data on VMs of this cloud."""
    machines = {str(Path(f"/proc/{pid}/ns/pid").readlink()) for pid in vm_pids(fleet.vms.cloud)}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_script = b"/var/lib/cloud/user-data" in (process / "cmdline").read_bytes()
            if is_script and str((process / "ns" / "pid").readlink()) in machines:
                found.append([str((process / "fd" / number).readlink()) for number in "012"])
    return found


@pytest.mark.integration
class TestVms:
    def test_one_whose_owner_is_gone_ends_itself_after_its_lease(self, fleet: Fleet) -> None:
        assert fleet.ended["alone"] - fleet.heard["alone"] >= SECONDS
        assert ended_itself(fleet, "alone")
        assert fleet.vms.slurm("sinfo", "-hNn", "alone", "-o%E") == "schlouder: the lease is over"

    def test_one_whose_lease_is_renewed_stays_and_so_does_what_is_not_ours(
        self, fleet: Fleet
    ) -> None:
        assert set(fleet.ids) - set(fleet.ended) == {"kept", "foreign"}
        assert fleet.heard["kept"] > FIRST + SECONDS
        assert fleet.vms.state(fleet.ids["foreign"]) == "running"
        assert fleet.vms.slurm("sinfo", "-hNn", "kept", "-o%T") == "idle"

    def test_the_watch_holds_nothing_of_the_user_data_that_has_ended(self, fleet: Fleet) -> None:
        log = "/var/log/slurm/lease.log"
        # While it looks, it has a child of its own that reads or writes a pipe.
        wait_for(lambda: watches(fleet) == [["/dev/null", log, log]], lambda: str(watches(fleet)))

    def test_a_job_ends_before_its_machine_does(self, fleet: Fleet) -> None:
        assert fleet.ended["busy"] > fleet.job_ended > fleet.heard["busy"] + 3 * SECONDS
        assert (fleet.folder / "output").read_text() == "done\n"
        assert ended_itself(fleet, "busy")

    def test_one_without_slurm_ends_after_its_lease(self, fleet: Fleet) -> None:
        assert fleet.ended["cut"] - fleet.heard["cut"] >= SECONDS
        assert ended_itself(fleet, "cut")

    def test_a_paid_unit_is_used(self, fleet: Fleet) -> None:
        assert fleet.ended["paid"] >= UNIT - 120
        assert ended_itself(fleet, "paid")

    def test_one_that_never_gets_as_far_as_slurm_ends_after_the_first_lease(
        self, fleet: Fleet
    ) -> None:
        assert fleet.ended["hung"] >= FIRST
        assert ended_itself(fleet, "hung")
