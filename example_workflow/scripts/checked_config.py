"""Check the workflow's configuration while the Snakefile is read, before any job starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT_NAMES = {"spectra": "an .mgf file", "database": "a .fasta file"}


@dataclass(frozen=True)
class Config:
    """Checked settings; `spectra` and `database` are None when the workflow makes its own, `comet_params`
    when those beside the Snakefile are meant."""

    spectra: str | None
    database: str | None
    chunks: int
    fdr: float
    results: str
    comet_params: str | None
    synthetic_spectra: int
    strategies: Mapping[str, str]
    walltimes: Mapping[str, int]

    def plan(self, rule: str) -> dict[str, str | int]:
        """Resources that tell schlouder how to place the jobs of a rule and how long they take."""
        wanted: dict[str, str | int] = {}
        if rule in self.strategies:
            wanted["schlouder_strategy"] = self.strategies[rule]
        if rule in self.walltimes:
            wanted["schlouder_walltime"] = self.walltimes[rule]
        return wanted


def checked(config: Mapping[str, Any], rules: Sequence[str]) -> Config:
    """Return the settings, or raise a one-line ValueError that names the wrong key."""
    spectra = _data_file(config, "spectra", "BEGIN IONS", "spectrum")
    database = _data_file(config, "database", ">", "protein")
    if (spectra is None) != (database is None):
        given, missing = ("spectra", "database") if spectra else ("database", "spectra")
        raise ValueError(
            f"config '{missing}' is empty although '{given}' is set: "
            f"name {SHORT_NAMES[missing]} too, or leave both empty."
        )
    return Config(
        spectra=spectra,
        database=database,
        chunks=_whole_number(config, "chunks", "parts to split the spectra into"),
        fdr=_share(config, "fdr"),
        results=str(config.get("results") or "results"),
        comet_params=_existing(config, "comet_params"),
        synthetic_spectra=_whole_number(config, "synthetic_spectra", "spectra to make"),
        strategies=_per_rule(config, "strategies", rules),
        walltimes=_seconds(config, "walltimes", rules),
    )


def _wrong(key: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"config '{key}' is {value!r}: it must be {allowed}.")


def _existing(config: Mapping[str, Any], key: str) -> str | None:
    """Return the path under `key`, None if the key is empty."""
    value = config.get(key)
    if value is None or value == "":
        return None
    path = Path(str(value))
    if not path.is_file():
        raise _wrong(key, str(value), f"an existing file (looked from {Path.cwd()})")
    return str(path)


def _data_file(config: Mapping[str, Any], key: str, start: str, record: str) -> str | None:
    """Return the path under `key` after finding the first record in the file.

    Only the file's beginning is read: Snakemake reads the Snakefile again for every job.
    """
    name = _existing(config, key)
    if name is None:
        return None
    with Path(name).open(encoding="utf-8", errors="replace") as lines:
        if not any(line.startswith(start) for line in lines):
            raise _wrong(key, name, f"{SHORT_NAMES[key]} with at least one {record} ('{start}')")
    return name


def _whole_number(config: Mapping[str, Any], key: str, meaning: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, value, f"a whole number of {meaning}, 1 or more")
    return value


def _share(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise _wrong(key, value, "a share between 0 and 1 (0.01 is 1 %)")
    return float(value)


def _per_rule(config: Mapping[str, Any], key: str, rules: Sequence[str]) -> dict[str, str]:
    """Return the mapping rule -> value under `key`; an empty value means "not given".

    Values become text because Snakemake passes nested values of --config as text.
    """
    mapping = config.get(key) or {}
    if not isinstance(mapping, Mapping):
        raise _wrong(key, mapping, "a mapping from rule to value")
    for rule in mapping:
        if rule not in rules:
            raise ValueError(f"config '{key}' names a rule {rule!r}: known are {', '.join(rules)}.")
    return {rule: str(value) for rule, value in mapping.items() if value not in (None, "")}


def _seconds(config: Mapping[str, Any], key: str, rules: Sequence[str]) -> dict[str, int]:
    durations = _per_rule(config, key, rules)
    for rule, value in durations.items():
        if not value.isdecimal() or int(value) < 1:
            raise _wrong(f"{key}: {rule}", value, "whole seconds, 1 or more")
    return {rule: int(value) for rule, value in durations.items()}
