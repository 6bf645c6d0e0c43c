"""Merge the searches of all chunks and report what holds at the given false discovery rate.

Score: Comet's E-value, the number of random peptides expected to match a spectrum as well; it is
comparable between charges and peptide lengths, which xcorr is not. Per spectrum the best match
counts, per peptide its best spectrum.

False discovery rate of a list: (decoys + 1) / targets. The 1 is what keeps the estimate valid
for short lists (Levitsky et al., J. Proteome Res. 2017); it follows that a list at 1 % has at
least 100 entries or none. The q-value of a match is the lowest rate of all lists it is in.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key")

DECOY_PREFIX = "DECOY_"  # as decoys.py writes it


@dataclass(frozen=True)
class Psm:
    """A peptide-spectrum match."""

    scan: int
    title: str
    charge: int
    e_value: float
    xcorr: float
    peptide: str
    modified_peptide: str
    proteins: tuple[str, ...]

    @property
    def decoy(self) -> bool:
        """A peptide that a real protein has as well is no decoy."""
        return all(protein.startswith(DECOY_PREFIX) for protein in self.proteins)

    @property
    def targets(self) -> list[str]:
        return [protein for protein in self.proteins if not protein.startswith(DECOY_PREFIX)]


@dataclass(frozen=True)
class Truth:
    """The peptide behind each spectrum title, and those of them that the database holds."""

    peptide: dict[str, str]
    findable: set[str]


def q_values(scores: Sequence[float], decoy: Sequence[bool]) -> list[float]:
    """Return the q-value of each match, in the order given.

    Lower scores are better. Matches of equal score share their fate: no threshold lies between.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__)
    groups = [list(group) for _, group in groupby(order, key=scores.__getitem__)]
    rates = []
    targets = decoys = 0
    for group in groups:
        decoys += sum(decoy[match] for match in group)
        targets += sum(not decoy[match] for match in group)
        rates.append(min(1.0, (decoys + 1) / targets) if targets else 1.0)
    values = [1.0] * len(scores)
    lowest = 1.0
    for group, rate in zip(reversed(groups), reversed(rates), strict=True):
        lowest = min(lowest, rate)
        for match in group:
            values[match] = lowest
    return values


def with_q_values(psms: Sequence[Psm]) -> list[tuple[Psm, float]]:
    """Pair every match with its q-value, best first; the order depends on the matches alone."""
    ranked = sorted(psms, key=lambda psm: (psm.e_value, psm.scan))
    values = q_values([psm.e_value for psm in ranked], [psm.decoy for psm in ranked])
    return list(zip(ranked, values, strict=True))


def best_by(psms: Iterable[Psm], key: Callable[[Psm], Key]) -> list[Psm]:
    """Keep the best match of each key."""
    best: dict[Key, Psm] = {}
    for psm in psms:
        rival = best.setdefault(key(psm), psm)
        if (psm.e_value, -psm.xcorr, psm.scan) < (rival.e_value, -rival.xcorr, rival.scan):
            best[key(psm)] = psm
    return list(best.values())


def same_mass(peptide: str) -> str:
    """Write leucine for isoleucine: no mass spectrum tells them apart."""
    return peptide.replace("I", "L")


def read_matches(chunks: Iterable[Path], titles: dict[int, str]) -> list[Psm]:
    """Read the tables of search.py."""
    psms = []
    for chunk in chunks:
        with chunk.open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE):
                scan = int(row["scan"])
                psm = Psm(
                    scan=scan,
                    title=titles[scan],
                    charge=int(row["charge"]),
                    e_value=float(row["e-value"]),
                    xcorr=float(row["xcorr"]),
                    peptide=row["plain_peptide"],
                    modified_peptide=row["modified_peptide"],
                    proteins=tuple(row["protein"].split(",")),
                )
                psms.append(psm)
    return psms


def read_titles(index: Path) -> dict[int, str]:
    """Read the table of split.py: scan number -> title."""
    with index.open(encoding="utf-8", errors="surrogateescape") as table:
        next(table)
        rows = (line.rstrip("\n").partition("\t") for line in table)
        return {int(scan): title for scan, _, title in rows}


def read_truth(table: Path) -> Truth:
    with table.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return Truth(
        peptide={row["title"]: same_mass(row["peptide"]) for row in rows},
        findable={same_mass(row["peptide"]) for row in rows if row["in_database"] == "1"},
    )


def compared(truth: Truth, psms: Sequence[Psm], peptides: Sequence[Psm]) -> dict[str, float]:
    """Compare the reported matches and peptides with the truth; shares are between 0 and 1."""
    reported = {same_mass(psm.peptide) for psm in peptides}
    recovered = len(reported & truth.findable)
    wrong_psms = sum(same_mass(psm.peptide) != truth.peptide[psm.title] for psm in psms)
    return {
        "true_peptides": len(truth.findable),
        "recovered_peptides": recovered,
        "recovered_share": round(recovered / max(1, len(truth.findable)), 4),
        "false_psm_share": round(wrong_psms / max(1, len(psms)), 4),
        "false_peptide_share": round((len(reported) - recovered) / max(1, len(reported)), 4),
    }


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    lines = ["\t".join(str(cell) for cell in row) for row in [header, *rows]]
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def psm_rows(ranked: Iterable[tuple[Psm, float]], fdr: float) -> list[list[object]]:
    return [
        [
            psm.title,
            psm.charge,
            psm.peptide,
            psm.modified_peptide,
            f"{psm.e_value:.3g}",
            f"{psm.xcorr:.4f}",
            f"{q:.5f}",
            "decoy" if psm.decoy else "target",
            "yes" if accepted(psm, q, fdr) else "no",
            ",".join(psm.proteins),
        ]
        for psm, q in ranked
    ]


def accepted(psm: Psm, q: float, fdr: float) -> bool:
    return not psm.decoy and q <= fdr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("searches", type=Path, nargs="+", help="tables of search.py")
    parser.add_argument("--index", type=Path, required=True, help="table of split.py")
    parser.add_argument("--truth", type=Path, help="table of make_input.py")
    parser.add_argument("--fdr", type=float, default=0.01)
    parser.add_argument("--peptides", type=Path, required=True, help="table to write")
    parser.add_argument("--psms", type=Path, required=True, help="table to write")
    parser.add_argument("--summary", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    titles = read_titles(args.index)
    best = best_by(read_matches(args.searches, titles), lambda psm: psm.scan)
    ranked = with_q_values(best)
    psms = [psm for psm, q in ranked if accepted(psm, q, args.fdr)]
    ranked_peptides = with_q_values(best_by(best, lambda psm: same_mass(psm.peptide)))
    peptides = [(psm, q) for psm, q in ranked_peptides if accepted(psm, q, args.fdr)]

    seen: dict[str, int] = defaultdict(int)
    for psm in psms:
        seen[same_mass(psm.peptide)] += 1
    write_table(
        args.peptides,
        ["peptide", "q_value", "e_value", "xcorr", "accepted_psms", "best_spectrum", "proteins"],
        [
            [
                psm.peptide,
                f"{q:.5f}",
                f"{psm.e_value:.3g}",
                f"{psm.xcorr:.4f}",
                seen[same_mass(psm.peptide)],
                psm.title,
                ",".join(psm.targets),
            ]
            for psm, q in peptides
        ],
    )
    write_table(
        args.psms,
        [
            *("spectrum", "charge", "peptide", "modified_peptide", "e_value", "xcorr"),
            *("q_value", "kind", "accepted", "proteins"),
        ],
        psm_rows(ranked, args.fdr),
    )
    summary = {
        "spectra": len(titles),
        "spectra_with_a_match": len(best),
        "fdr": args.fdr,
        "psms": len(psms),
        "peptides": len(peptides),
    }
    if args.truth:
        found = [psm for psm, _ in peptides]
        summary["truth"] = compared(read_truth(args.truth), psms, found)
    args.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
