"""How tests reach into a running cloud: JSON over HTTP, below `/_schlouder/` of its endpoint.

`faults`: GET them, PUT others in their place. `struck`: GET how often each kind has happened since.
`meter`: GET. `service`: PUT {"name": "slurmctld", "action": "kill"}, see `Controller.act`. `vm`: PUT
{"instance_id": ..., "action": "cut"}, see `Hypervisor.act`, or with "command" instead of an action, which is
run in the VM. `reclaim`: PUT {"instance_id": ..., "notice": ...}. `calls`: GET the number of calls per
action by ordinary callers; PUT anything to begin at 0 again.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snakemake_executor_plugin_schlouder.localcloud.faults import Faults

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from snakemake_executor_plugin_schlouder.localcloud.controller import Controller
    from snakemake_executor_plugin_schlouder.localcloud.hypervisor import Hypervisor
    from snakemake_executor_plugin_schlouder.localcloud.instances import Instances

PREFIX = "/_schlouder/"


class ControlError(RuntimeError):
    """What the cloud says about an order that it cannot follow."""


@dataclass
class Control:
    """The side of the server; to be called with the EC2 lock held."""

    instances: Instances
    calls: Counter[str]
    controller: Controller | None = None
    hypervisor: Hypervisor | None = None

    def answer(self, method: str, path: str, body: bytes) -> Response:
        from snakemake_executor_plugin_schlouder.localcloud.answers import json_answer

        try:
            return json_answer(self._do(method, path.removeprefix(PREFIX), body))
        except (KeyError, TypeError, ValueError) as error:
            return json_answer({"error": f"{method} {path}: {error}"}, 400)

    def _do(self, method: str, name: str, body: bytes) -> Any:
        if (method, name) == ("GET", "faults"):
            return json.loads(self.instances.injector.faults.to_json())
        if (method, name) == ("PUT", "faults"):
            return self.instances.inject(Faults.from_json(body))
        if (method, name) == ("GET", "struck"):
            return dict(self.instances.injector.struck)
        if (method, name) == ("GET", "meter"):
            return [dataclasses.asdict(entry) for entry in self.instances.meter()]
        if (method, name) == ("GET", "calls"):
            return dict(self.calls)
        if (method, name) == ("PUT", "calls"):
            return self.calls.clear()
        if (method, name) == ("PUT", "reclaim"):
            order = json.loads(body)
            if not self.instances.reclaim(order["instance_id"], order["notice"]):
                raise ValueError(f"{order['instance_id']} is no spot instance that is alive")
            return None
        if (method, name) == ("PUT", "service"):
            assert self.controller is not None
            order = json.loads(body)
            return self.controller.act(order["name"], order["action"])
        if (method, name) == ("PUT", "vm"):
            return self._do_to_vm(json.loads(body))
        raise ValueError("there is no such order")

    def _do_to_vm(self, order: dict[str, Any]) -> str:
        assert self.hypervisor is not None
        if "command" in order:
            return self.hypervisor.run(order["instance_id"], order["command"])
        self.hypervisor.act(order["instance_id"], order["action"])
        return ""


def ask(endpoint: str, method: str, name: str, body: str = "") -> Any:
    """The side of the client; `endpoint` is a URL. Raises ControlError."""
    url = endpoint + PREFIX + name
    request = urllib.request.Request(url, body.encode() or None, method=method)
    # The endpoint is on this machine: no proxy knows the way.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ControlError(json.load(error)["error"]) from error
