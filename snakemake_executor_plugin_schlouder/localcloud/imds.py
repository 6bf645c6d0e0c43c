"""The instance metadata service of one VM (version 2 only: a session token is required)."""

from __future__ import annotations

import json
import secrets
import socket
import socketserver
import threading
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from snakemake_executor_plugin_schlouder.localcloud.namespace import in_network_of
from snakemake_executor_plugin_schlouder.localcloud.network import METADATA_ADDRESS

MAX_TOKEN_SECONDS = 21600


@dataclass(frozen=True)
class Credentials:
    """Temporary credentials of an instance's role."""

    role: str
    access_key: str
    secret_key: str
    token: str

    def document(self) -> str:
        """The JSON text that the metadata service gives out; it says six hours, as EC2 does."""
        now = datetime.now(UTC)
        return json.dumps(
            {
                "Code": "Success",
                "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                "Type": "AWS-HMAC",
                "AccessKeyId": self.access_key,
                "SecretAccessKey": self.secret_key,
                "Token": self.token,
                "Expiration": f"{now + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}",
            },
            indent=2,
        )


@dataclass(frozen=True)
class Machine:
    """What the metadata service and the hypervisor know of one instance."""

    instance_id: str
    instance_type: str
    image_id: str
    address: str
    launch_index: int
    zone: str
    user_data: bytes | None
    credentials: Credentials | None = None
    life_cycle: str = "on-demand"
    hangs: bool = False
    """It boots, but never gets as far as its user data."""

    clock_off: float = 0.0
    """Seconds that its clock is fast."""

    @property
    def hostname(self) -> str:
        return "ip-" + self.address.replace(".", "-")


def documents(machine: Machine) -> dict[str, bytes]:
    """Path below /latest/ → body."""
    texts = {
        "meta-data/instance-id": machine.instance_id,
        "meta-data/instance-type": machine.instance_type,
        "meta-data/ami-id": machine.image_id,
        "meta-data/ami-launch-index": str(machine.launch_index),
        "meta-data/local-ipv4": machine.address,
        "meta-data/local-hostname": machine.hostname,
        "meta-data/instance-life-cycle": machine.life_cycle,
        "meta-data/placement/availability-zone": machine.zone,
        "meta-data/placement/region": machine.zone[:-1],
    }
    if machine.credentials is not None:
        folder = "meta-data/iam/security-credentials/"
        texts[folder] = machine.credentials.role
        texts[folder + machine.credentials.role] = machine.credentials.document()
    bodies = {path: text.encode() for path, text in texts.items()}
    if machine.user_data is not None:
        bodies["user-data"] = machine.user_data
    return bodies


def interruption_notice(noticed: datetime, ends: datetime) -> dict[str, bytes]:
    """What a spot VM finds from `noticed` on; before, these paths do not exist.

    EC2 user guide, Spot Instance interruption notices and EC2 instance rebalance recommendations.
    """
    end = f"{ends:%Y-%m-%dT%H:%M:%SZ}"
    return {
        "meta-data/spot/instance-action": json.dumps({"action": "terminate", "time": end}).encode(),
        "meta-data/spot/termination-time": end.encode(),
        "meta-data/events/recommendations/rebalance": json.dumps(
            {"noticeTime": f"{noticed:%Y-%m-%dT%H:%M:%SZ}"}
        ).encode(),
    }


class MetadataServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves from this process on a socket that lives in the VM's network namespace.

    `notices` are documents that may appear while the VM runs.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, machine: Machine, pid: int, notices: dict[str, bytes]) -> None:
        super().__init__((METADATA_ADDRESS, 80), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = in_network_of(pid, _listen)
        self.documents: Mapping[str, bytes] = ChainMap(notices, documents(machine))
        self.tokens: set[str] = set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Must be called when the VM is gone: the socket keeps the VM's network namespace alive."""
        self.shutdown()
        self.server_close()


def _listen() -> socket.socket:
    return socket.create_server((METADATA_ADDRESS, 80))


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer
    timeout = 5

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token":
            self._answer(HTTPStatus.NOT_FOUND)
        elif not (seconds.isdecimal() and 1 <= int(seconds) <= MAX_TOKEN_SECONDS):
            self._answer(HTTPStatus.BAD_REQUEST)
        else:
            token = secrets.token_urlsafe(40)
            self.server.tokens.add(token)
            self._answer(HTTPStatus.OK, token.encode())

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            self._answer(HTTPStatus.UNAUTHORIZED)
            return
        body = self.server.documents.get(self.path.removeprefix("/latest/"))
        if body is None:
            self._answer(HTTPStatus.NOT_FOUND)
        else:
            self._answer(HTTPStatus.OK, body)

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """The console of a VM is not the place for its requests, nor is the daemon's log."""
