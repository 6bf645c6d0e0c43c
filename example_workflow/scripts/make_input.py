"""Make a small data set with known truth: proteins, noisy spectra of their peptides, the answer.

Every peptide is synthetic. Spectra consist of b and y ions with missing peaks, mass errors and
noise. One spectrum in five comes from a protein that is absent from the database, as
contaminants do in reality, so that wrong matches exist for the false discovery rate to find.
The output depends on the arguments alone.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Monoisotopic residue masses in Da; cysteine is carbamidomethylated, as after the usual alkylation.
RESIDUE_MASS = {
    "G": 57.021464, "A": 71.037114, "S": 87.032028, "P": 97.052764, "V": 99.068414,
    "T": 101.047679, "C": 160.030649, "L": 113.084064, "I": 113.084064, "N": 114.042927,
    "D": 115.026943, "Q": 128.058578, "K": 128.094963, "E": 129.042593, "M": 131.040485,
    "H": 137.058912, "F": 147.068414, "R": 156.101111, "Y": 163.063329, "W": 186.079313,
}  # fmt: skip
# Rounded shares (%) of the residues in an average protein.
COMPOSITION = {
    "A": 8, "R": 6, "N": 4, "D": 5, "C": 2, "Q": 4, "E": 6, "G": 7, "H": 2, "I": 6,
    "L": 10, "K": 6, "M": 2, "F": 4, "P": 5, "S": 7, "T": 5, "W": 1, "Y": 3, "V": 7,
}  # fmt: skip
PROTON = 1.007276  # Da
WATER = 18.010565  # Da
PEPTIDE_LENGTH = range(8, 26)
PROTEIN_LENGTH = (150, 450)
PROTEINS_PER_SPECTRUM = 1.5  # most proteins of the database have no spectrum, as in reality
FOREIGN_SHARE = 0.2  # of the spectra
PRECURSOR_ERROR = 4e-6  # standard deviation, relative
FRAGMENT_ERROR = 0.004  # standard deviation in Da
NOISE_PEAKS = (60, 140)
LOWEST_MZ = 100.0


@dataclass(frozen=True)
class Origin:
    """The truth about one spectrum."""

    peptide: str
    charge: int
    in_database: bool


def protein(rng: random.Random) -> str:
    residues, weights = list(COMPOSITION), list(COMPOSITION.values())
    return "M" + "".join(rng.choices(residues, weights, k=rng.randint(*PROTEIN_LENGTH)))


def tryptic_peptides(sequence: str) -> list[str]:
    """Cut behind K and R unless P follows; keep the lengths that spectra are made of."""
    pieces = re.split(r"(?<=[KR])(?!P)", sequence)
    return [piece for piece in pieces if len(piece) in PEPTIDE_LENGTH]


def draw_peptides(rng: random.Random, proteins: list[str], count: int) -> list[str]:
    """Draw `count` different peptides; I and L weigh the same, so they count as one residue."""
    unique = {p.replace("I", "L"): p for sequence in proteins for p in tryptic_peptides(sequence)}
    return rng.sample(list(unique.values()), count)


def mass(peptide: str) -> float:
    return sum(RESIDUE_MASS[residue] for residue in peptide) + WATER


def fragments(peptide: str, charge: int) -> Iterator[tuple[str, float]]:
    """Yield (series, m/z) of all b and y ions; triply charged precursors give 2+ ions too."""
    total = mass(peptide)
    prefix = 0.0
    for residue in peptide[:-1]:
        prefix += RESIDUE_MASS[residue]
        for z in range(1, charge):
            yield "b", prefix / z + PROTON
            yield "y", (total - prefix) / z + PROTON


def peaks(rng: random.Random, peptide: str, charge: int) -> list[tuple[float, float]]:
    """Return the (m/z, intensity) pairs of one spectrum in order of m/z."""
    quality = rng.uniform(0.2, 0.75)  # share of the y ions that are seen
    seen = {"y": quality, "b": 0.6 * quality}
    height = {"y": 6.0, "b": 5.3}  # ln of the median intensity; noise: 4.6
    found = [
        (mz + rng.gauss(0, FRAGMENT_ERROR), rng.lognormvariate(height[series], 0.8))
        for series, mz in fragments(peptide, charge)
        if mz > LOWEST_MZ and rng.random() < seen[series]
    ]
    noise = [
        (rng.uniform(LOWEST_MZ, mass(peptide)), rng.lognormvariate(4.6, 0.6))
        for _ in range(rng.randint(*NOISE_PEAKS))
    ]
    return sorted(found + noise)


def precursor_charge(peptide: str, rng: random.Random) -> int:
    return 3 if mass(peptide) > 1500 and rng.random() < 0.5 else 2


def mgf_block(rng: random.Random, title: str, origin: Origin) -> str:
    charge = origin.charge
    mz = mass(origin.peptide) / charge + PROTON
    lines = [
        "BEGIN IONS",
        f"TITLE={title}",
        f"PEPMASS={mz * (1 + rng.gauss(0, PRECURSOR_ERROR)):.5f}",
        f"CHARGE={charge}+",
        *(f"{mz:.5f} {height:.1f}" for mz, height in peaks(rng, origin.peptide, charge)),
        "END IONS",
    ]
    return "\n".join(lines) + "\n"


def fasta(sequences: list[str]) -> str:
    records = []
    for number, sequence in enumerate(sequences, 1):
        lines = [sequence[i : i + 60] for i in range(0, len(sequence), 60)]
        records.append("\n".join([f">SYN{number:04d} synthetic protein", *lines]) + "\n")
    return "".join(records)


def draw_origins(rng: random.Random, count: int, database: list[str]) -> list[Origin]:
    """Choose the peptides behind `count` spectra, in random order."""
    foreign = round(count * FOREIGN_SHARE)
    strangers = [protein(rng) for _ in range(1 + foreign)]
    chosen = [(peptide, True) for peptide in draw_peptides(rng, database, count - foreign)]
    chosen += [(peptide, False) for peptide in draw_peptides(rng, strangers, foreign)]
    rng.shuffle(chosen)
    return [Origin(peptide, precursor_charge(peptide, rng), known) for peptide, known in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="number of spectra")
    parser.add_argument("--seed", type=int, default=1, help="start of the random numbers")
    parser.add_argument("--spectra", type=Path, required=True, help=".mgf file to write")
    parser.add_argument("--database", type=Path, required=True, help=".fasta file to write")
    parser.add_argument("--truth", type=Path, required=True, help="table to write: title, peptide")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    database = [protein(rng) for _ in range(1 + round(args.count * PROTEINS_PER_SPECTRUM))]
    origins = {
        f"synthetic.{number}": origin
        for number, origin in enumerate(draw_origins(rng, args.count, database), 1)
    }
    args.database.write_text(fasta(database))
    args.spectra.write_text("".join(mgf_block(rng, title, o) for title, o in origins.items()))
    rows = [f"{title}\t{o.peptide}\t{int(o.in_database)}\n" for title, o in origins.items()]
    args.truth.write_text("title\tpeptide\tin_database\n" + "".join(rows))


if __name__ == "__main__":
    main()
