"""What makes a job that Snakemake hands over the same as one that was handed over before it was killed.

Snakemake's own memory cannot tell: `dag.incomplete_external_jobid` answers None with
`--rerun-incomplete`, without which it refuses to go on where outputs were begun.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .dag import members_of

_PLAIN = (str, bytes, int, float, bool, type(None))
_FILES = ("script", "notebook", "conda_env")
_CODE = ("shellcmd", "run_func_src", "wrapper", "cwl", "container_img", *_FILES)
"""Attributes of a rule that say how it works, of which some are names of files."""


def identity_of(job: Any) -> str:
    """What the job makes: digests of its outputs, of a group those of all its jobs. A job without outputs
    makes itself."""
    return " ".join(sorted(part for member in members_of(job) for part in _results(member)))


def _results(member: Any) -> list[str]:
    outputs = _names(member.output)
    return [_digest(name)[:16] for name in outputs] or [_digest(*_named(member))[:16]]


def _named(member: Any) -> tuple[Any, ...]:
    return member.name, sorted((getattr(member, "wildcards_dict", None) or {}).items())


def content_of(job: Any) -> str:
    """Digest of rule, inputs, parameters and code: how it makes that. A script counts by its date
    (`changed`)."""
    return _digest(
        *sorted(
            _digest(
                _named(member),
                _names(member.input),
                [repr(value) for value in _parameters(member) if _is_plain(value)],
                [str(getattr(member.rule, part, None)) for part in _CODE],
            )
            for member in members_of(job)
        )
    )


def changed(job: Any) -> float:
    """When the newest input, script or environment file was written (s since the epoch); what the jobs of
    a group make for each other is none of its inputs."""
    members = members_of(job)
    own = {name for member in members for name in _names(member.output)}
    files = {file for member in members for file in _sources(member)} - own
    return max(map(_date, files), default=0.0)


def is_made(job: Any) -> bool:
    """Whether all outputs are there."""
    return all(
        os.path.lexists(file) for member in members_of(job) for file in _names(member.output)
    )


def _names(files: Any) -> list[str]:
    return [str(file) for file in files or ()]


def _parameters(member: Any) -> Iterable[Any]:
    """Those the user wrote, without what Snakemake derives of resources and threads."""
    found = getattr(member, "non_derived_params", None)
    return (getattr(member, "params", None) or ()) if found is None else found


def _sources(member: Any) -> list[str]:
    rule = member.rule
    base = getattr(rule, "basedir", None)
    named = [getattr(rule, part, None) for part in _FILES]
    local = [str(base.join(file)) for file in named if base is not None and isinstance(file, str)]
    return [*_names(member.input), *local]


def _date(file: str) -> float:
    """0 where there is no such file, as with one in a storage."""
    try:
        return Path(file).stat().st_mtime
    except OSError:
        return 0.0


def _is_plain(value: object) -> bool:
    """Whether its text is the same in every process; parameters of other kinds are left out, as by Snakemake
    itself."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:32]
