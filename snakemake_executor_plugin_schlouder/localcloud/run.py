"""`schlouder local run`: one command in an embedded cloud of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from snakemake_executor_plugin_schlouder.localcloud import (
    LocalCloud,
    LocalCloudError,
    Options,
    invoking_user,
)


def run(options: Options, command: Sequence[str]) -> int:
    """Runs `command` as the invoking user; returns its exit code (128 + N when signal N ended it).

    The cloud is always taken down before this returns.
    """
    relay = _Relay()
    _handle_signals(relay)
    try:
        return _run(options, command, relay)
    finally:
        # A late Ctrl-C would otherwise replace the exit code while the interpreter ends.
        _handle_signals(signal.SIG_IGN)


def _run(options: Options, command: Sequence[str], relay: _Relay) -> int:
    with LocalCloud.up(options, attached=True) as cloud:
        if relay.received:
            return 128 + relay.received[0]
        relay.process = _start(command, cloud.environment())
        if relay.received:
            relay.process.send_signal(relay.received[0])
        code = relay.process.wait()
    return code if code >= 0 else 128 - code


def _handle_signals(handler: _Relay | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


class _Relay:
    """Passes signals on to the command. This process goes on: it still has to take the cloud down."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        if self.process is not None and not (number == signal.SIGINT and _in_foreground()):
            self.process.send_signal(number)


def _in_foreground() -> bool:
    """Whether a Ctrl-C of the terminal has reached the command already, as part of our process group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    user = invoking_user()
    # sudo may have reset PATH; what is installed beside this program is to be found.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    own = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "PATH": path}
    try:
        return subprocess.Popen(
            list(command),
            env={**os.environ, **own, **environment},
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
        )
    except OSError as error:
        raise LocalCloudError(f"cannot run {command[0]}: {error.strerror}") from error
