"""The resources of the slurm plugin on real Slurm: what it was asked, on which VM, what is refused, and
names of every kind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from workflows import Site

from snakemake_executor_plugin_schlouder.recording import decoded, read

pytestmark = pytest.mark.integration

TYPES = "m5.large,m5.4xlarge,g4dn.xlarge"

ASKING = """
SHOW = "scontrol show job $SLURM_JOB_ID > {output}; scontrol show node $SLURMD_NODENAME >> {output}"
rule all:
    input: expand("out/{name}", name="many negative gpu constraint mpi tmp".split())
rule many:
    output: "out/many"
    threads: 2
    resources:
        tasks=3, mem_mb=1, mem_mb_per_cpu=100, runtime=7, slurm_account="lab", qos="high",
        slurm_partition="elsewhere", cluster="other", slurm_requeue=True, disk_mb=2000,
        slurm_extra="--nice=7 --mail-type NONE"
    shell: SHOW
rule negative:
    output: "out/negative"
    threads: 2
    resources: cpus_per_task=-1, slurm_partition="elsewhere"
    shell: SHOW
rule gpu:
    output: "out/gpu"
    resources: gpu=1, gpu_model="t4"
    shell: SHOW
rule constraint:
    output: "out/constraint"
    resources: constraint="schlouder&m5.4xlarge|x1.32xlarge&m5.4xlarge"
    shell: SHOW
rule mpi:
    output: "out/mpi"
    resources: mpi="srun", tasks=2
    shell: "{resources.mpi} -n {resources.tasks} sh -c 'echo rank $SLURM_PROCID' > {output}"
rule tmp:
    output: "out/tmp"
    shell: "touch {resources.tmpdir}/x && mktemp > {output}"
"""

GROUP = """
rule all:
    input: "sum"
rule one:
    output: "out/{i}"
    group: "together"
    resources: tasks=1, mem_mb_per_cpu=100, schlouder_walltime=5
    shell:
        "touch begun-{wildcards.i}; "
        "for i in $(seq 300); do [ $(ls begun-* | wc -l) = 4 ] && break; sleep 0.1; done; "
        "ls begun-* | wc -l > {output}"
rule sum:
    input: expand("out/{i}", i=range(4))
    output: "sum"
    group: "together"
    resources: schlouder_walltime=3
    shell: "cat {input} > {output}; scontrol show job $SLURM_JOB_ID > shown"
"""

WRONG = """
rule all:
    input: expand("{i}", i=list("abcdefghi"))
rule spread:
    output: "a"
    resources: nodes=2, tasks=4
    shell: "true"
rule extra:
    output: "b"
    resources: slurm_extra="--job-name=x --nodel=n1 -w n1 --exclusive"
    shell: "true"
rule gres:
    output: "c"
    resources: gres="license:1", mem_mb=-1, schlouder_walltime="soon"
    shell: "true"
rule model:
    output: "d"
    resources: gpu_model="t4"
    shell: "true"
rule ranks:
    output: "e"
    resources: tasks=4, tasks_per_node=2
    shell: "true"
rule syntax:
    output: "f"
    resources: constraint="[rack1|rack2]"
    shell: "true"
rule both:
    output: "g"
    resources: gpu=1, gres="gpu:1"
    shell: "true"
rule wide:
    output: "h"
    resources: nodes=21, mpi="srun", tasks=42
    shell: "true"
rule fine:
    output: "i"
    resources: nodes=1, tasks=2, tasks_per_node=2
    shell: "true"
"""

NAMES = [
    *("a b", "it's", 'say "hi" there', "semi;colon", "$(touch hacked)", "it's $(touch hacked)"),
    *("`touch hacked`", "$HOME", "a&b|c>d", "back\\slash", "per%cent%j", "st*r?", "üñí☃"),
    "".join(map(str, range(90))) + "/" + "".join(map(str, range(100, 150))),
]

QUOTED = "'a'$(touch hacked)"
"""Looks quoted; Snakemake itself takes the quotes off a wildcard, but not off a file."""

NAMED = f"""
rule all:
    input: expand("out/{{n}}.txt", n={NAMES!r}), "out/line\\nbreak", "out/named", "out/long"
rule one:
    input: "in/{{n}}"
    output: "out/{{n}}.txt"
    log: "logs/{{n}}.log"
    shell: "printf %s {{wildcards.n:q}} 2>&1 >{{output:q}} | tee {{log:q}}"
rule break:
    input: expand("out/{{n}}.txt", n={NAMES[:6]!r}), {QUOTED!r}
    output: "out/line\\nbreak"
    shell: "touch {{output:q}}"
rule:
    name: "a rule; $(touch hacked) 'x'"
    output: "out/named"
    shell: "touch {{output}}"
rule {"l" * 300}:
    input: expand("in/many{{i}}", i=range(25))
    output: "out/long"
    shell: "touch {{output}}"
"""


def test_slurm_is_asked_for_what_the_rule_asks_for(site: Site) -> None:
    site.write(ASKING)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as not_on_vms:
        done = site.run("--schlouder-instance-types", TYPES, TMPDIR=not_on_vms)
    assert done.returncode == 0, done.stdout
    shown = {path.name: path.read_text() for path in (site.directory / "out").iterdir()}
    for text in (
        *("NumCPUs=6 NumTasks=3 CPUs/Task=2", "MinMemoryNode=600M", "TimeLimit=00:07:00"),
        *("Account=lab", "Nice=7", "NumNodes=1", "Requeue=0", "m5.4xlarge"),
        "Partition=schlouder",
    ):
        assert text in shown["many"]
    assert "NumCPUs=1 NumTasks=1 CPUs/Task=1" in shown["negative"]
    assert "ActiveFeatures=schlouder,g4dn.xlarge" in shown["gpu"]
    assert "ActiveFeatures=schlouder,m5.4xlarge" in shown["constraint"]
    assert sorted(shown["mpi"].splitlines()) == ["rank 0", "rank 1"]
    assert shown["tmp"].strip() and not Path(shown["tmp"].strip()).exists()
    assert done.stdout.count("the resource slurm_partition is not used") == 1
    assert done.stdout.count("the resource cluster is not used") == 1


def test_a_group_runs_side_by_side_and_comes_as_one_task(site: Site) -> None:
    site.write(GROUP)
    done = site.run(
        *("--schlouder-instance-types", "m5.4xlarge", "--schlouder-record", "run.jsonl")
    )
    assert done.returncode == 0, done.stdout
    assert (site.directory / "sum").read_text().split() == ["4"] * 4
    shown = (site.directory / "shown").read_text()
    assert "NumCPUs=4 NumTasks=1" in shown
    assert "MinMemoryNode=400M" in shown
    lines = list(read(site.directory / "run.jsonl"))
    (announced,) = (decoded(line.asked) for line in lines if line.name == "expect")
    (given,) = (decoded(line.asked) for line in lines if line.name == "submit")
    assert [task.rule for task in announced] == [task.rule for task in given]
    (planned,), (task,) = announced, given
    assert (planned.planned, planned.need) == (task.planned, task.need)
    assert task.planned == 5 + 3


def test_all_that_is_wrong_is_told_at_once_before_any_vm_starts(site: Site) -> None:
    site.write(WRONG)
    before = len(site.instances())
    done = site.run()
    assert done.returncode == 1
    for text in (
        "rule spread: nodes: 2 is not allowed; only a job with the resource mpi",
        "rule wide: nodes: 21 is not allowed; --schlouder-max-vms allows 20 VMs",
        "the option --job-name is not yours to give",
        "the option --nodel is not yours to give",
        "the option -w is not yours to give",
        "'n1' is no option of sbatch",
        "the option --exclusive is not yours to give: use --schlouder-sharing",
        "rule gres: gres: 'license:1' is not allowed",
        "rule gres: mem_mb: -1 is not allowed",
        "rule gres: schlouder_walltime: 'soon' is no duration",
        "rule model: gpu_model: 't4' is not allowed; the number of GPUs",
        "rule ranks: tasks: 4 is not allowed",
        "rule syntax: constraint: '[rack1|rack2]' is not allowed",
        "rule both: gres: 'gpu:1' is not allowed; give either gres or gpu",
    ):
        assert done.stdout.count(text) == 1, (text, done.stdout)
    assert "rule fine" not in done.stdout
    assert "Traceback" not in done.stdout
    assert len(site.instances()) == before


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("gpu=2", " MiB, 2 GPUs; the allowed instance types offer"),
        ("gpu=1, gpu_model='v100'", "1 GPU v100; the allowed instance types offer"),
        ("constraint='m5.large&avx'", "names avx, which no VM has as a feature; allowed are"),
        ("constraint='m5.large&m5.4xlarge'", "with the features m5.large&m5.4xlarge; the allowed"),
        ("tasks=20", "rule one needs 20 cpus"),
    ],
)
def test_a_rule_that_no_vm_can_run_is_refused(site: Site, resources: str, message: str) -> None:
    site.write(f"rule one:\n    output: 'a'\n    resources: {resources}\n    shell: 'touch a'\n")
    before = len(site.instances())
    done = site.run("--schlouder-instance-types", TYPES)
    assert done.returncode == 1
    assert message in done.stdout
    assert "g4dn.xlarge" in done.stdout
    assert len(site.instances()) == before


def test_what_sbatch_refuses_is_the_error_of_the_job(site: Site) -> None:
    site.write(
        "rule one:\n    output: 'a'\n    resources: reservation='nope'\n    shell: 'touch a'\n",
    )
    done = site.run()
    assert done.returncode == 1
    assert "Slurm refused the job" in done.stdout
    assert "reservation" in done.stdout.split("Slurm refused the job")[1].splitlines()[0]


def test_names_of_every_kind_reach_the_job_as_they_are(site: Site) -> None:
    site.write(NAMED)
    for name in (*NAMES, *(f"many{i}" for i in range(25))):
        path = site.directory / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (site.directory / QUOTED).touch()
    done = site.run("--keep-going")
    assert done.returncode == 0, done.stdout
    for name in NAMES:
        assert (site.directory / "out" / f"{name}.txt").read_text() == name
        assert (site.directory / "logs" / f"{name}.log").exists()
    for name in ("line\nbreak", "named", "long"):
        assert (site.directory / "out" / name).exists()
    assert not (site.directory / "hacked").exists()


def test_a_workflow_may_lie_in_a_directory_of_any_name(site: Site) -> None:
    directory = site.directory / 'it\'s $(touch hacked); `id` "a b" é %j'
    directory.mkdir()
    odd = Site.make(
        site.cloud, directory, "rule one:\n    output: 'a'\n    shell: 'pwd >{output}'\n"
    )
    done = odd.run()
    assert done.returncode == 0, done.stdout
    assert (directory / "a").read_text() == f"{directory}\n"
    assert not list(site.directory.rglob("hacked"))
