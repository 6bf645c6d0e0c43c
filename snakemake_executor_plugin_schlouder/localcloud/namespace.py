"""What Linux namespaces need beyond the standard library."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000


def only_child(pid: int, seconds: float = 5.0) -> int:
    """The child of an `unshare --fork` process: the first process of the new pid namespace."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = children.read_text().split()
        except OSError as error:
            raise ChildProcessError("unshare ended before it started its child") from error
        if found:
            return int(found[0])
        time.sleep(0.001)
    raise ChildProcessError("unshare started no child")


def in_network_of(pid: int, function: Callable[[], T]) -> T:
    """Calls `function` inside the network namespace of process `pid`.

    A thread of its own enters the namespace and ends with the call, so the caller never leaves its own.
    """

    def enter_and_call() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(namespace, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network of process {pid}")
        finally:
            os.close(namespace)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter_and_call).result()
