"""The instance types there are, where, and what they cost: asked of EC2 and the Price List API, or read from
the user's tables."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ec2.account import aws_session, patient_client
from ..model import InstanceType, SchlouderError, is_named
from ..store import cache_directory
from .answers import DAY, KEPT, Answers
from .asking import Failed, answered, batches, filters, is_aws
from .listing import Listed, filter_values, is_pattern, is_wanted, size, suits
from .tables import PRICE_COLUMNS, TYPE_COLUMNS, Prices, Table, prices_of, types_of
from .tariff import ON_DEMAND, SPOT, SpotHistory, Tariff, listed_price

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

_TYPES = "--schlouder-instance-types"
_RESOURCE = "schlouder_instance_type"
_PRICES = "--schlouder-prices"
_TYPE_TABLE = "--schlouder-type-table"

_PRICE_LISTS = {"cn": "cn-northwest-1", "ap": "ap-south-1"} | dict.fromkeys(
    ("eu", "af", "me", "il"), "eu-central-1"
)
"""Where the Price List API is asked, by the first part of a region's name; else in us-east-1."""

_LINUX = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
}
"""What makes an entry of the Price List the price of a plain machine (attributes of AmazonEC2)."""

_QUESTIONS_AT_ONCE = 8
_NEAR_MISSES = 3
_LISTED = 5


def connect(ec2: EC2Client, type_table: str, warn: Callable[[str], None]) -> Catalog:
    """The catalog of the cloud that this client speaks to; SchlouderError if the type table is wrong."""

    def pricing(region: str) -> Any:
        return patient_client(aws_session(region), "pricing")

    return Catalog(ec2, pricing, cache_directory(), time.time, warn, type_table)


@dataclass(frozen=True)
class Market:
    """`types` in the user's order, of which the `reserved` ones are only for rules that name them; what they
    cost; and the `zones` in which each can be had, by its name."""

    types: tuple[InstanceType, ...]
    reserved: tuple[str, ...]
    tariff: Tariff
    zones: Mapping[str, Sequence[str]]


class Catalog:
    """Types and prices of one region. What lacks but is not indispensable is told once, through `warn`."""

    def __init__(
        self,
        ec2: EC2Client,
        pricing: Callable[[str], Any],
        cache: Path,
        clock: Callable[[], float],
        warn: Callable[[str], None],
        type_table: str = "",
    ) -> None:
        """`pricing` makes a client of the Price List API in a region; nobody asks EC2 about types where there
        is a `type_table`."""
        self._ec2 = ec2
        self._pricing = pricing
        self._clock = clock
        self._warn = warn
        self._region = ec2.meta.region_name
        self._endpoint = ec2.meta.endpoint_url
        self._answers = Answers(cache, self._region, self._endpoint, clock)
        self._table = _table(_TYPE_TABLE, type_table, TYPE_COLUMNS) if type_table else None
        self._own_types = types_of(self._table) if self._table else None

    def market(
        self,
        words: Sequence[str],
        words_of_rules: Sequence[str],
        arch: str,
        zones: Sequence[str],
        prices_file: str,
        markets: Sequence[str],
    ) -> Market:
        """What a run may rent: the types that `words` stand for, and those that only rules name."""
        general = self.types(words, arch)
        names = {kind.name for kind in general}
        further = self.types(words_of_rules, arch, _RESOURCE) if words_of_rules else []
        reserved = [kind for kind in further if kind.name not in names]
        types = [*general, *reserved]
        offered = self.offerings(types, zones)
        return Market(
            tuple(types),
            tuple(kind.name for kind in reserved),
            self.tariff(types, zones, prices_file, markets),
            {
                kind.name: tuple(zone for zone in zones or ("",) if (kind.name, zone) in offered)
                for kind in types
            },
        )

    # -- types

    def types(
        self, patterns: Sequence[str], arch: str, setting: str = _TYPES
    ) -> list[InstanceType]:
        """The types that names (`m5.large`), patterns (`c7i.*`) and families (`c7i`) stand for, in this
        order, those of one pattern by size. `arch` is the image's, "" if unknown. SchlouderError tells
        all that match nothing, or only types of another architecture; `setting` is where they are from.

        A pattern that names no family (`*.large`) leaves out what does not suit sustained computing:
        burstable and bare-metal types and those of a previous generation.
        """
        listed = self._all_listed(patterns)
        chosen: dict[str, InstanceType] = {}
        problems = []
        for word in patterns:
            matching = [one for one in listed if is_named(word, one.kind.name)]
            kept = [one.kind for one in matching if suits(word, one, arch)]
            if not kept:
                problems.append(self._nothing_left(word, matching, arch))
            for kind in sorted(kept, key=size):
                chosen.setdefault(kind.name, kind)
        if problems:
            raise SchlouderError("\n".join(f"{setting}: {problem}" for problem in problems))
        return list(chosen.values())

    def named(self, names: Sequence[str]) -> list[InstanceType]:
        """These types, whatever the settings allow; for VMs that there are already."""
        found = {one.kind.name: one.kind for one in self._all_listed(names)}
        missing = [name for name in names if name not in found]
        if missing:
            raise SchlouderError(
                f"{_TYPE_TABLE if self._table else 'EC2'}: {self._place} has no type "
                f"{', '.join(missing)}, but an earlier run of this directory started VMs of it"
            )
        return [found[name] for name in names]

    def offerings(
        self, types: Sequence[InstanceType], zones: Sequence[str]
    ) -> set[tuple[str, str]]:
        """Type and zone wherever EC2 offers one of these types, in these zones (all if none is given).
        Where nobody can tell, every type counts as offered in every zone, "" if none is known.

        Not kept on disk: a zone's name means another place in another account.
        """
        names = [kind.name for kind in types]
        everywhere = {(name, zone) for name in names for zone in (zones or [""])}
        if self._own_types is not None or not names:
            return everywhere
        try:
            found = set(self._offered("availability-zone", names, zones))
        except Failed as failure:
            self._warn(f"{failure}; every type counts as offered in every zone.")
            return everywhere
        return found if found or self._is_aws else everywhere

    # -- prices

    def tariff(
        self,
        types: Sequence[InstanceType],
        zones: Sequence[str],
        prices_file: str,
        markets: Sequence[str],
    ) -> Tariff:
        """What these types cost on these markets: by the user's table (SchlouderError if that is wrong or has
        a hole), else by the Price List API; spot prices that the table leaves out entirely are EC2's
        of now. What cannot be had is unknown."""
        names = [kind.name for kind in types]
        table = self._price_table(prices_file)
        own = prices_of(table, self._region) if table else Prices({}, {})
        own_markets = [ON_DEMAND, *([SPOT] if own.spot else [])] if table else []
        on_demand, spot = own.on_demand, own.spot
        sources: dict[str, str] = {}
        for market in markets:
            if table and market in own_markets:
                _check_holes(table, own, names, zones, market)
                sources[market] = Path(table.name).name
            elif market == ON_DEMAND:
                on_demand, sources[market] = self._listed(names)
            else:
                spot, sources[market] = self._spot_now(names, zones)
        return Tariff(on_demand, spot, _source(sources))

    def spot_history(
        self, types: Sequence[InstanceType], zones: Sequence[str], since: float
    ) -> SpotHistory:
        """The spot prices from `since` (s since the epoch, at most 90 days ago) until now."""
        try:
            return SpotHistory.of(self._spot_changes([kind.name for kind in types], zones, since))
        except Failed as failure:
            self._warn(f"{failure}; what spot VMs have cost is unknown.")
            return SpotHistory({})

    # -- types, in detail

    @property
    def _is_aws(self) -> bool:
        return is_aws(self._endpoint)

    @property
    def _place(self) -> str:
        if self._table:
            return self._table.name
        return self._region if self._is_aws else f"{self._region} at {self._endpoint}"

    def _all_listed(self, words: Sequence[str]) -> list[Listed]:
        """All types that one of these names, patterns and families matches."""
        if self._own_types is not None:
            return [Listed(kind, True) for kind in self._own_types]
        known = {word: self._remembered(word) for word in words}
        unknown = [word for word, listed in known.items() if listed is None]
        if unknown:
            asked = self._described([value for word in unknown for value in filter_values(word)])
            found = {
                word: [one for one in asked if is_named(word, one.kind.name)] for word in unknown
            }
            self._answers.put(
                {
                    f"types {word}": [dataclasses.asdict(one) for one in listed]
                    for word, listed in found.items()
                    if listed
                }
            )
            known |= found
        by_name = {one.kind.name: one for listed in known.values() for one in listed or ()}
        return list(by_name.values())

    def _remembered(self, word: str) -> list[Listed] | None:
        dated = self._answers.get(f"types {word}", KEPT)
        try:
            return None if dated is None else [Listed.kept(fields) for fields in dated[1]]
        except (TypeError, KeyError, ValueError):
            return None

    def _described(self, values: Sequence[str]) -> list[Listed]:
        """The types that pass EC2's filter instance-type with one of `values`."""

        def ask() -> list[Listed]:
            pages = self._ec2.get_paginator("describe_instance_types")
            return [
                Listed.described(reply)
                for batch in batches(values)
                for page in pages.paginate(Filters=filters({"instance-type": batch}))
                for reply in page["InstanceTypes"]
            ]

        try:
            return answered("ec2:DescribeInstanceTypes", ask)
        except Failed as failure:
            if failure.is_missing and not self._is_aws:
                raise SchlouderError(
                    f"{_TYPE_TABLE}: not given, but {failure}; {_give_table()}"
                ) from failure
            raise SchlouderError(f"AWS: {failure}") from failure

    def _offered(
        self, location: str, names: Sequence[str], places: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Type and place of everything on offer; no names or places: of all."""

        def ask() -> list[tuple[str, str]]:
            pages = self._ec2.get_paginator("describe_instance_type_offerings")
            return [
                (offer["InstanceType"], offer["Location"])
                for values in batches(names)
                for page in pages.paginate(
                    LocationType=location,  # type: ignore[arg-type]
                    Filters=filters({"instance-type": values, "location": places}),
                )
                for offer in page["InstanceTypeOfferings"]
            ]

        return answered("ec2:DescribeInstanceTypeOfferings", ask)

    def _nothing_left(self, word: str, matching: Sequence[Listed], arch: str) -> str:
        """Why a word of the user's stands for no type that could be used."""
        is_name = any(one.kind.name == word for one in matching)
        if not matching:
            return self._unknown(word)
        others = sorted({one.kind.arch for one in matching if one.kind.arch != arch})
        if is_name:
            return (
                f"{word!r} has the wrong architecture for the image: {', '.join(others)}, but the "
                f"image is for {arch}; leave it out, or give another --schlouder-image"
            )
        if not any(is_wanted(word, one) for one in matching):
            shown = _listing([one.kind.name for one in matching])
            return (
                f"{word!r} matches only burstable, bare-metal and previous-generation types ({shown}), "
                f"which are left out where no family is named; name it, as in {matching[0].kind.name}"
            )
        return (
            f"{word!r} matches only types of the wrong architecture for the image: "
            f"{', '.join(others)}, but the image is for {arch}; leave it out, or give another "
            "--schlouder-image"
        )

    def _unknown(self, word: str) -> str:
        names = self._all_names()
        families = {name.partition(".")[0] for name in names}
        near = difflib.get_close_matches(
            word.lower().rstrip("*?."), [*names, *sorted(families)], _NEAR_MISSES
        )
        verb = "matches" if is_pattern(word) else "is"
        hint = f"; near misses: {', '.join(near)}" if near else ""
        if not names and not self._is_aws:
            hint = f", nor has that cloud told of any other; {_give_table()}"
        return f"{word!r} {verb} no instance type of {self._place}{hint}"

    def _all_names(self) -> list[str]:
        if self._own_types is not None:
            return [kind.name for kind in self._own_types]
        try:
            return [name for name, _ in self._offered("region", [], [])]
        except Failed:
            return []

    # -- prices, in detail

    def _price_table(self, prices_file: str) -> Table | None:
        if prices_file:
            return _table(_PRICES, prices_file, PRICE_COLUMNS)
        return self._table if self._table and self._table.has_prices else None

    def _listed(self, names: Sequence[str]) -> tuple[dict[str, float], str]:
        """On-demand prices, and where they come from."""
        dated = {name: self._remembered_price(name) for name in names}
        prices = {name: known[1] for name, known in dated.items() if known}
        dates = [known[0] for known in dated.values() if known]
        unknown = [name for name in names if name not in prices]
        why = "the Price List API has none in USD"
        if unknown:
            try:
                asked = self._asked_prices(unknown)
            except (SchlouderError, Failed) as failure:
                asked, why = {}, str(failure)
            self._answers.put({f"price {name}": price for name, price in asked.items()})
            prices.update(asked)
            dates.append(self._clock())
        missing = [name for name in names if name not in prices]
        if missing:
            self._warn(
                f"the price of {_listing(missing)} is unknown: {why}. Prices can also be given in a "
                f"table with {_PRICES}."
            )
        if not prices:
            return {}, f"unknown: {why}"
        return prices, f"Price List API, {_date(min(dates)):%Y-%m-%d}"

    def _remembered_price(self, name: str) -> tuple[float, float] | None:
        """Date and price."""
        dated = self._answers.get(f"price {name}", DAY)
        if dated is None or not isinstance(dated[1], float) or not 0 < dated[1] < math.inf:
            return None
        return dated

    def _asked_prices(self, names: Sequence[str]) -> dict[str, float]:
        """What the Price List API has of these types. An entry of price 0 is no offer: reservations and
        capacity blocks, which are paid for in another way, are listed so."""
        client = self._pricing(_PRICE_LISTS.get(self._region.partition("-")[0], "us-east-1"))
        if is_aws(client.meta.endpoint_url) and not self._is_aws:
            raise Failed(f"{self._endpoint} is not AWS, whose price list is the only one known")
        products = client.get_paginator("get_products")

        def ask(name: str) -> float:
            terms = {**_LINUX, "regionCode": self._region, "instanceType": name}
            pages = products.paginate(
                ServiceCode="AmazonEC2",
                Filters=[
                    {"Type": "TERM_MATCH", "Field": field, "Value": value}
                    for field, value in terms.items()
                ],
            )
            prices = answered(
                "pricing:GetProducts",
                lambda: [listed_price(entry) for page in pages for entry in page["PriceList"]],
            )
            return max(prices, default=0.0)

        with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as pool:
            priced = zip(names, pool.map(ask, names), strict=True)
            return {name: price for name, price in priced if price > 0}

    def _spot_now(
        self, names: Sequence[str], zones: Sequence[str]
    ) -> tuple[dict[tuple[str, str], float], str]:
        """Spot prices of now, and where they come from."""
        now = self._clock()
        try:
            changes = self._spot_changes(names, zones, now)
        except Failed as failure:
            self._warn(f"spot prices are unknown: {failure}.")
            return {}, f"unknown: {failure}"
        newest = {(kind, zone): price for kind, zone, _, price in sorted(changes, key=_date_of)}
        return newest, f"DescribeSpotPriceHistory, {_date(now):%Y-%m-%d %H:%M} UTC"

    def _spot_changes(
        self, names: Sequence[str], zones: Sequence[str], since: float
    ) -> list[tuple[str, str, float, float]]:
        """Type, zone, date and new price. EC2 also tells the last change before `since`: the price then."""
        if not names:
            return []

        def ask() -> list[tuple[str, str, float, float]]:
            pages = self._ec2.get_paginator("describe_spot_price_history").paginate(
                InstanceTypes=list(names),  # type: ignore[arg-type]
                ProductDescriptions=["Linux/UNIX"],
                StartTime=_date(since),
                EndTime=_date(self._clock()),
                Filters=filters({"availability-zone": zones}),
            )
            return [
                (
                    change["InstanceType"],
                    change["AvailabilityZone"],
                    change["Timestamp"].timestamp(),
                    float(change["SpotPrice"]),
                )
                for page in pages
                for change in page["SpotPriceHistory"]
            ]

        return answered("ec2:DescribeSpotPriceHistory", ask)


def _table(setting: str, path: str, columns: Sequence[str]) -> Table:
    try:
        return Table(setting, path, Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SchlouderError(
            f"{setting}: {path!r} cannot be read ({error}); give a CSV file with the columns "
            f"{', '.join(columns)}"
        ) from error


def _give_table() -> str:
    return (
        f"give a CSV file of its instance types with {_TYPE_TABLE}, columns {', '.join(TYPE_COLUMNS)} and, "
        "where they matter, arch, gpus, gpu_model, usd_per_hour"
    )


def _check_holes(
    table: Table, prices: Prices, names: Sequence[str], zones: Sequence[str], market: str
) -> None:
    """SchlouderError names the types that the user's table has no price for on this market."""
    if market == ON_DEMAND:
        missing = [name for name in names if name not in prices.on_demand]
    else:
        priced = Tariff({}, prices.spot, "")
        missing = [
            f"{name} in {zone}" if zone else name
            for name in names
            for zone in zones or [""]
            if priced.price(name, SPOT, zone) is None
        ]
    if missing:
        raise table.error(
            f": no {market} price of {_listing(missing)}, which may be used; add it, or change {_TYPES}"
        )


def _source(sources: Mapping[str, str]) -> str:
    """`sources` by market."""
    texts = list(dict.fromkeys(sources.values()))
    if all(text.startswith("unknown: ") for text in texts):
        whys = [text.removeprefix("unknown: ") for text in texts]
        return f"unknown: {'; '.join(whys or ['no market was asked for'])}"
    if len(texts) == 1:
        return texts[0]
    return "; ".join(f"{market}: {text}" for market, text in sources.items())


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _date_of(change: tuple[str, str, float, float]) -> float:
    return change[2]


def _listing(names: Sequence[str]) -> str:
    """The first few of them."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
