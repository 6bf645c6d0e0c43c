"""The bridge of an embedded cloud and the links of its VMs, made with iproute2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_network
from typing import Any

METADATA_ADDRESS = "169.254.169.254"


class NetworkError(RuntimeError):
    """iproute2 refused; the text is its own."""


@dataclass(frozen=True)
class Network:
    """The subnet of one embedded cloud; the host is its gateway."""

    cidr: IPv4Network

    @property
    def gateway(self) -> IPv4Address:
        return self.cidr.network_address + 1

    @property
    def bridge(self) -> str:
        """The bridge's name encodes the subnet: creating the bridge claims the subnet."""
        octets = str(self.cidr.network_address).split(".")
        return "schl-" + "-".join(octets[:3])


def claim(intent: Callable[[Network], None]) -> Network:
    """Takes a free /20 of 10.0.0.0/8 by creating its bridge.

    `intent` is called before a bridge is created, so that a crash in between leaves its name behind.
    """
    taken = list(_networks_in_use())
    for cidr in _candidates():
        if any(cidr.overlaps(other) for other in taken):
            continue
        network = Network(cidr)
        intent(network)
        if _create_bridge(network):
            return network
    raise NetworkError("no free /20 network is left in 10.0.0.0/8")


def delete_link(name: str) -> None:
    """Deletes a link; one that does not exist is no error."""
    _run(["ip", "link", "delete", name])


def switch_link(name: str, on: bool) -> None:
    done = _run(["ip", "link", "set", name, "up" if on else "down"])
    if done.returncode != 0:
        raise NetworkError(done.stderr.strip())


def connect(network: Network, address: IPv4Address, pid: int) -> str:
    """Joins the network namespace of process `pid` to the bridge; returns the host's end of the link."""
    link = host_link(address)
    _ip_batch(
        [],
        f"link add name {link} type veth peer name eth0 address {_mac(address)} netns {pid}",
        f"link set {link} master {network.bridge} up",
    )
    _ip_batch(
        ["nsenter", f"--net=/proc/{pid}/ns/net"],
        "link set lo up",
        f"address add {METADATA_ADDRESS}/32 dev lo",
        f"address add {address}/{network.cidr.prefixlen} dev eth0",
        "link set eth0 up",
        f"route add default via {network.gateway}",
        # Local addresses have priority 0 by default. As on EC2, where the metadata service is not a local
        # address, the VM may have rules of its own that bar users from it.
        "rule add priority 100 lookup local",
        "rule delete priority 0 lookup local",
    )
    return link


def host_link(address: IPv4Address) -> str:
    """Interface names are at most 15 bytes long and unique on the host, as the addresses are."""
    return f"schl{int(address):08x}"


def _mac(address: IPv4Address) -> str:
    """Depends on the IP address only, so that ARP caches stay right when a new VM takes an address over."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x53, *address.packed))


def _candidates() -> Iterator[IPv4Network]:
    """Networks that sites use least come first: the upper half of 10.0.0.0/8."""
    subnets = list(ip_network("10.0.0.0/8").subnets(new_prefix=20))
    half = len(subnets) // 2
    for subnet in [*subnets[half:], *subnets[:half]]:
        assert isinstance(subnet, IPv4Network)
        yield subnet


def _networks_in_use() -> Iterator[IPv4Network]:
    for route in _ip_json("route", "show", "table", "all"):
        yield from _parse([route["dst"]])
    for interface in _ip_json("address"):
        yield from _parse(
            f"{info['local']}/{info['prefixlen']}" for info in interface.get("addr_info", [])
        )


def _parse(texts: Iterable[str]) -> Iterator[IPv4Network]:
    for text in texts:
        if text == "default" or ":" in text:
            continue
        network = ip_network(text, strict=False)
        assert isinstance(network, IPv4Network)
        yield network


def _create_bridge(network: Network) -> bool:
    """False when the bridge exists: somebody else holds this subnet."""
    bridge = network.bridge
    # A bridge without an address of its own takes the one of a port, and changes it as VMs come and go.
    command = ["ip", "link", "add", "name", bridge, "address", _mac(network.gateway)]
    done = _run([*command, "type", "bridge"])
    if done.returncode != 0:
        if "File exists" in done.stderr:
            return False
        raise NetworkError(f"cannot create the bridge {bridge}: {done.stderr.strip()}")
    _ip_batch(
        [],
        f"address add {network.gateway}/{network.cidr.prefixlen} dev {bridge}",
        f"link set {bridge} up",
    )
    return True


def _ip_batch(prefix: list[str], *lines: str) -> None:
    done = _run([*prefix, "ip", "-batch", "-"], "\n".join(lines) + "\n")
    if done.returncode != 0:
        raise NetworkError(done.stderr.strip())


def _ip_json(*arguments: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(_run(["ip", "-j", *arguments]).stdout or "[]")
    return answer


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """In a session of its own, so that a Ctrl-C in the terminal does not stop a clean-up half way."""
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, start_new_session=True
    )
