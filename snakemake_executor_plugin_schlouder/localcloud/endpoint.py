"""The AWS endpoint of an embedded cloud: moto's server, and around it what moto lacks.

This module receives calls, tells who calls, and decides whether the call may go on (throttling, policies,
missing actions); `ec2` and `instances` hold what EC2 then does, and `control` is how tests reach into it.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from snakemake_executor_plugin_schlouder.localcloud import prices, signature
from snakemake_executor_plugin_schlouder.localcloud.answers import (
    JSON_SERVICES,
    QUERY_SERVICES,
    caller_identity,
    denied,
    error,
    json_answer,
    service_error,
)
from snakemake_executor_plugin_schlouder.localcloud.authorization import (
    ACCOUNT,
    REGION,
    Call,
    parameter_arn,
    requests,
    s3_call,
)
from snakemake_executor_plugin_schlouder.localcloud.control import PREFIX, Control
from snakemake_executor_plugin_schlouder.localcloud.ec2 import Ec2, LostReply, hardware
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import Event
from snakemake_executor_plugin_schlouder.localcloud.instances import Instances
from snakemake_executor_plugin_schlouder.localcloud.meter import Billing
from snakemake_executor_plugin_schlouder.localcloud.policy import (
    ANY_RESOURCE,
    Policy,
    not_authorized,
)
from snakemake_executor_plugin_schlouder.localcloud.prices import PriceList, SpotMarket

log = logging.getLogger(__name__)

USER = f"arn:aws:iam::{ACCOUNT}:user/schlouder-local"
WHO_AM_I = "sts:GetCallerIdentity"
"""Needs no right, and cannot be denied (AWS STS API reference)."""

Environ = dict[str, Any]


@dataclass(frozen=True)
class Caller:
    """Who signed a request: an ordinary caller, or a VM with its temporary credentials."""

    arn: str
    is_vm: bool = False


class Endpoint:
    """A WSGI application. EC2 requests are served one at a time, because moto's EC2 state has no lock.

    `spot_period`: seconds between two changes of a spot price.
    """

    def __init__(self, billing: Billing, spot_period: int) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        price_list = PriceList(REGION, hardware())
        self._products = price_list.products()
        self.instances = Instances(self._lock, SpotMarket(price_list, spot_period), billing)
        self.ec2 = Ec2(self.instances)
        self.calls: Counter[str] = Counter()
        self.control = Control(self.instances, self.calls)

    def serve(self, address: str) -> int:
        """Serves on a free port of `address` from now on; returns the port."""
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = make_server(address, 0, self, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=server.serve_forever, name="endpoint", daemon=True).start()
        return int(server.port)

    def report(self, instance_id: str, event: Event) -> None:
        """The hypervisor's news about an instance."""
        self.instances.report(instance_id, event)

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            answer = self._answer(environ, body)
        except LostReply:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            # Of such an error the server says nothing.
            raise ConnectionAbortedError("a reply that is meant to be lost") from None
        except Exception:
            log.exception("request failed")
            answer = error("InternalError", "An internal error has occurred", 500)
        return answer(environ, start_response)  # type: ignore[no-any-return]

    def _answer(self, environ: Environ, body: bytes) -> Response:
        if environ["PATH_INFO"].startswith(PREFIX):
            with self._lock:
                return self.control.answer(environ["REQUEST_METHOD"], environ["PATH_INFO"], body)
        if self.instances.injector.faults.away:
            raise LostReply
        authorization = signature.Authorization.parse(environ.get("HTTP_AUTHORIZATION", ""))
        if authorization is None:
            return self._forward(environ, body)
        caller = self._authenticate(environ, body, authorization)
        if caller is None:
            return Response('{"__type":"InvalidSignatureException"}', 400)
        call = _call(authorization.service, environ, body)
        if authorization.service == "ec2":
            if authorization.region != REGION:
                return error("UnsupportedOperation", f"The only region here is {REGION}.")
            return self._ec2(environ, call, caller)
        refusal = self._refusal(call, caller)
        if refusal is not None:
            return refusal
        if call.name == "pricing:GetProducts":
            return self._get_products(body)
        if call.name == WHO_AM_I:
            return caller_identity(caller.arn, ACCOUNT)
        return self._forward(environ, body)

    def _authenticate(
        self, environ: Environ, body: bytes, authorization: signature.Authorization
    ) -> Caller | None:
        """Only temporary credentials (ASIA...) are looked at; they are a VM's. None if they are wrong."""
        if not authorization.access_key.startswith("ASIA"):
            return Caller(USER)
        known = self.instances.credentials.get(authorization.access_key)
        if known is None:
            return None
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
        secret, token = known.credentials.secret_key, known.credentials.token
        if not signature.is_valid(request, authorization, secret, token):
            return None
        return Caller(known.arn, is_vm=True)

    def _ec2(self, environ: Environ, call: Call, caller: Caller) -> Response:
        parameters = dict(call.parameters)

        def forward(body: bytes) -> Response:
            return self._forward(environ, body)

        refusal = self._refusal(call, caller)
        if refusal is not None:
            return refusal
        if parameters.get("DryRun") == "true":
            with self._lock:
                return self.ec2.rehearse(parameters)
        answer = self.ec2.answer_unlocked(parameters, forward)
        if answer is not None:
            return answer
        with self._lock:
            return self.ec2.answer(parameters, forward)

    def _refusal(self, call: Call, caller: Caller) -> Response | None:
        """The answer to a call that does not get as far as the service; None if it does."""
        injector = self.instances.injector
        if not caller.is_vm:
            with self._counting:
                self.calls[call.name] += 1
        if injector.lacks(call.service, call.action):
            return _unknown_action(call, injector.faults.missing_code)
        if call.service == "ec2" and injector.throttles(call.action, time.time()):
            return error("RequestLimitExceeded", "Request limit exceeded.", 503)
        policy = injector.vm_policy if caller.is_vm else injector.policy
        if policy is None or call.name == WHO_AM_I:
            return None
        if call.service != "ec2":
            return self._denial(policy, call, caller)
        with self._lock:
            return self._denial(policy, call, caller)

    def _denial(self, policy: Policy, call: Call, caller: Caller) -> Response | None:
        if call.name == "ec2:RunInstances":
            wanted = self.ec2.resolved(dict(call.parameters))
            call = Call(call.service, call.action, parameters=wanted)
        for request in requests(call, self.ec2.lookup()):
            reason = policy.refusal(request)
            if reason is not None:
                return denied(call.service, not_authorized(caller.arn, request, reason))
        return None

    def _get_products(self, body: bytes) -> Response:
        try:
            return json_answer(prices.get_products(self._products, json.loads(body)))
        except prices.PricingError as problem:
            return service_error("pricing", problem.code, str(problem))

    def _forward(self, environ: Environ, body: bytes) -> Response:
        inner = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return Response.from_app(self._moto, inner, buffered=True)


def _call(service: str, environ: Environ, body: bytes) -> Call:
    """What is asked for, as far as the protocol of the service tells it."""
    if service == "s3":
        return s3_call(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        )
    if service in JSON_SERVICES:
        action = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        name = json.loads(body or "{}").get("Name") if service == "ssm" else None
        return Call(service, action, parameter_arn(name) if name else ANY_RESOURCE)
    if service == "ec2" or service in QUERY_SERVICES:
        parameters = dict(parse_qsl(body.decode(), keep_blank_values=True))
        return Call(service, parameters.get("Action", ""), parameters=parameters)
    return Call(service, environ["PATH_INFO"])


def _unknown_action(call: Call, code: str) -> Response:
    if call.service == "ec2" and code == "InvalidRequest":
        return error(code, "The request received was invalid.")
    if call.service in JSON_SERVICES:
        return service_error(call.service, "UnknownOperationException", call.action)
    message = f"The action {call.action} is not valid for this web service."
    return service_error(call.service, code, message)
