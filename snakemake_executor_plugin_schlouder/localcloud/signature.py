"""AWS Signature Version 4, checked for the temporary credentials that VMs get from their metadata service.

The user's own keys are dummies and are not checked; a VM's are, because only then does a script that signs
wrongly fail here as it would on EC2.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<scope>[^,\s]+),\s*"
    r"SignedHeaders=(?P<headers>[^,\s]+),\s*Signature=(?P<signature>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class Authorization:
    """A parsed Authorization header; `scope` is date/region/service/aws4_request."""

    access_key: str
    scope: str
    signed_headers: tuple[str, ...]
    signature: str

    @property
    def region(self) -> str:
        return self.scope.split("/")[1]

    @property
    def service(self) -> str:
        return self.scope.split("/")[2]

    @classmethod
    def parse(cls, header: str) -> Authorization | None:
        """None when the header is missing or of another kind."""
        match = _AUTHORIZATION.match(header)
        if match is None or match["scope"].count("/") != 3:
            return None
        headers = tuple(match["headers"].split(";"))
        return cls(match["key"], match["scope"], headers, match["signature"])


@dataclass(frozen=True)
class SignedRequest:
    """What a signature covers; header names in lower case, the path as WSGI gives it (bytes as Latin-1)."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


def is_valid(request: SignedRequest, authorization: Authorization, secret: str, token: str) -> bool:
    """Whether the request was signed with `secret`, and carries the session token under that signature."""
    covered = {"host", "x-amz-date", "x-amz-security-token"} <= set(authorization.signed_headers)
    if not covered or request.headers.get("x-amz-security-token") != token:
        return False
    expected = _signature(request, authorization, secret)
    return hmac.compare_digest(expected, authorization.signature)


def _signature(request: SignedRequest, authorization: Authorization, secret: str) -> str:
    canonical = _canonical(request, authorization.signed_headers).encode()
    text = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            request.headers.get("x-amz-date", ""),
            authorization.scope,
            hashlib.sha256(canonical).hexdigest(),
        ]
    )
    key = ("AWS4" + secret).encode()
    for part in authorization.scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def _canonical(request: SignedRequest, signed_headers: tuple[str, ...]) -> str:
    pairs = sorted(parse_qsl(request.query, keep_blank_values=True))
    query = "&".join(
        f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs
    )
    headers = [
        f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in signed_headers
    ]
    return "\n".join(
        [
            request.method,
            quote(request.path.encode("latin-1"), safe="/-_.~"),
            query,
            *headers,
            "",
            ";".join(signed_headers),
            _payload_hash(request),
        ]
    )


def _payload_hash(request: SignedRequest) -> str:
    """S3 signs what this header says, which may be that the body is not signed at all (S3 API reference,
    Authenticating requests)."""
    declared = request.headers.get("x-amz-content-sha256", "")
    actual = hashlib.sha256(request.body).hexdigest()
    is_digest = re.fullmatch(r"[0-9a-f]{64}", declared) is not None
    return actual if is_digest or not declared else declared
