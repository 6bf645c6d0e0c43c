"""What the cloud has answered, kept on disk with its date, so that not every run asks again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..store import distrusted, make_private

DAY = 86400.0
KEPT = 7 * DAY
"""Seconds after which no answer is used any more."""


class Answers:
    """The answers of one endpoint in one region, by question; JSON in one file, for its owner alone.

    It only saves time: a file that is damaged, of another user, or cannot be written, is as good as none.
    """

    def __init__(
        self, directory: Path, region: str, endpoint: str, clock: Callable[[], float]
    ) -> None:
        digest = hashlib.sha256(endpoint.encode()).hexdigest()[:16]
        self._path = directory / f"{re.sub(r'[^a-z0-9-]', '_', region)}-{digest}.json"
        self._clock = clock
        self._known = self._read()

    def get(self, question: str, max_age: float) -> tuple[float, Any] | None:
        """Date (s since the epoch) and answer, if that is not older than `max_age` seconds."""
        dated = self._known.get(question)
        if dated is None or not 0 <= self._clock() - dated[0] <= max_age:
            return None
        return dated

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keeps what can be written as JSON, beside what other runs have written meanwhile."""
        if not answers:
            return
        now = self._clock()
        new = {name: (now, value) for name, value in answers.items()}
        self._known = {**self._known, **self._read(), **new}
        recent = {name: dated for name, dated in self._known.items() if now - dated[0] <= KEPT}
        with contextlib.suppress(OSError):
            self._write(json.dumps(recent))
            self._remove_old()

    def _read(self) -> dict[str, tuple[float, Any]]:
        try:
            if distrusted(self._path):
                return {}
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {name: (float(date), answer) for name, (date, answer) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    def _write(self, text: str) -> None:
        """In one step, so that nobody reads half a file."""
        make_private(self._path.parent)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self._path.parent, suffix=".new", delete=False
        ) as file:
            written = Path(file.name)
            try:
                file.write(text)
                file.close()
                written.replace(self._path)
            except OSError:
                written.unlink()
                raise

    def _remove_old(self) -> None:
        """Files of clouds that nobody has used for long, and what a crash left half written."""
        for path in self._path.parent.iterdir():
            old = self._clock() - path.stat().st_mtime > KEPT
            if old and path.suffix in (".json", ".new"):
                path.unlink()
