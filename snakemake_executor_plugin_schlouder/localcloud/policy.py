"""IAM policy documents, evaluated as far as the calls of an elastic cluster need it.

Source: IAM user guide, Policy evaluation logic, and IAM JSON policy elements reference (Action, Resource,
Condition). A document with anything that is not evaluated here is refused, never taken for granted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Context = Mapping[str, Sequence[str]]
"""Condition keys in lower case → their values; a key that the request does not have is absent."""

ANY_RESOURCE = "any"
"""A resource that is not worked out here; it matches every Resource element."""

_KNOWN = frozenset({"Sid", "Effect", "Action", "Resource", "Condition"})
_SETS = ("ForAllValues:", "ForAnyValue:")


class PolicyError(ValueError):
    """One line: what of a policy document is not evaluated here."""


@dataclass(frozen=True)
class Request:
    """One action on one resource. `context`: what Condition elements may ask for."""

    action: str
    resource: str
    context: Context


@dataclass(frozen=True)
class Condition:
    """One operator and key of a Condition element; all of its keys and operators must hold."""

    operator: str
    key: str
    values: tuple[str, ...]
    quantifier: str = ""
    if_exists: bool = False

    def holds(self, context: Context) -> bool:
        present = context.get(self.key)
        if self.operator == "Null":
            return [str(present is None).lower()] == list(self.values)
        negated = "Not" in self.operator
        if present is None:
            # IAM JSON policy elements: a key that the request does not have matches nothing, so that negated
            # operators hold. Set operators: ForAllValues holds for it.
            return negated or self.if_exists or self.quantifier == "ForAllValues:"
        results = [self._matches(value) != negated for value in present]
        return all(results) if self.quantifier == "ForAllValues:" else any(results)

    def _matches(self, value: str) -> bool:
        if self.operator in ("StringEquals", "StringNotEquals"):
            return value in self.values
        return any(_matches(pattern, value) for pattern in self.values)


_OPERATORS = frozenset(
    {
        "StringEquals",
        "StringNotEquals",
        "StringLike",
        "StringNotLike",
        "ArnEquals",
        "ArnLike",
        "Null",
    }
)


@dataclass(frozen=True)
class Statement:
    allows: bool
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: tuple[Condition, ...]

    def applies(self, request: Request) -> bool:
        # IAM JSON policy elements: action names are not case sensitive, resources are.
        action = request.action.lower()
        if not any(_matches(pattern.lower(), action) for pattern in self.actions):
            return False
        if request.resource != ANY_RESOURCE and not any(
            _matches(pattern, request.resource) for pattern in self.resources
        ):
            return False
        return all(condition.holds(request.context) for condition in self.conditions)


@dataclass(frozen=True)
class Policy:
    statements: tuple[Statement, ...]

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Policy:
        found = document.get("Statement")
        statements = [found] if isinstance(found, Mapping) else found
        if not statements:
            raise PolicyError("a policy needs a Statement")
        return cls(tuple(_statement(statement) for statement in statements))

    def refusal(self, request: Request) -> str | None:
        """Why the request is denied, in IAM's own words; None when it is allowed.

        An explicit deny wins over every allow; what no statement allows is denied.
        """
        applying = [statement for statement in self.statements if statement.applies(request)]
        if any(not statement.allows for statement in applying):
            return "with an explicit deny in an identity-based policy"
        if not applying:
            return f"because no identity-based policy allows the {request.action} action"
        return None


def not_authorized(caller: str, request: Request, refusal: str) -> str:
    """IAM user guide, Troubleshooting access denied error messages; `caller` is an ARN."""
    resource = f" on resource: {request.resource}" if request.resource.startswith("arn:") else ""
    return f"User: {caller} is not authorized to perform: {request.action}{resource} {refusal}"


def _statement(statement: Mapping[str, Any]) -> Statement:
    unknown = set(statement) - _KNOWN
    if unknown:
        raise PolicyError(f"policy element {sorted(unknown)[0]} is not evaluated here")
    effect = statement.get("Effect")
    if effect not in ("Allow", "Deny"):
        raise PolicyError(f"Effect is {effect!r}: allowed are Allow and Deny")
    return Statement(
        allows=effect == "Allow",
        actions=_texts(statement, "Action"),
        resources=_texts(statement, "Resource"),
        conditions=tuple(_conditions(statement.get("Condition", {}))),
    )


def _texts(statement: Mapping[str, Any], element: str) -> tuple[str, ...]:
    value = statement.get(element)
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not texts:
        raise PolicyError(f"a statement needs {element}")
    return _without_variables(texts)


def _conditions(element: Mapping[str, Mapping[str, Any]]) -> list[Condition]:
    found = []
    for name, keys in element.items():
        quantifier = next((prefix for prefix in _SETS if name.startswith(prefix)), "")
        operator = name.removeprefix(quantifier).removesuffix("IfExists")
        if operator not in _OPERATORS:
            raise PolicyError(
                f"condition operator {name} is not evaluated here: {', '.join(sorted(_OPERATORS))} are"
            )
        for key, values in keys.items():
            wanted = (values,) if isinstance(values, str) else tuple(values)
            if_exists = name.endswith("IfExists")
            texts = _without_variables(wanted)
            found.append(Condition(operator, key.lower(), texts, quantifier, if_exists))
    return found


def _without_variables(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if "${" in text:
            raise PolicyError(f"policy variables are not evaluated here: {text}")
    return texts


def _matches(pattern: str, text: str) -> bool:
    """IAM knows `*` and `?`; square brackets are letters like others."""
    return fnmatchcase(text, pattern.replace("[", "[[]"))
