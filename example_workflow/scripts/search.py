"""Search one chunk of spectra with Comet; write its best match per spectrum and charge as .tsv.

The parameter file is Comet's own default with the given settings on top: Comet refuses the
parameter file of another Comet version.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = ("comet-ms", "comet")  # the name in Debian, the name upstream
# What merge.py relies on: one line per spectrum and charge, with E-value and all proteins.
OUTPUT_SETTINGS = {
    "output_txtfile": "1",
    "output_pepxmlfile": "0",
    "num_output_lines": "1",
    "print_expect_score": "1",
    "max_duplicate_proteins": "-1",
    "decoy_search": "0",
}
COLUMNS = (
    "scan", "charge", "e-value", "xcorr", "plain_peptide", "modified_peptide", "protein",
)  # fmt: skip


def comet() -> str:
    """Return the path of the search engine."""
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path
    sys.exit("comet-ms is not installed on this machine: run 'sudo apt-get install comet-ms'.")


def run(command: list[str], directory: Path) -> None:
    """Run Comet; show what it said only if it failed."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stdout}{done.stderr}"
        )


def parse_settings(text: str) -> dict[str, str]:
    """Read lines `name = value  # comment`."""
    settings = {}
    for line in text.splitlines():
        name, equals, value = line.partition("#")[0].partition("=")
        if equals:
            settings[name.strip()] = value.strip()
    return settings


def overlay(defaults: str, settings: dict[str, str]) -> str:
    """Return Comet's default parameter file with some values replaced."""
    text = defaults
    for name, value in settings.items():
        line = re.compile(rf"^{re.escape(name)}\s*=[^#\n]*", re.MULTILINE)
        text, found = line.subn(f"{name} = {value} ", text)
        if not found:
            sys.exit(f"Comet parameter '{name}' is unknown to the installed Comet (comet-ms -p).")
    return text


def search(spectra: Path, database: Path, settings: dict[str, str]) -> str:
    """Return Comet's table: a title line, a header line and one line per match."""
    engine = comet()
    with tempfile.TemporaryDirectory() as name:
        # Links with short names: Comet cuts long paths and reads a colon as a range of scans.
        work = Path(name)
        (work / "chunk.mgf").symlink_to(spectra.resolve())
        (work / "database.fasta").symlink_to(database.resolve())
        run([engine, "-p"], work)
        params = overlay((work / "comet.params.new").read_text(), settings)
        (work / "comet.params").write_text(params)
        run([engine, "-Pcomet.params", "-Ddatabase.fasta", "-Nfound", "chunk.mgf"], work)
        table = work / "found.txt"
        # Without a single spectrum to search Comet succeeds and writes no table.
        return table.read_text() if table.exists() else ""


def reduced(table: str) -> str:
    """Keep the columns that matter, without Comet's title line: it holds the date."""
    lines = [line.split("\t") for line in table.splitlines()[1:]]
    rows = ["\t".join(COLUMNS)]
    if lines:
        places = [lines[0].index(column) for column in COLUMNS]
        rows += ["\t".join(cells[place] for place in places) for cells in lines[1:]]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spectra", type=Path, help=".mgf file, may be empty")
    parser.add_argument("output", type=Path, help=".tsv file to write")
    parser.add_argument("--database", type=Path, required=True, help="target-decoy .fasta file")
    parser.add_argument("--params", type=Path, required=True, help="settings that differ")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    settings = parse_settings(args.params.read_text())
    settings |= OUTPUT_SETTINGS | {"num_threads": str(args.threads)}
    args.output.write_text(reduced(search(args.spectra, args.database, settings)))


if __name__ == "__main__":
    main()
