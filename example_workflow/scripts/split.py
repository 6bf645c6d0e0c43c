"""Split an .mgf file into balanced chunks that are .mgf files themselves.

Every spectrum gets its position in the whole file as scan number: search engines report scan
numbers only, and those of the input may be absent or repeated. The index says which title
belongs to which number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, TextIO

BEGIN, END = "BEGIN IONS", "END IONS"


def spectra(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the lines of every spectrum, BEGIN IONS to END IONS."""
    block: list[str] | None = None
    for line in lines:
        if line.startswith(BEGIN):
            if block is not None:
                break
            block = []
        if block is not None:
            block.append(line)
            if line.startswith(END):
                yield block
                block = None
    if block is not None:
        raise ValueError(f"the spectrum '{title(block, 'without title')}' has no line '{END}'")


def title(block: list[str], default: str) -> str:
    """Return the title of a spectrum in one cell of a table."""
    found = (line.partition("=")[2] for line in block if line.startswith("TITLE="))
    return " ".join(next(found, "").split()) or default


def numbered(block: list[str], scan: int) -> str:
    """Return the text of a spectrum with `scan` as its only scan number."""
    kept = [line for line in block[1:] if not line.startswith("SCANS=")]
    return "".join([f"{BEGIN}\nSCANS={scan}\n", *kept])


def chunk_sizes(spectra: int, chunks: int) -> list[int]:
    """Return the number of spectra of each chunk; they differ by one at most.

    >>> chunk_sizes(7, 3)
    [3, 2, 2]
    """
    smaller, larger_ones = divmod(spectra, chunks)
    return [smaller + (number < larger_ones) for number in range(chunks)]


def opened(path: Path, mode: Literal["r", "w"] = "r") -> TextIO:
    """Open a text file; bytes that are not UTF-8 pass through unchanged."""
    return path.open(mode, encoding="utf-8", errors="surrogateescape")


def split(source: Path, chunks: list[Path], index: Path) -> None:
    """Write the chunks and the index. `source` is streamed: it may exceed the memory."""
    with opened(source) as lines:
        common = "".join(takewhile(lambda line: not line.startswith(BEGIN), lines))
    with opened(source) as lines:
        count = sum(1 for _ in spectra(lines))
    if count == 0:
        raise ValueError(f"no spectra in it (no line '{BEGIN}')")

    with opened(source) as lines, opened(index, "w") as table:
        remaining = enumerate(spectra(lines), 1)
        table.write("scan\ttitle\n")
        for size, chunk in zip(chunk_sizes(count, len(chunks)), chunks, strict=True):
            with opened(chunk, "w") as out:
                out.write(common)
                for scan, block in islice(remaining, size):
                    out.write(numbered(block, scan))
                    table.write(f"{scan}\t{title(block, f'spectrum {scan}')}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spectra", type=Path, help=".mgf file")
    parser.add_argument("--chunks", type=Path, nargs="+", required=True, help="files to write")
    parser.add_argument("--index", type=Path, required=True, help="table to write: scan, title")
    args = parser.parse_args()
    try:
        split(args.spectra, args.chunks, args.index)
    except ValueError as error:
        sys.exit(f"spectra {args.spectra}: {error}.")


if __name__ == "__main__":
    main()
