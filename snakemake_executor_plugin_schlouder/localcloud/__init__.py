"""The embedded cloud: EC2, its VMs and a Slurm controller on one Linux machine.

Whatever uses it sees only environment variables (`LocalCloud.environment`), as with a real cloud.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_schlouder.localcloud import control, network, vm_init
from snakemake_executor_plugin_schlouder.localcloud.faults import Faults, Reclaims, Throttle
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import clock_library
from snakemake_executor_plugin_schlouder.localcloud.meter import MeterEntry
from snakemake_executor_plugin_schlouder.localcloud.namespace import only_child

__all__ = [
    "Faults",
    "LocalCloud",
    "LocalCloudError",
    "MeterEntry",
    "Options",
    "Reclaims",
    "Throttle",
    "check_machine",
    "down",
    "invoking_user",
]

STATE_ROOT = Path("/run/schlouder-local")
STOP_SECONDS = 10.0
NEEDED = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "scontrol": "slurm-client",
    "curl": "curl",
}
DAEMON = [
    *(
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount",
        "--propagation",
        "slave",
        "--mount-proc",
    ),
    *(sys.executable, "-m", "snakemake_executor_plugin_schlouder.localcloud.daemon"),
]
MOTO = {
    "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
    "MOTO_ENABLE_AMI_VALIDATION": "true",
    "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "true",
}


class LocalCloudError(RuntimeError):
    """One line: what is missing or wrong, and what to do."""


@dataclass(frozen=True)
class Options:
    """`boot_seconds` is the range of the delay before a VM's init starts.

    `share` names directories that the VMs see at the same path as the host: without any, the current
    directory and the user's home. With `shared` false there are none, and the VMs see neither of these two,
    nor /tmp: of the host only what would be on a machine image, its software.
    Usage is billed in whole units of `billing_unit` seconds, and for `minimum_charge` seconds at least. Every
    spot price changes once in `spot_price_seconds`.
    """

    name: str = "default"
    boot_seconds: tuple[float, float] = (5.0, 5.0)
    share: Sequence[Path] = ()
    billing_unit: int = 1
    minimum_charge: int = 60
    spot_price_seconds: int = 3600
    shared: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]{1,20}", self.name):
            raise LocalCloudError(
                f"--name {self.name!r} is not allowed: use 1 to 20 of a-z, 0-9 and -"
            )
        low, high = self.boot_seconds
        if not 0 <= low <= high < float("inf"):
            raise LocalCloudError(
                f"--boot-seconds {low:g}-{high:g} is no range: give SECONDS or LOW-HIGH, such as 3-8"
            )
        for name in ("billing_unit", "minimum_charge", "spot_price_seconds"):
            seconds = getattr(self, name)
            if seconds < (0 if name == "minimum_charge" else 1):
                raise LocalCloudError(
                    f"{name} is {seconds}: give a whole number of seconds above 0"
                )
        if self.share and not self.shared:
            raise LocalCloudError("--share and --no-share exclude each other")
        for directory in self.share:
            if not directory.is_dir():
                raise LocalCloudError(f"--share {directory} is not a directory")
            if _is_private(directory.resolve()):
                raise LocalCloudError(
                    f"--share {directory} holds what every VM has of its own; share a directory below it"
                )

    @staticmethod
    def parse_seconds(text: str) -> tuple[float, float]:
        """`5` or `3-8` as a range."""
        low, _, high = text.partition("-")
        try:
            return float(low), float(high or low)
        except ValueError:
            raise LocalCloudError(
                f"--boot-seconds {text!r} is neither a number of seconds nor a range such as 3-8"
            ) from None


@dataclass
class LocalCloud:
    """A handle to a running embedded cloud, in this process or another."""

    name: str
    _facts: dict[str, Any]
    _daemon: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def up(cls, options: Options, *, attached: bool = False) -> LocalCloud:
        """Returns when the endpoint and slurmctld answer.

        With `attached` the cloud also ends when this process does, however that happens.
        """
        check_machine()
        folder = STATE_ROOT / options.name
        with _registry():
            _sweep()
            if folder.exists():
                raise LocalCloudError(
                    f"the embedded cloud {options.name!r} is already up: use it, "
                    f"or end it with: schlouder local down --name {options.name}"
                )
            folder.mkdir()
            # Readable for `status` and for the commands of `run`, whatever the umask is.
            folder.chmod(0o755)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
            os.fchmod(lock, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            daemon = _spawn(folder, lock)
        finally:
            os.close(lock)
        cloud = cls(options.name, {}, daemon)
        try:
            cloud._start(options, attached)
        except BaseException:
            cloud.down()
            raise
        return cloud

    @classmethod
    def find(cls, name: str) -> LocalCloud | None:
        """The running cloud of that name, or None."""
        folder = STATE_ROOT / name
        facts = _read_state(folder)
        if "environment" not in facts or not _is_alive(folder):
            return None
        return cls(name, facts)

    @classmethod
    def all(cls) -> list[LocalCloud]:
        """All running clouds of this machine."""
        found = (cls.find(folder.name) for folder in _folders())
        return [cloud for cloud in found if cloud is not None]

    @property
    def gateway(self) -> str:
        return str(self._facts["gateway"])

    @property
    def endpoint(self) -> str:
        return str(self._facts["endpoint"])

    @property
    def folder(self) -> Path:
        """State and logs."""
        return STATE_ROOT / self.name

    def environment(self) -> dict[str, str]:
        """All that a program needs to use this cloud; to be added to its environment."""
        proxied = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
        no_proxy = ",".join(filter(None, [proxied, self.gateway]))
        return {**self._facts["environment"], "NO_PROXY": no_proxy, "no_proxy": no_proxy}

    @property
    def subnets(self) -> dict[str, str]:
        """Availability zone → the subnet in it, the one used by default first."""
        return dict(self._facts["subnets"])

    def inject(self, faults: Faults) -> None:
        """From now on these faults happen, and no others; `Faults()` ends them all."""
        if faults.clock_off and clock_library() is None:
            raise LocalCloudError(
                f"Faults.clock_off is {faults.clock_off:g}: libfaketime is not installed; "
                "Debian and Ubuntu: apt install libfaketime"
            )
        control.ask(self.endpoint, "PUT", "faults", faults.to_json())

    def struck(self) -> Counter[str]:
        """How often each kind of fault has happened since they were injected, by its field of Faults.

        A launch of which only a part could start counts for capacity, a drawn reclaim when the VM is taken.
        """
        return Counter(control.ask(self.endpoint, "GET", "struck"))

    def meter(self) -> list[MeterEntry]:
        """What the provider bills, up to now, for every instance that ever was."""
        entries = control.ask(self.endpoint, "GET", "meter")
        return [MeterEntry(**entry) for entry in entries]

    def reclaim(self, instance_id: str, notice: float = 120.0) -> None:
        """Takes a spot instance back as EC2 does, `notice` seconds after a notice in its metadata service."""
        order = {"instance_id": instance_id, "notice": notice}
        control.ask(self.endpoint, "PUT", "reclaim", json.dumps(order))

    def service(self, name: str, action: str) -> None:
        """`kill`s or `end`s munged or slurmctld, `start`s it again, or `stop`s it, so that it does not
        answer, and lets it `continue`."""
        control.ask(self.endpoint, "PUT", "service", json.dumps({"name": name, "action": action}))

    def vm(self, instance_id: str, action: str) -> None:
        """`crash`es a VM, `cut`s it off the network, or `reconnect`s it."""
        order = {"instance_id": instance_id, "action": action}
        control.ask(self.endpoint, "PUT", "vm", json.dumps(order))

    def run_in_vm(self, instance_id: str, *command: str) -> str:
        """What a short command says as root in a VM, errors included."""
        order = {"instance_id": instance_id, "command": command}
        return str(control.ask(self.endpoint, "PUT", "vm", json.dumps(order)))

    def calls(self, *, reset: bool = False) -> Counter[str]:
        """How often ordinary callers (not VMs) have called each action, such as ec2:RunInstances, refused
        calls included; with `reset` the count begins at 0 again."""
        counted = Counter(control.ask(self.endpoint, "GET", "calls"))
        if reset:
            control.ask(self.endpoint, "PUT", "calls", "{}")
        return counted

    def down(self) -> None:
        """Ends everything the cloud runs and removes what it left. Nothing happens when it is not up."""
        _stop(self.folder)
        if self._daemon is not None:
            for pipe in (self._daemon.stdin, self._daemon.stdout):
                if pipe is not None:
                    pipe.close()
            self._daemon.wait()
        with _registry():
            _sweep()

    def __enter__(self) -> LocalCloud:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.down()

    def _start(self, options: Options, attached: bool) -> None:
        """Hands the daemon its orders and waits for its answer."""
        daemon = self._daemon
        assert daemon is not None and daemon.stdin is not None and daemon.stdout is not None
        orders = {
            "state": str(self.folder),
            "host_pid": only_child(daemon.pid),
            "uid": invoking_user().pw_uid,
            "hidden": [] if options.shared else [str(path) for path in _own()],
            "shared": [str(path) for path in _shared(options)],
            "boot_seconds": list(options.boot_seconds),
            "billing_unit": options.billing_unit,
            "minimum_charge": options.minimum_charge,
            "spot_price_seconds": options.spot_price_seconds,
            "attached": attached,
        }
        daemon.stdin.write(json.dumps(orders).encode() + b"\n")
        daemon.stdin.flush()
        if not attached:
            daemon.stdin.close()
        answer = json.loads(daemon.stdout.readline() or "{}")
        if not answer.get("ready"):
            raise LocalCloudError(
                "the embedded cloud did not start: " + answer.get("error", "its daemon ended early")
            )
        self._facts = _read_state(self.folder)


def check_machine() -> None:
    """Raises LocalCloudError when this machine cannot run an embedded cloud; changes nothing."""
    if not sys.platform.startswith("linux"):
        raise LocalCloudError("schlouder local needs Linux")
    check_root()
    missing = {tool: package for tool, package in NEEDED.items() if shutil.which(tool) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise LocalCloudError(
            f"schlouder local needs {', '.join(missing)}; on Debian: apt install {packages}"
        )
    if importlib.util.find_spec("moto") is None:
        raise LocalCloudError(
            "schlouder local needs moto; pip install 'snakemake-executor-plugin-schlouder[local]'"
        )


def check_root() -> None:
    if os.geteuid() != 0:
        raise LocalCloudError(
            "schlouder local needs root to make network namespaces; run it with sudo"
        )


def invoking_user() -> pwd.struct_passwd:
    """Who is Slurm's administrator, and whom `run` runs commands as: the user behind sudo."""
    uid = os.environ.get("SUDO_UID", "")
    return pwd.getpwuid(int(uid) if uid.isdecimal() else os.getuid())


def down(name: str | None) -> list[str]:
    """Ends the cloud of that name, or all of them with None, in whatever state it is; returns their names.

    Removes what any cloud whose daemon was killed has left, too.
    """
    check_root()
    chosen = [folder for folder in _folders() if name in (None, folder.name)]
    for folder in chosen:
        _stop(folder)
    with _registry():
        _sweep()
    return [folder.name for folder in chosen]


def _spawn(folder: Path, lock: int) -> subprocess.Popen[bytes]:
    """The daemon inherits the locked file: the lock is held exactly as long as it, or its parent, lives."""
    package_root = Path(__file__).resolve().parents[2]
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    search = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "daemon.log").open("ab") as log:
        os.fchmod(log.fileno(), 0o644)
        return subprocess.Popen(
            DAEMON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env={**inherited, **MOTO, "PYTHONPATH": os.pathsep.join(search), "NO_PROXY": "*"},
            pass_fds=[lock],
            start_new_session=True,
        )


def _stop(folder: Path) -> None:
    """Ends the daemon of a cloud, gently at first; returns when the lock is free."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # As long as the lock is held, the pid is the daemon's: it is not reused while the daemon lives.
        pid = _read_state(folder).get("host_pid")
        if pid is not None and _is_alive(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + STOP_SECONDS
        while _is_alive(folder) and time.monotonic() < end:
            time.sleep(0.02)
    if _is_alive(folder):
        raise LocalCloudError(
            f"the embedded cloud {folder.name!r} does not end; see {folder}/daemon.log"
        )


def _shared(options: Options) -> list[Path]:
    """Directories to bind into every VM, the outer ones first.

    They are resolved, because a symbolic link on the way would lead out of a VM's root while that is built.
    """
    chosen = list(options.share)
    if not chosen and options.shared:
        chosen = _own()
    hidden = [] if options.shared else _own()
    software = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[1])
    chosen += [path for path in software if _is_hidden(path, hidden)]
    return sorted({path.resolve() for path in chosen})


def _own() -> list[Path]:
    """The current directory and the user's home, the outer one first."""
    own = {path.resolve() for path in (Path.cwd(), Path(invoking_user().pw_dir)) if path.is_dir()}
    return sorted(path for path in own if not _is_private(path))


def _is_private(directory: Path) -> bool:
    """Whether a directory that every VM has of its own lies at or below this one."""
    own = {Path("/") / name for name in vm_init.PRIVATE if "tmp" not in name}
    own |= {Path("/proc"), Path("/sys"), Path("/dev"), Path("/etc"), Path("/usr/sbin")}
    return any(path.is_relative_to(directory) for path in own)


def _is_hidden(path: Path, hidden: Sequence[Path]) -> bool:
    """Whether a VM would not see this path of the host: another file system, or below a private directory or
    one of the `hidden`."""
    own = [*(Path("/") / name for name in vm_init.PRIVATE), *hidden]
    above = [path, *path.parents][:-1]
    return any(os.path.ismount(parent) or parent in own for parent in above)


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    """Holds the lock under which clouds appear and disappear; removes the registry when it is empty."""
    directory = -1
    while directory < 0:
        STATE_ROOT.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            directory = _lock_directory()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            STATE_ROOT.rmdir()
        os.close(directory)


def _lock_directory() -> int:
    """The locked registry, or -1 when it was removed while this process waited for the lock."""
    directory = os.open(STATE_ROOT, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        if os.path.samestat(os.fstat(directory), STATE_ROOT.stat()):
            os.fchmod(directory, 0o755)
            return directory
    except FileNotFoundError:
        pass
    os.close(directory)
    return -1


def _sweep() -> list[str]:
    """To be called with the registry locked."""
    dead = [folder for folder in _folders() if not _is_alive(folder)]
    bridges = {_read_state(folder).get("bridge") for folder in _folders() if folder not in dead}
    for folder in dead:
        bridge = _read_state(folder).get("bridge")
        if bridge is not None and bridge not in bridges:
            network.delete_link(bridge)
        shutil.rmtree(folder)
    return [folder.name for folder in dead]


def _folders() -> list[Path]:
    return sorted(STATE_ROOT.iterdir()) if STATE_ROOT.is_dir() else []


def _is_alive(folder: Path) -> bool:
    """Whether the lock of a cloud is held; a pid would say nothing."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return facts
