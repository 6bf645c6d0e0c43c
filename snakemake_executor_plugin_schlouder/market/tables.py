"""The user's own tables of prices and instance types (CSV): read strictly, all errors by line at once."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..model import ON_DEMAND, SPOT, InstanceType, SchlouderError
from ..printable import plain, shown

_T = TypeVar("_T")
_Cells = dict[str, str]

TYPE_COLUMNS = ("instance_type", "vcpus", "memory_mib")
PRICE_COLUMNS = ("instance_type", "usd_per_hour")
ARCHITECTURES = ("x86_64", "arm64")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}"
_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """A file's text. `setting` is the option it was given with, `name` what people call the file."""

    setting: str
    name: str
    text: str

    @property
    def has_prices(self) -> bool:
        return "usd_per_hour" in self._header()

    def error(self, text: str) -> SchlouderError:
        return SchlouderError(plain(f"{self.setting}: {self.name}{text}"))

    def read(
        self, required: Sequence[str], row: Callable[[_Cells], tuple[str, _T]]
    ) -> dict[str, _T]:
        """What `row` makes of every row's cells, under what it calls the row. Its ValueErrors, names that
        come twice and whatever else is wrong end up in one SchlouderError."""
        found: dict[str, _T] = {}
        first: dict[str, int] = {}
        problems = []
        header = self._header()
        missing = [column for column in required if column not in header]
        if missing:
            raise self.error(
                f", line 1: no column {', '.join(missing)}; needed are {', '.join(required)}, with "
                "commas between the columns"
            )
        for number, cells in self._rows():
            try:
                name, value = row(_by_column(header, cells))
                if name in found:
                    raise ValueError(f"{name} is in line {first[name]} already")
            except ValueError as error:
                problems.append(f", line {number}: {error}")
                continue
            found[name], first[name] = value, number
        if problems:
            raise self.error(_in_short(problems))
        return found

    def _header(self) -> list[str]:
        return next(self._lines(), (0, list[str]()))[1]

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        lines = self._lines()
        next(lines, None)
        return ((number, cells) for number, cells in lines if any(cells))

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of every line, the header first."""
        reader = csv.reader(self.text.removeprefix("\ufeff").splitlines())
        try:
            for cells in reader:
                yield reader.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            raise self.error(f", line {reader.line_num}: {error}") from error


@dataclass(frozen=True)
class Prices:
    """USD an hour by type, and of spot by type and zone, "" being all zones that are not named."""

    on_demand: dict[str, float]
    spot: dict[tuple[str, str], float]


def prices_of(table: Table, region: str) -> Prices:
    """The prices that hold in `region`; a row that names it comes before one for all regions."""
    rows = table.read(PRICE_COLUMNS, _price)
    here = sorted((r for r in rows.values() if r.region in ("", region)), key=lambda r: r.region)
    return Prices(
        {row.kind: row.price for row in here if row.market == ON_DEMAND},
        {(row.kind, row.zone): row.price for row in here if row.market == SPOT},
    )


def types_of(table: Table) -> list[InstanceType]:
    return list(table.read(TYPE_COLUMNS, _type).values())


@dataclass(frozen=True)
class _Price:
    kind: str
    market: str
    zone: str
    region: str
    price: float


def _price(cells: _Cells) -> tuple[str, _Price]:
    price = _Price(
        _named(cells),
        _one_of(cells, "market", (ON_DEMAND, SPOT)),
        cells.get("zone", ""),
        cells.get("region", ""),
        _dollars(cells["usd_per_hour"]),
    )
    if price.zone and price.market == ON_DEMAND:
        raise ValueError(f"zone: {shown(price.zone)}; only spot prices differ by zone")
    return " ".join(filter(None, (price.market, price.kind, price.zone, price.region))), price


def _type(cells: _Cells) -> tuple[str, InstanceType]:
    name = _named(cells)
    gpus = _whole(cells, "gpus", 0)
    return name, InstanceType(
        name,
        _whole(cells, "vcpus", 1),
        _whole(cells, "memory_mib", 1),
        gpus,
        gpu_model(cells.get("gpu_model", "")) if gpus else "",
        _one_of(cells, "arch", ARCHITECTURES),
    )


def gpu_model(name: str) -> str:
    """The name of a GPU's model as rules give it."""
    return re.sub(r"\W+", "_", name).lower()


def _by_column(header: list[str], cells: list[str]) -> _Cells:
    """Cells that are left out are empty."""
    if any(cells[len(header) :]):
        raise ValueError(
            f"{len(cells)} cells for {len(header)} columns; the decimals of a number follow a point"
        )
    return dict(zip(header, [*cells, *[""] * len(header)], strict=False))


def _named(cells: _Cells) -> str:
    name = cells["instance_type"]
    if not name:
        raise ValueError("instance_type: empty")
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            f"instance_type: {shown(name)} is not allowed; it is letters, digits and . _ : / + -"
        )
    return name


def _one_of(cells: _Cells, column: str, allowed: Sequence[str]) -> str:
    """The first one if nothing is given."""
    given = cells.get(column, "") or allowed[0]
    if given not in allowed:
        raise ValueError(f"{column}: {shown(given)} is not allowed; it is {' or '.join(allowed)}")
    return given


def _dollars(text: str) -> float:
    """Strict, for float() also takes nan, infinity and 1_0."""
    if not text:
        raise ValueError("usd_per_hour: empty; a row without a price is to be left out")
    price = float(text) if re.fullmatch(r"\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+", text) else math.nan
    if not math.isfinite(price):
        raise ValueError(f"usd_per_hour: {shown(text)} is no price; it is a number of at least 0")
    return price


def _whole(cells: _Cells, column: str, least: int) -> int:
    """`least` if nothing is given and nothing may be."""
    text = cells.get(column, "") or ("0" if least == 0 else "")
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < least:
        raise ValueError(
            f"{column}: {shown(text)} is not allowed; it is a whole number from {least}"
        )
    return int(text)


def _in_short(problems: list[str]) -> str:
    """One line for one problem, else a list."""
    if len(problems) == 1:
        return problems[0]
    lines = [problem.removeprefix(", ") for problem in problems[:_SHOWN]]
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n  ".join([":", *lines, *more])
