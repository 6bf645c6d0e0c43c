"""Process 1 of a VM. Started by the hypervisor inside fresh pid, uts, ipc, mount and network namespaces.

It builds the VM's root over the host's, enters it, runs the user data as cloud-init does at first boot, and
then reaps orphans until SIGTERM powers the VM off. Standard library only: it runs with `python -I -S`.

The one argument is JSON: `scratch` (an empty directory of the host), `hostname`, `address`, `hidden`
(directories of which it has its own, empty at first), `shared` (directories that it sees as the host does),
`hangs` (whether it never gets as far as its user data), `clock_off` (seconds that its clock is fast, made so
by libfaketime at `clock_library`).
"""

import ctypes
import http.client
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import NoReturn

METADATA = "169.254.169.254"
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2
# Hidden from the VM, because they hold the host's state or secrets.
PRIVATE = {
    "run": 0o755,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
    "var/log": 0o755,
    "var/lib/munge": 0o711,
    "var/lib/slurm": 0o755,
    "var/lib/cloud": 0o755,
    "var/spool/slurmd": 0o755,
    "etc/slurm": 0o755,
    "etc/munge": 0o700,
}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
TIME_OF_DAY_ONLY = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
"""For libfaketime: other clocks, and the times of files, which the host tells, stay as they are."""

POWER_OFF = "#!/bin/sh\nkill -TERM 1\n"
USER_DATA = Path("/var/lib/cloud/user-data")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    config = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    os.umask(0o022)
    root = build_root(Path(config["scratch"]), Path("/"))
    make_machine_files(root, config["hostname"], config["address"])
    for directory in config["hidden"]:
        hide(root, directory)
    if config["clock_off"]:
        set_clock(root, config["clock_off"], config["clock_library"])
    # After the last write to the root: a write below a shared directory would reach the host.
    for directory in config["shared"]:
        share(root, directory)
    enter(root)
    libc.sethostname(config["hostname"].encode(), len(config["hostname"]))
    if config["hangs"]:
        print("Failed to start cloud-init: time-out; user data was not run", flush=True)
        reap(0)
    reap(run_user_data())


def reap(script: int) -> NoReturn:
    """Collects ended processes for ever; tells the console how the user data ended."""
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            signal.pause()
            continue
        if pid == script:
            print(f"user data ended with exit code {os.waitstatus_to_exitcode(status)}", flush=True)


def build_root(scratch: Path, lower: Path) -> Path:
    """The host's root file system with all changes kept in memory; they vanish with the mount namespace."""
    mount("tmpfs", scratch, "tmpfs", data="mode=755")
    for name in ("upper", "work", "root"):
        (scratch / name).mkdir()
    root = scratch / "root"
    layers = f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work"
    mount("overlay", root, "overlay", data=layers)
    for name, mode in PRIVATE.items():
        tmpfs(root / name, mode)
    mount("proc", root / "proc", "proc")
    mount("sysfs", root / "sys", "sysfs")
    build_dev(root / "dev")
    return root


def build_dev(dev: Path) -> None:
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=755")
    for name in DEVICES:
        (dev / name).touch()
        mount(f"/dev/{name}", dev / name, flags=MS_BIND)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID, "newinstance,ptmxmode=0666,mode=620,gid=5")
    (dev / "ptmx").symlink_to("pts/ptmx")
    tmpfs(dev / "shm", 0o1777)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (dev / name).symlink_to(f"/proc/self/fd/{number}")
    (dev / "fd").symlink_to("/proc/self/fd")


def make_machine_files(root: Path, hostname: str, address: str) -> None:
    for command in ("shutdown", "poweroff"):
        path = root / "usr/sbin" / command
        path.unlink(missing_ok=True)
        path.write_text(POWER_OFF)
        path.chmod(0o755)
    replace(root / "etc/hosts", f"127.0.0.1 localhost\n{address} {hostname}\n")
    # No name server is reachable. Without an entry a lookup fails at once instead of after a timeout.
    replace(root / "etc/resolv.conf", "")
    (root / "run/lock").mkdir()
    (root / "run/lock").chmod(0o1777)


def set_clock(root: Path, seconds: float, library: str) -> None:
    """For all programs that are started from now on: Linux has no namespace for the time of day."""
    replace(root / "etc/ld.so.preload", f"{library}\n")
    replace(root / "etc/faketimerc", f"{seconds:+.0f}\n")
    ENVIRONMENT.update(TIME_OF_DAY_ONLY)


def replace(path: Path, text: str) -> None:
    """Writes a file that may be a symbolic link to something outside the root."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def hide(root: Path, directory: str) -> None:
    status = Path(directory).stat()
    target = root / directory.lstrip("/")
    tmpfs(target, stat.S_IMODE(status.st_mode))
    os.chown(target, status.st_uid, status.st_gid)


def share(root: Path, directory: str) -> None:
    target = root / directory.lstrip("/")
    target.mkdir(parents=True, exist_ok=True)
    mount(directory, target, flags=MS_BIND | MS_REC)


def enter(root: Path) -> None:
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount the host's root")
    os.chdir("/")


def run_user_data() -> int:
    """Starts the user data in a session of its own; returns its pid, or 0 when there is none to run."""
    text = fetch_user_data()
    if not text.startswith(b"#!"):
        print("user data: none, or not a script", flush=True)
        return 0
    USER_DATA.write_bytes(text)
    USER_DATA.chmod(0o700)
    path = str(USER_DATA)
    nothing = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    return os.posix_spawn(path, [path], ENVIRONMENT, file_actions=[nothing], setsid=True)


def fetch_user_data() -> bytes:
    token = metadata("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    return metadata("GET", "/latest/user-data", {"X-aws-ec2-metadata-token": token.decode()})


def metadata(method: str, path: str, headers: dict[str, str]) -> bytes:
    """Waits for the network as long as it takes; an answer other than 200 counts as an empty one."""
    while True:
        connection = http.client.HTTPConnection(METADATA, timeout=5)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            return body if response.status == 200 else b""
        except OSError:
            time.sleep(0.005)
        finally:
            connection.close()


def tmpfs(path: Path, mode: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = (
        source.encode(),
        bytes(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )
    check(libc.mount(*arguments), f"mount {source} on {target}")


def check(result: int, action: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{action}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
