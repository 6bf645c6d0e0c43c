"""Write a target-decoy database: every protein, and after it the same protein pseudo-reversed.

Between two cleavage sites (K, R) the residues are reversed while K and R stay where they are.
The decoy peptides have the masses, lengths and number of the real ones but wrong sequences,
so a wrong match hits either kind equally often (Elias & Gygi, Nature Methods 2007).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

PREFIX = "DECOY_"  # Comet's own default prefix


def records(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (header without '>', sequence) of every FASTA record that has a sequence."""
    header, sequence = "", ""
    for line in chain(lines, [">"]):
        if not line.startswith(">"):
            sequence += "".join(line.split())
            continue
        if header and sequence:
            yield header, sequence.upper()
        header, sequence = line[1:].strip(), ""


def pseudo_reversed(sequence: str) -> str:
    """Reverse the stretches between K, R and stop codons; these stay in place."""
    stretches = re.split(r"([KR*])", sequence)
    return "".join(stretch[::-1] for stretch in stretches)


def target_decoy(database: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the FASTA text of each protein and its decoy."""
    for header, sequence in database:
        if header.startswith(PREFIX):
            raise ValueError(f"it contains decoys already ('{header.split()[0]}'): remove them")
        decoy = pseudo_reversed(sequence)
        yield f">{header}\n{sequence}\n>{PREFIX}{header.split()[0]}\n{decoy}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", type=Path, help=".fasta file without decoys")
    parser.add_argument("output", type=Path, help=".fasta file to write")
    args = parser.parse_args()

    with args.database.open(encoding="utf-8", errors="replace") as lines:
        try:
            text = "".join(target_decoy(records(lines)))
        except ValueError as error:
            sys.exit(f"database {args.database}: {error}.")
    if not text:
        sys.exit(f"database {args.database}: no protein sequence in it; a .fasta file is needed.")
    args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
