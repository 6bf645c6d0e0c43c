"""The example workflow: its steps one by one, and the whole of it with the local executor."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORKFLOW = Path(__file__).parents[1] / "example_workflow"
SCRIPTS = WORKFLOW / "scripts"
RULES = ["make_input", "decoys", "split", "search", "merge", "plot"]

needs_comet = pytest.mark.skipif(
    not (shutil.which("comet-ms") or shutil.which("comet")),
    reason="the search engine is not installed (Debian: apt-get install comet-ms)",
)


def load(name: str) -> ModuleType:
    """Import a script that belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


merge = load("merge")
split = load("split")
decoys = load("decoys")
search = load("search")
make_input = load("make_input")
checked_config = load("checked_config")


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile")]
    command += ["--directory", folder.name, "--cores", "2", *arguments]
    # Started next to the folder: relative paths must be looked up in it, not here.
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=120)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def mgf(titles: list[str]) -> str:
    return "".join(
        f"BEGIN IONS\nTITLE={title}\nSCANS=7\nPEPMASS=500.25\nCHARGE=2+\n100.5 3\nEND IONS\n"
        for title in titles
    )


# --- the whole workflow -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the workflow on its own data; return its output folder."""
    folder = tmp_path_factory.mktemp("default run")  # a space in the path is part of the test
    done = snakemake(folder)
    assert done.returncode == 0, done.stderr
    return folder / "results"


@needs_comet
def test_true_peptides_are_recovered(default_run: Path) -> None:
    """Compare peptides.tsv with the truth here, not through the workflow's own summary."""
    truth = table(default_run / "input" / "truth.tsv")
    findable = {row["peptide"].replace("I", "L") for row in truth if row["in_database"] == "1"}
    reported = [row["peptide"].replace("I", "L") for row in table(default_run / "peptides.tsv")]
    assert len(reported) == len(set(reported))
    assert len(findable) == 320
    recovered = findable & set(reported)
    assert len(recovered) >= 0.9 * len(findable)
    assert len(reported) - len(recovered) <= 0.03 * len(reported)

    summary = json.loads((default_run / "summary.json").read_text())
    assert summary["spectra"] == len(truth) == 400
    assert summary["peptides"] == len(reported)
    assert summary["truth"]["recovered_peptides"] == len(recovered)
    assert summary["truth"]["recovered_share"] == round(len(recovered) / 320, 4)


@needs_comet
def test_accepted_matches_are_right_and_at_one_percent(default_run: Path) -> None:
    truth = {row["title"]: row["peptide"] for row in table(default_run / "input" / "truth.tsv")}
    psms = table(default_run / "psms.tsv")
    assert len({psm["spectrum"] for psm in psms}) == len(psms)
    # Comet could add decoys of its own, then of ours too, and the rate would count them twice.
    assert not any("DECOY_DECOY_" in psm["proteins"] for psm in psms)
    passed = [psm for psm in psms if psm["accepted"] == "yes"]
    assert all(psm["kind"] == "target" and float(psm["q_value"]) <= 0.01 for psm in passed)
    worst = max(float(psm["e_value"]) for psm in passed)
    above = [psm for psm in psms if float(psm["e_value"]) <= worst]
    decoy_count = sum(psm["kind"] == "decoy" for psm in above)
    assert (decoy_count + 1) / (len(above) - decoy_count) <= 0.01
    wrong = [
        psm
        for psm in passed
        if psm["peptide"].replace("I", "L") != truth[psm["spectrum"]].replace("I", "L")
    ]
    assert len(wrong) <= 0.03 * len(passed)
    # Wrong matches exist in the data: without them a threshold would prove nothing.
    assert sum(psm["kind"] == "decoy" for psm in psms) >= 20


@needs_comet
def test_report_is_a_picture_of_readable_size(default_run: Path) -> None:
    data = (default_run / "report.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width >= 1200 and height >= 600


@needs_comet
def test_own_data_with_more_chunks_than_spectra(default_run: Path, tmp_path: Path) -> None:
    """Relative paths, an output folder of one's own, empty chunks, and no truth to compare with."""
    blocks = (default_run / "input" / "spectra.mgf").read_text().split("END IONS\n")
    (tmp_path / "few.mgf").write_text("".join(f"{block}END IONS\n" for block in blocks[:3]))
    shutil.copy(default_run / "input" / "database.fasta", tmp_path / "own.fasta")
    done = snakemake(
        tmp_path, "--config", "spectra=few.mgf", "database=own.fasta", "chunks=5", "results=out"
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "results").exists()
    sizes = [len(table(tmp_path / f"out/search/all_{n}.tsv")) for n in range(1, 6)]
    assert sizes[3:] == [0, 0] and sum(sizes) >= 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["spectra"] == 3
    assert summary["peptides"] == 0  # (0 + 1) / 3 is no 1 %
    assert "truth" not in summary
    # The same spectrum has the same match in a chunk of its own as in the large run.
    large = {row["spectrum"]: row for row in table(default_run / "psms.tsv")}
    for row in table(tmp_path / "out" / "psms.tsv"):
        assert row["peptide"] == large[row["spectrum"]]["peptide"]
        assert row["e_value"] == large[row["spectrum"]]["e_value"]


@needs_comet
def test_chunk_count_does_not_change_the_tables(default_run: Path, tmp_path: Path) -> None:
    done = snakemake(tmp_path, "--config", "chunks=3", "--", "results/peptides.tsv")
    assert done.returncode == 0, done.stderr
    for name in ("peptides.tsv", "psms.tsv", "summary.json"):
        assert (tmp_path / "results" / name).read_bytes() == (default_run / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "resources"),
    [
        ([], "schlouder_strategy=one-vm-per-job, schlouder_walltime=8"),
        (
            ["--config", "strategies={search: some-other}", "walltimes={search: 70}"],
            "schlouder_strategy=some-other, schlouder_walltime=70",
        ),
    ],
)
def test_strategy_and_walltime_reach_the_jobs(
    tmp_path: Path, arguments: list[str], resources: str
) -> None:
    done = snakemake(tmp_path, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert output.count(resources) == 8  # one per chunk
    assert "schlouder_strategy=one-vm-for-all, schlouder_walltime=5" in output


def test_wrong_configuration_ends_in_one_line(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "--config", "chunks=0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: config 'chunks' is 0: it must be a whole number of parts to split the spectra "
        "into, 1 or more."
    )
    assert "Traceback" not in done.stderr


# --- configuration ------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A valid configuration, read in a folder that holds its files."""
    monkeypatch.chdir(tmp_path)
    Path("a.mgf").write_text("COM=a comment\n" + mgf(["one"]))
    Path("a.fasta").write_text(">P1 protein\nMAGICK\n")
    Path("empty").touch()
    yield {
        "spectra": "a.mgf",
        "database": "a.fasta",
        "chunks": 4,
        "fdr": 0.05,
        "synthetic_spectra": 10,
        "strategies": {"search": "one-vm-per-job", "merge": None},
        "walltimes": {"search": "70", "plot": 5},
    }


def test_valid_configuration(own_data: dict[str, Any]) -> None:
    found = checked_config.checked(own_data, RULES)
    assert (found.spectra, found.database, found.chunks, found.fdr) == ("a.mgf", "a.fasta", 4, 0.05)
    assert (found.results, found.comet_params) == ("results", None)
    assert found.plan("search") == {
        "schlouder_strategy": "one-vm-per-job",
        "schlouder_walltime": 70,
    }
    assert found.plan("merge") == {}
    assert found.plan("plot") == {"schlouder_walltime": 5}


def test_without_data_the_workflow_makes_its_own(own_data: dict[str, Any]) -> None:
    found = checked_config.checked(own_data | {"spectra": "", "database": None}, RULES)
    assert found.spectra is None and found.database is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectra": "none.mgf"}, r"'spectra' is 'none\.mgf': .* an existing file \(looked from /"),
        ({"spectra": "empty"}, r"'spectra' is 'empty': .* at least one spectrum \('BEGIN IONS'\)"),
        ({"database": "empty"}, r"'database' is 'empty': .* at least one protein \('>'\)"),
        ({"database": None}, r"'database' is empty although 'spectra' is set: .* a \.fasta file"),
        ({"spectra": None}, r"'spectra' is empty although 'database' is set: .* an \.mgf file"),
        ({"chunks": 0}, r"'chunks' is 0: .* 1 or more"),
        ({"chunks": "ten"}, r"'chunks' is 'ten': .* a whole number"),
        ({"chunks": True}, r"'chunks' is True: .* a whole number"),
        ({"synthetic_spectra": -1}, r"'synthetic_spectra' is -1: .* 1 or more"),
        ({"fdr": 1}, r"'fdr' is 1: .* between 0 and 1"),
        ({"fdr": "1%"}, r"'fdr' is '1%': .* between 0 and 1"),
        ({"comet_params": "none"}, r"'comet_params' is 'none': .* an existing file"),
        ({"strategies": {"serch": "x"}}, r"'strategies' names a rule 'serch': known are make_inp"),
        ({"strategies": "x"}, r"'strategies' is 'x': .* a mapping"),
        ({"walltimes": {"search": 0}}, r"'walltimes: search' is '0': .* whole seconds"),
        ({"walltimes": {"search": "soon"}}, r"'walltimes: search' is 'soon': .* whole seconds"),
    ],
)
def test_wrong_configuration_is_named(
    own_data: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checked_config.checked(own_data | change, RULES)
    assert "\n" not in str(caught.value)


# --- make_input ---------------------------------------------------------------------------------


def make(folder: Path, *arguments: object) -> list[bytes]:
    folder.mkdir()
    files = [folder / name for name in ("a.mgf", "a.fasta", "truth.tsv")]
    names = ("--spectra", files[0], "--database", files[1], "--truth", files[2])
    done = run_script("make_input", "--count", 20, *names, *arguments)
    assert done.returncode == 0, done.stderr
    return [file.read_bytes() for file in files]


def test_made_input_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first, again = make(tmp_path / "a"), make(tmp_path / "b")
    other = make(tmp_path / "c", "--seed", 2)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_made_truth_is_true(tmp_path: Path) -> None:
    """Peptides said to be in the database are, between cleavage sites; the others are not."""
    make(tmp_path / "a")
    with (tmp_path / "a" / "a.fasta").open() as lines:
        proteins = [sequence for _, sequence in decoys.records(lines)]
    rows = table(tmp_path / "a" / "truth.tsv")
    assert [row["in_database"] for row in rows].count("0") == 4
    for row in rows:
        inside = any(row["peptide"] in make_input.tryptic_peptides(p) for p in proteins)
        assert inside == (row["in_database"] == "1")


def test_tryptic_peptides() -> None:
    sequence = "AAAAAAAK" + "CCCCKPCCCR" + "DDDK" + "EEEEEEEE"
    assert make_input.tryptic_peptides(sequence) == ["AAAAAAAK", "CCCCKPCCCR", "EEEEEEEE"]


def test_masses_agree_with_published_ones() -> None:
    """Angiotensin II, DRVYIHPF: monoisotopic MH+ 1046.5418; its b2 272.1353, y1 166.0863."""
    assert make_input.mass("DRVYIHPF") + make_input.PROTON == pytest.approx(1046.5418, abs=5e-4)
    ions = list(make_input.fragments("DRVYIHPF", 2))
    assert len(ions) == 14
    assert [mz for series, mz in ions if series == "b"][1] == pytest.approx(272.1353, abs=5e-4)
    assert [mz for series, mz in ions if series == "y"][-1] == pytest.approx(166.0863, abs=5e-4)


# --- decoys -------------------------------------------------------------------------------------


def test_decoys_keep_cleavage_sites_and_reverse_the_rest() -> None:
    assert decoys.pseudo_reversed("MACKDEFRGHK*ILV") == "CAMKFEDRHGK*VLI"
    lines = [">P1 first\n", "mac\n", "KDE\n", "\n", ">P2\n", ">P3\n", "AG\n"]
    assert list(decoys.target_decoy(decoys.records(lines))) == [
        ">P1 first\nMACKDE\n>DECOY_P1\nCAMKED\n",
        ">P3\nAG\n>DECOY_P3\nGA\n",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">P1\n\n", "no protein sequence in it; a .fasta file is needed."),
        (">DECOY_P1\nMK\n", "it contains decoys already ('DECOY_P1'): remove them."),
    ],
)
def test_useless_database(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.fasta").write_text(text)
    done = run_script("decoys", tmp_path / "a.fasta", tmp_path / "out.fasta")
    assert done.returncode == 1
    assert done.stderr == f"database {tmp_path}/a.fasta: {message}\n"
    assert not (tmp_path / "out.fasta").exists()


# --- split --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "chunks", "sizes"),
    [(6, 3, [2, 2, 2]), (7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (2, 4, [1, 1, 0, 0]), (5, 1, [5])],
)
def test_split_is_balanced_and_loses_nothing(
    tmp_path: Path, count: int, chunks: int, sizes: list[int]
) -> None:
    titles = [f"spectrum with name {n}" for n in range(count)]
    (tmp_path / "a.mgf").write_text("COM=kept\n\n" + mgf(titles))
    files = [tmp_path / f"all_{n}.mgf" for n in range(1, chunks + 1)]
    split.split(tmp_path / "a.mgf", files, tmp_path / "index.tsv")

    texts = [file.read_text() for file in files]
    assert [text.count("BEGIN IONS\n") for text in texts] == sizes
    assert all(text.startswith("COM=kept\n") for text in texts)
    lines = [line for text in texts for line in text.splitlines()]
    assert [line[6:] for line in lines if line.startswith("TITLE=")] == titles
    assert [line for line in lines if line.startswith("SCANS=")] == [
        f"SCANS={n}" for n in range(1, count + 1)
    ]
    assert lines.count("100.5 3") == count
    assert merge.read_titles(tmp_path / "index.tsv") == dict(enumerate(titles, 1))


def test_split_keeps_odd_titles(tmp_path: Path) -> None:
    """No title, a tab, bytes that are not UTF-8, lines ending in CRLF."""
    text = mgf(["tab\there", "caf\xe9"]) + "BEGIN IONS\nPEPMASS=1\nEND IONS\n"
    (tmp_path / "a.mgf").write_bytes(text.replace("\n", "\r\n").encode("latin-1"))
    split.split(tmp_path / "a.mgf", [tmp_path / "all_1.mgf"], tmp_path / "index.tsv")
    assert (tmp_path / "index.tsv").read_bytes() == (
        b"scan\ttitle\n1\ttab here\n2\tcaf\xe9\n3\tspectrum 3\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("COM=nothing\n", "no spectra in it (no line 'BEGIN IONS')."),
        (mgf(["one"]) + "BEGIN IONS\nTITLE=two\n1 2\n", "'two' has no line 'END IONS'."),
        ("BEGIN IONS\nTITLE=one\n1 2\n" + mgf(["two"]), "'one' has no line 'END IONS'."),
    ],
)
def test_useless_spectra(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.mgf").write_text(text)
    out = ("--chunks", tmp_path / "all_1.mgf", "--index", tmp_path / "index.tsv")
    done = run_script("split", tmp_path / "a.mgf", *out)
    assert done.returncode == 1
    assert done.stderr.startswith(f"spectra {tmp_path}/a.mgf: ")
    assert done.stderr.endswith(message + "\n") and done.stderr.count("\n") == 1


# --- search -------------------------------------------------------------------------------------


def test_settings_replace_the_defaults_of_comet() -> None:
    defaults = "# comet_version 1\nnum_threads = 0   # 0=poll\nmass = 1.5\n[ENZYMES]\n1. Trypsin\n"
    settings = search.parse_settings("# why = because\nnum_threads = 3  # three\n\nmass = 20\n")
    assert settings == {"num_threads": "3", "mass": "20"}
    assert search.overlay(defaults, settings) == (
        "# comet_version 1\nnum_threads = 3 # 0=poll\nmass = 20 \n[ENZYMES]\n1. Trypsin\n"
    )
    with pytest.raises(SystemExit, match="'masses' is unknown to the installed Comet"):
        search.overlay(defaults, {"masses": "1"})


def test_missing_engine_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="run 'sudo apt-get install comet-ms'"):
        search.comet()


@needs_comet
def test_comet_knows_every_setting_of_the_workflow(tmp_path: Path) -> None:
    subprocess.run([search.comet(), "-p"], cwd=tmp_path, check=True, capture_output=True)
    defaults = (tmp_path / "comet.params.new").read_text()
    settings = search.parse_settings((WORKFLOW / "comet.params").read_text())
    used = search.parse_settings(search.overlay(defaults, settings | search.OUTPUT_SETTINGS))
    assert used["fragment_bin_tol"] == "0.02" and used["output_txtfile"] == "1"
    assert used["peptide_mass_units"] == "2"  # ppm, which comet.params relies on


# --- merge: false discovery rate ----------------------------------------------------------------


def test_q_values_checked_by_hand() -> None:
    """Best first: T T D T T T D. Rates (decoys + 1) / targets: 1/1 1/2 2/2 2/3 2/4 2/5 3/5.

    The q-value is the lowest rate from there on down: 2/5 for all but the last, 3/5.
    """
    scores = [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
    decoy = [False, False, True, False, False, False, True]
    assert merge.q_values(scores, decoy) == pytest.approx([0.4] * 6 + [0.6])


def test_q_values_rise_and_follow_the_order_given() -> None:
    """T T T T D T D T by score: rates 1, 1/2, 1/3, 1/4, 2/4, 2/5, 3/5, 3/6."""
    by_score = [False, False, False, False, True, False, True, False]
    expected = [0.25, 0.25, 0.25, 0.25, 0.4, 0.4, 0.5, 0.5]
    assert merge.q_values(list(range(8)), by_score) == pytest.approx(expected)
    mixed = [5, 0, 7, 2, 4, 1, 6, 3]
    values = merge.q_values(mixed, [by_score[place] for place in mixed])
    assert values == pytest.approx([expected[place] for place in mixed])


def test_equal_scores_share_a_q_value() -> None:
    """Two targets, then a target and a decoy of equal score: 1/1 1/2, then both (1+1)/3 at once."""
    values = merge.q_values([1, 2, 3, 3], [False, False, False, True])
    assert values == pytest.approx([0.5, 0.5, 2 / 3, 2 / 3])
    assert merge.q_values([3, 1, 3, 2], [True, False, False, False]) == pytest.approx(
        [2 / 3, 0.5, 2 / 3, 0.5]
    )


def test_one_percent_takes_a_hundred_targets() -> None:
    assert max(merge.q_values(list(range(99)), [False] * 99)) > 0.01
    assert merge.q_values(list(range(100)), [False] * 100) == pytest.approx([0.01] * 100)


def test_q_values_of_extreme_lists() -> None:
    assert merge.q_values([], []) == []
    assert merge.q_values([1, 2], [True, True]) == [1.0, 1.0]


def psm(
    scan: int, e_value: float, peptide: str = "PEPTIDEK", *proteins: str, xcorr: float = 1.0
) -> Any:
    return merge.Psm(
        scan=scan,
        title=f"t{scan}",
        charge=2,
        e_value=e_value,
        xcorr=xcorr,
        peptide=peptide,
        modified_peptide=f"-.{peptide}.-",
        proteins=proteins or ("P1",),
    )


def test_best_match_per_spectrum() -> None:
    """The lower E-value wins; at equal E-value the higher xcorr, in whatever order they come."""
    matches = [psm(1, 1e-3), psm(1, 1e-5), psm(2, 1.0, xcorr=1), psm(2, 1.0, xcorr=2)]
    for order in (matches, matches[::-1]):
        best = {match.scan: match for match in merge.best_by(order, lambda match: match.scan)}
        assert best[1].e_value == 1e-5 and best[2].xcorr == 2


def test_peptide_of_a_real_protein_is_no_decoy() -> None:
    assert psm(1, 1, "AK", "DECOY_P1").decoy
    shared = psm(1, 1, "AK", "DECOY_P1", "P2")
    assert not shared.decoy and shared.targets == ["P2"]


def test_comparison_with_the_truth() -> None:
    """Three findable peptides, two of them reported (one with I for L), and a wrong one."""
    truth = merge.Truth(
        peptide={"t1": "LLK", "t2": "GGK", "t3": "AAK", "t4": "FFR"},
        findable={"LLK", "GGK", "AAK"},
    )
    matches = [psm(1, 1e-9, "ILK"), psm(2, 1e-8, "GGK"), psm(4, 1e-7, "WWK")]
    assert merge.compared(truth, matches, matches) == {
        "true_peptides": 3,
        "recovered_peptides": 2,
        "recovered_share": 0.6667,
        "false_psm_share": 0.3333,
        "false_peptide_share": 0.3333,
    }
