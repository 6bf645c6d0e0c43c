"""Answers of AWS services on the wire, as each of their protocols shapes them."""

from __future__ import annotations

import json
import secrets
from typing import Any
from xml.sax.saxutils import escape

from werkzeug.wrappers import Response

JSON_SERVICES = frozenset({"pricing", "secretsmanager", "ssm"})
QUERY_SERVICES = frozenset({"iam", "sts"})
NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


def error(code: str, message: str, status: int = 400) -> Response:
    """An error of EC2."""
    return xml(
        f"<Response><Errors><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error></Errors>"
        f"<RequestID>{secrets.token_hex(16)}</RequestID></Response>",
        status,
    )


def service_error(service: str, code: str, message: str, status: int = 400) -> Response:
    """An error in the protocol of the service."""
    if service == "ec2":
        return error(code, message, status)
    text = f"<Code>{code}</Code><Message>{escape(message)}</Message>"
    request = f"<RequestId>{secrets.token_hex(16)}</RequestId>"
    if service in JSON_SERVICES:
        return json_answer({"__type": code, "message": message}, 400)
    if service == "s3":
        return xml(f"<Error>{text}{request}</Error>", status)
    return xml(
        f"<ErrorResponse><Error><Type>Sender</Type>{text}</Error>{request}</ErrorResponse>", status
    )


def denied(service: str, message: str) -> Response:
    """Without the right to do it: UnauthorizedOperation for EC2, some form of AccessDenied elsewhere."""
    if service == "ec2":
        encoded = secrets.token_urlsafe(150)
        return error(
            "UnauthorizedOperation",
            f"You are not authorized to perform this operation. {message}. "
            f"Encoded authorization failure message: {encoded}",
            403,
        )
    code = "AccessDeniedException" if service in JSON_SERVICES else "AccessDenied"
    return service_error(service, code, message, 403)


def reply(action: str, content: str) -> Response:
    """A success of EC2; `content` is XML."""
    return xml(
        f"<{action}Response xmlns='{NAMESPACE}'><requestId>{secrets.token_hex(16)}</requestId>"
        f"{content}</{action}Response>"
    )


def caller_identity(arn: str, account: str) -> Response:
    """STS's answer to GetCallerIdentity; moto's names the same user for everybody."""
    return xml(
        "<GetCallerIdentityResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'>"
        f"<GetCallerIdentityResult><Arn>{arn}</Arn><UserId>{arn.rpartition('/')[2]}</UserId>"
        f"<Account>{account}</Account></GetCallerIdentityResult><ResponseMetadata>"
        f"<RequestId>{secrets.token_hex(16)}</RequestId></ResponseMetadata></GetCallerIdentityResponse>"
    )


def xml(text: str, status: int = 200) -> Response:
    return Response(text, status, content_type="text/xml;charset=UTF-8")


def json_answer(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, content_type="application/x-amz-json-1.1")
