"""The EC2, SSM and IAM endpoint: moto's server, and around it the EC2 behaviour that moto lacks.

moto answers every call. This module adds the life of an instance (pending, running, shutting-down,
terminated, in step with a real VM), ClientToken, and the console output.
"""

from __future__ import annotations

import base64
import io
import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import StateReason
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from snakemake_executor_plugin_schlouder.localcloud import signature
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import Event
from snakemake_executor_plugin_schlouder.localcloud.imds import Credentials, Machine

log = logging.getLogger(__name__)

REGION = "us-east-1"
PENDING, RUNNING, SHUTTING_DOWN = ("pending", 0), ("running", 16), ("shutting-down", 32)
ENDED = ("shutting-down", "terminated")
WITHOUT_VM = ("stopped", "terminated")
# A VM's disk is memory and ends with it, as an instance store does; EC2 refuses these for such instances too.
UNSUPPORTED = {"StopInstances", "StartInstances", "RebootInstances"}

Environ = dict[str, Any]
Parameters = dict[str, str]


class Hypervisor(Protocol):
    """Every method returns at once: they are called while the EC2 lock is held."""

    def launch(self, machine: Machine) -> None: ...
    def terminate(self, instance_id: str) -> None: ...
    def console(self, instance_id: str) -> bytes: ...


@dataclass(frozen=True)
class Launch:
    """A RunInstances call that succeeded under a ClientToken."""

    parameters: Parameters
    answer: bytes
    instances: list[Any]


@dataclass
class Endpoint:
    """A WSGI application. EC2 requests are served one at a time, because moto's EC2 state has no lock."""

    hypervisor: Hypervisor | None = None
    default_subnet: str = ""
    _moto: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _launches: dict[str, Launch] = field(default_factory=dict)
    _credentials: dict[str, Credentials] = field(default_factory=dict)

    def serve(self, address: str) -> int:
        """Serves on a free port of `address` from now on; returns the port."""
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = make_server(address, 0, self, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=server.serve_forever, name="endpoint", daemon=True).start()
        return int(server.port)

    def report(self, instance_id: str, event: Event) -> None:
        """The hypervisor's news about an instance."""
        with self._lock:
            instance = _backend().get_instance(instance_id)
            if event is not Event.RUNNING:
                _end(instance, event)
            elif instance.state == "pending":
                _set_state(instance, RUNNING)

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            answer = self._answer(environ, body)
        except Exception:
            log.exception("request failed")
            answer = _error("InternalError", "An internal error has occurred", 500)
        return answer(environ, start_response)  # type: ignore[no-any-return]

    def _answer(self, environ: Environ, body: bytes) -> Response:
        authorization = signature.Authorization.parse(environ.get("HTTP_AUTHORIZATION", ""))
        if authorization is None:
            return self._forward(environ, body)
        if not self._is_authentic(environ, body, authorization):
            return Response('{"__type":"InvalidSignatureException"}', 400)
        if authorization.service != "ec2":
            return self._forward(environ, body)
        parameters = dict(parse_qsl(body.decode(), keep_blank_values=True))
        with self._lock:
            if authorization.region != REGION:
                return _error("UnsupportedOperation", f"The only region here is {REGION}.")
            return self._ec2(environ, parameters)

    def _is_authentic(
        self, environ: Environ, body: bytes, authorization: signature.Authorization
    ) -> bool:
        """Only temporary credentials (ASIA...) are looked at; they are a VM's."""
        if not authorization.access_key.startswith("ASIA"):
            return True
        credentials = self._credentials.get(authorization.access_key)
        if credentials is None:
            return False
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith(("HTTP_", "CONTENT_"))
        }
        request = signature.SignedRequest(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ.get("QUERY_STRING", ""),
            headers,
            body,
        )
        return signature.is_valid(request, authorization, credentials.secret_key, credentials.token)

    def _ec2(self, environ: Environ, parameters: Parameters) -> Response:
        action = parameters.get("Action", "")
        if action in UNSUPPORTED:
            return _error("UnsupportedOperation", f"{action} does not work on these instances.")
        handlers: dict[str, Callable[[Environ, Parameters], Response]] = {
            "RunInstances": self._run_instances,
            "TerminateInstances": self._terminate_instances,
            "GetConsoleOutput": self._console_output,
        }
        handler = handlers.get(action, self._forward_parameters)
        return handler(environ, parameters)

    def _run_instances(self, environ: Environ, parameters: Parameters) -> Response:
        token = parameters.get("ClientToken", "")
        if token in self._launches:
            return _replay(self._launches[token], parameters)
        backend = _backend()
        before = set(backend.reservations)
        answer = self._forward_parameters(environ, self._complete(parameters))
        created = [backend.reservations[name] for name in backend.reservations.keys() - before]
        if answer.status_code != 200:
            # moto registers the reservation before it looks at the subnet.
            for reservation in created:
                del backend.reservations[reservation.id]
            return _as_ec2_says(answer)
        instances = [instance for reservation in created for instance in reservation.instances]
        self._give_profile(instances, parameters)
        for instance in instances:
            _set_state(instance, PENDING)
            self._launch(instance)
        if token:
            self._launches[token] = Launch(parameters, answer.get_data(), instances)
        return answer

    def _complete(self, parameters: Parameters) -> Parameters:
        """moto starts MinCount instances; EC2 starts MaxCount when it can."""
        completed = {**parameters, "MinCount": parameters.get("MaxCount", "1")}
        if not any(name.endswith("SubnetId") for name in parameters):
            completed["SubnetId"] = self.default_subnet
        return completed

    def _give_profile(self, instances: list[Any], parameters: Parameters) -> None:
        """moto gives the instance profile to the first instance only."""
        name, arn = (parameters.get(f"IamInstanceProfile.{key}") for key in ("Name", "Arn"))
        if name or arn:
            for instance in instances[1:]:
                _backend().associate_iam_instance_profile(instance.id, name, arn)

    def _launch(self, instance: Any) -> None:
        assert self.hypervisor is not None
        user_data = instance.user_data
        self.hypervisor.launch(
            Machine(
                instance_id=instance.id,
                instance_type=instance.instance_type,
                image_id=instance.image_id,
                address=instance.private_ip_address,
                launch_index=instance.ami_launch_index,
                zone=instance.availability_zone,
                user_data=None if user_data is None else base64.b64decode(str(user_data)),
                credentials=self._issue_credentials(instance.id),
            )
        )

    def _issue_credentials(self, instance_id: str) -> Credentials | None:
        association = _backend().iam_instance_profile_associations.get(instance_id)
        if association is None:
            return None
        credentials = Credentials(
            role=association.iam_instance_profile.roles[0].name,
            access_key="ASIA" + base64.b32encode(secrets.token_bytes(10)).decode(),
            secret_key=base64.b64encode(secrets.token_bytes(30)).decode(),
            token=base64.b64encode(secrets.token_bytes(180)).decode(),
        )
        self._credentials[credentials.access_key] = credentials
        return credentials

    def _terminate_instances(self, environ: Environ, parameters: Parameters) -> Response:
        alive = {i.id: i for i in _backend().all_instances() if i.state not in WITHOUT_VM}
        answer = self._forward_parameters(environ, parameters)
        if answer.status_code == 200:
            for name, instance_id in parameters.items():
                if name.startswith("InstanceId.") and instance_id in alive:
                    _set_state(alive[instance_id], SHUTTING_DOWN)
                    assert self.hypervisor is not None
                    self.hypervisor.terminate(instance_id)
        return answer

    def _console_output(self, environ: Environ, parameters: Parameters) -> Response:
        instance_id = parameters.get("InstanceId", "")
        if _backend().get_instance_by_id(instance_id) is None:
            return self._forward_parameters(environ, parameters)
        assert self.hypervisor is not None
        output = base64.b64encode(self.hypervisor.console(instance_id)).decode()
        return _xml(
            "<GetConsoleOutputResponse xmlns='http://ec2.amazonaws.com/doc/2016-11-15/'>"
            f"<requestId>{secrets.token_hex(16)}</requestId><instanceId>{instance_id}</instanceId>"
            f"<timestamp>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}</timestamp>"
            f"<output>{output}</output></GetConsoleOutputResponse>"
        )

    def _forward_parameters(self, environ: Environ, parameters: Parameters) -> Response:
        return self._forward(environ, urlencode(parameters).encode())

    def _forward(self, environ: Environ, body: bytes) -> Response:
        inner = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return Response.from_app(self._moto, inner, buffered=True)


def _backend() -> Any:
    return ec2_backends[DEFAULT_ACCOUNT_ID][REGION]


def _replay(launch: Launch, parameters: Parameters) -> Response:
    if parameters != launch.parameters:
        return _error(
            "IdempotentParameterMismatch",
            "Arguments on this idempotent request are inconsistent with arguments used in previous requests.",
        )
    if all(instance.state in ENDED for instance in launch.instances):
        return _error(
            "IdempotentInstanceTerminated",
            "Request resulted in a terminated instance, please use a different ClientToken.",
        )
    return _xml(launch.answer.decode())


def _as_ec2_says(refusal: Response) -> Response:
    """moto passes on IAM's own code for an instance profile that does not exist."""
    if b"<Code>NoSuchEntity</Code>" not in refusal.get_data():
        return refusal
    return _error("InvalidParameterValue", "Invalid IAM Instance Profile name or ARN")


def _set_state(instance: Any, state: tuple[str, int]) -> None:
    instance._state.name, instance._state.code = state


def _end(instance: Any, event: Event) -> None:
    """Brings an instance whose VM is gone to its final state, and frees its address."""
    behavior = instance.instance_initiated_shutdown_behavior
    if event is Event.POWERED_OFF and behavior == "stop":
        instance.stop()
    else:
        instance.terminate()
        # moto frees it only when Python collects the instance, which the list of reservations prevents.
        _backend().get_subnet(instance.subnet_id).del_subnet_ip(instance.private_ip_address)
    if event is Event.POWERED_OFF:
        code, text = "Client.InstanceInitiatedShutdown", "Instance initiated shutdown"
    elif event is Event.FAILED:
        code, text = "Server.InternalError", "Internal error on launch"
    else:
        return
    instance.state_reason = StateReason(f"{code}: {text}", code)


def _error(code: str, message: str, status: int = 400) -> Response:
    return _xml(
        f"<Response><Errors><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error></Errors>"
        f"<RequestID>{secrets.token_hex(16)}</RequestID></Response>",
        status,
    )


def _xml(text: str, status: int = 200) -> Response:
    return Response(text, status, content_type="text/xml;charset=UTF-8")
