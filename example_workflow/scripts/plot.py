"""Draw the result: how targets and decoys score, and how many spectra each rate accepts."""

from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # machines that run jobs have no display

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

TARGET, DECOY, LIMIT = "#1b6ca8", "#d1495b", "#333333"
BIN_WIDTH = 0.5  # in -log10(E-value)


@dataclass(frozen=True)
class Match:
    score: float  # -log10(E-value)
    q: float
    decoy: bool
    accepted: bool


def read_matches(table: Path) -> list[Match]:
    with table.open(encoding="utf-8", errors="replace", newline="") as lines:
        return [
            Match(
                # Comet rounds very small E-values to zero; 1e-30 keeps them on the axis.
                score=-math.log10(max(float(row["e_value"]), 1e-30)),
                q=float(row["q_value"]),
                decoy=row["kind"] == "decoy",
                accepted=row["accepted"] == "yes",
            )
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def draw_scores(axes: Any, matches: list[Match], fdr: float) -> None:
    """Histogram of the scores, with the lowest accepted score."""
    scores = [match.score for match in matches] or [0.0]
    first = math.floor(min(scores) / BIN_WIDTH)
    last = math.ceil(max(scores) / BIN_WIDTH) + 1
    bins = [BIN_WIDTH * edge for edge in range(first, last + 1)]
    for decoy, colour, name in ((False, TARGET, "targets"), (True, DECOY, "decoys")):
        values = [match.score for match in matches if match.decoy == decoy]
        label = f"{name} ({len(values):,})"
        axes.hist(values, bins, color=colour, alpha=0.35)
        axes.hist(values, bins, color=colour, histtype="step", linewidth=1.6, label=label)
    passed = [match.score for match in matches if match.accepted]
    if passed:
        label = f"threshold at {percent(fdr)} FDR: E = {10 ** -min(passed):.2g}"
        axes.axvline(min(passed), color=LIMIT, linestyle="--", linewidth=1.4, label=label)
    axes.set_title("Best match of each spectrum", loc="left")
    axes.set_xlabel("score, -log₁₀(E-value)   (better →)")
    axes.set_ylabel(f"spectra per {BIN_WIDTH:g} score units")
    axes.legend(frameon=False)


def draw_q_values(axes: Any, matches: list[Match], fdr: float) -> None:
    """Accepted targets as a function of the false discovery rate one is ready to bear."""
    shown = max(0.05, 2 * fdr)
    values = sorted(match.q for match in matches if not match.decoy)
    inside = [q for q in values if q <= shown]
    accepted = sum(match.accepted for match in matches)
    axes.step(
        [0.0, *(100 * q for q in inside), 100 * shown],
        [*range(len(inside) + 1), len(inside)],
        where="post",
        color=TARGET,
        linewidth=1.8,
    )
    axes.axvline(100 * fdr, color=LIMIT, linestyle="--", linewidth=1.4)
    axes.annotate(
        f"{accepted:,} spectra at {percent(fdr)}"
        if accepted
        else f"no list reaches {percent(fdr)}",
        (100 * fdr, accepted),
        xytext=(10, -18 if accepted else 12),
        textcoords="offset points",
    )
    axes.set_xlim(0, 100 * shown)
    axes.set_ylim(0, max(10, 1.08 * len(inside)))
    axes.set_title("Identified spectra", loc="left")
    axes.set_xlabel("false discovery rate (q-value), %")
    axes.set_ylabel("accepted target matches")


def headline(summary: dict[str, Any]) -> str:
    text = (
        f"{summary['psms']:,} of {summary['spectra']:,} spectra and {summary['peptides']:,} "
        f"peptides identified at {percent(summary['fdr'])} FDR"
    )
    if truth := summary.get("truth"):
        recovered, wrong = percent(truth["recovered_share"]), percent(truth["false_psm_share"])
        text += (
            f"\ntruth known: {recovered} of {truth['true_peptides']:,} peptides recovered, "
            f"{wrong} of the identified spectra wrong"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("psms", type=Path, help="table of merge.py")
    parser.add_argument("summary", type=Path, help="JSON file of merge.py")
    parser.add_argument("output", type=Path, help=".png file to write")
    args = parser.parse_args()

    summary = json.loads(args.summary.read_text(encoding="utf-8"))
    matches = read_matches(args.psms)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    draw_scores(left, matches, summary["fdr"])
    draw_q_values(right, matches, summary["fdr"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(headline(summary))
    figure.savefig(args.output, dpi=150)


if __name__ == "__main__":
    main()
