"""Results of single runs on disk, so that an interrupted command need not repeat them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.site import ROOT

_SOURCES = ("snakemake_executor_plugin_schlouder", "bench/faults", "tests", "example_workflow")


@dataclass(frozen=True)
class Kept:
    """Those of one fault; a result counts only for the code that it was made with."""

    folder: Path

    def get(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def put(self, name: str, result: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(name).write_text(json.dumps(result, indent=2) + "\n")

    def forget(self) -> None:
        """When all is done: the next command begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self._code}.json"

    @cached_property
    def _code(self) -> str:
        digest = hashlib.sha256()
        for source in _SOURCES:
            for path in sorted((ROOT / source).rglob("*")):
                if path.is_file() and path.suffix != ".pyc":
                    digest.update(str(path).encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]
