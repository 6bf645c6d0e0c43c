"""What a rule's resources ask for, as plain data: CPUs, tasks, memory, GPUs, features, options of sbatch."""

from __future__ import annotations

from typing import Any

import pytest

from snakemake_executor_plugin_schlouder.market.offers import Offers
from snakemake_executor_plugin_schlouder.model import InstanceType, Need, SchlouderError
from snakemake_executor_plugin_schlouder.planning import too_big
from snakemake_executor_plugin_schlouder.resources import demand, of_group

SMALL = InstanceType("m5.large", 2, 8192)
T4 = InstanceType("g4dn.xlarge", 4, 16384, 1, "t4")
FOUR = InstanceType("p3.8xlarge", 32, 249856, 4, "v100")


def need(threads: int = 2, **resources: Any) -> Need:
    return demand("r", threads, resources).need


def problem(**resources: Any) -> str:
    with pytest.raises(SchlouderError) as caught:
        demand("r", 1, resources)
    return str(caught.value)


@pytest.mark.parametrize(
    ("resources", "cpus", "tasks"),
    [
        ({}, 2, 1),
        ({"cpus_per_task": 5}, 5, 1),
        ({"cpus_per_task": 0}, 2, 1),
        ({"cpus_per_task": -1}, 1, 1),
        ({"cpus_per_task": "<TBD>"}, 2, 1),
        ({"tasks": 3}, 6, 3),
        ({"tasks": 3, "cpus_per_task": 4}, 12, 3),
        ({"tasks_per_node": 4, "nodes": 1, "mpi": "mpirun"}, 8, 4),
        ({"tasks": 2, "tasks_per_node": 4}, 4, 2),
        ({"gpu": 2}, 2, 1),
        ({"gpu": 2, "tasks_per_gpu": 3}, 12, 6),
        ({"gpu": 2, "tasks_per_gpu": -1}, 2, 1),
        ({"gpu": 2, "cpus_per_gpu": 3}, 6, 1),
        ({"gpus": 2, "cpus_per_gpu": 3, "tasks": 4}, 8, 4),
        ({"cpus_per_gpu": 3}, 2, 1),
    ],
)
def test_cpus_are_those_of_all_tasks(resources: dict[str, Any], cpus: int, tasks: int) -> None:
    asked = demand("r", 2, resources)
    assert (asked.need.cpus, asked.options.tasks) == (cpus, tasks)
    assert asked.need.cpus % asked.options.tasks == 0, "Slurm gives each task the same number"


@pytest.mark.parametrize(
    ("resources", "of_each", "tasks"),
    [
        ({"nodes": 2, "tasks": 4}, Need(4, 0, nodes=2), 4),
        ({"nodes": 2, "tasks": 5, "cpus_per_task": 1}, Need(3, 0, nodes=2), 5),
        ({"nodes": 3, "tasks_per_node": 2}, Need(4, 0, nodes=3), 6),
        ({"nodes": 2, "tasks": 4, "mem_mb": 700}, Need(4, 700, nodes=2), 4),
        ({"nodes": 2, "tasks": 4, "mem_mb_per_cpu": 100}, Need(4, 400, nodes=2), 4),
        ({"nodes": 2, "gpu": 3, "tasks_per_gpu": 1}, Need(4, 0, 2, nodes=2), 3),
    ],
)
def test_an_mpi_job_takes_an_even_part_of_its_tasks_of_each_vm(
    resources: dict[str, Any], of_each: Need, tasks: int
) -> None:
    asked = demand("r", 2, {"mpi": "srun", **resources})
    assert (asked.need, asked.options.tasks) == (of_each, tasks)


def test_a_job_over_several_vms_is_in_no_group() -> None:
    members = [{"nodes": 2, "mpi": "srun", "tasks": 4}, {}]
    with pytest.raises(SchlouderError, match=r"group g: nodes: 2 is not allowed; .* in a group"):
        of_group("g", {"nodes": 2, "mpi": "srun", "tasks": 4}, 1, members)


def test_memory_by_cpu_wins_over_memory() -> None:
    assert need(mem_mb=700).memory == 700
    assert need(mem_mb=700, mem_mb_per_cpu=100, tasks=3).memory == 600
    assert need(mem_mb=700, mem_mb_per_cpu=0).memory == 700


def test_gpus_are_a_number_and_maybe_a_model() -> None:
    assert (need(gpu=1).gpus, need(gpu=1).gpu_model) == (1, "")
    assert need(gpu=2, gpu_model="T4") == Need(2, 0, 2, "t4")
    assert need(gres="gpu:a100_80.x:3") == Need(2, 0, 3, "a100_80.x")


def test_slurms_own_options_are_handed_on() -> None:
    asked = demand(
        "r",
        1,
        {
            "slurm_account": "lab,other",
            "slurm_qos": "high",
            "reservation": "today",
            "runtime": 3,
            "slurm_extra": "--mail-type END,FAIL --nice=5 '--wckey=a b'",
            "slurm_partition": "elsewhere",
            "clusters": "one",
        },
    )
    options = asked.options
    assert (options.account, options.qos, options.reservation) == ("lab", "high", "today")
    assert options.extra == ("--mail-type=END,FAIL", "--nice=5", "--wckey=a b")
    assert asked.limit == 180
    assert asked.ignored == ("slurm_partition", "clusters")


@pytest.mark.parametrize(
    ("runtime", "limit"), [(0.5, 60), (1.2, 120), (2, 120), (0.0, None), ("3", 180)]
)
def test_a_runtime_is_rounded_up_to_minutes(runtime: object, limit: float | None) -> None:
    assert demand("r", 1, {"runtime": runtime}).limit == limit


def test_nothing_given_is_nothing_asked() -> None:
    empty = {"mem_mb": 0, "runtime": 0, "gpu": 0, "constraint": "", "qos": "", "slurm_extra": ""}
    assert demand("r", 1, empty) == demand("r", 1, {})


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"nodes": 2}, "rule r: nodes: 2 is not allowed; only a job with the resource mpi can"),
        ({"nodes": 2, "mpi": "srun"}, "rule r: tasks: None is not allowed; a job over 2 VMs has"),
        ({"nodes": 4, "mpi": "srun", "tasks": 3}, "rule r: tasks: 3 is not allowed; a job over 4"),
        (
            {"nodes": 2, "mpi": "srun", "tasks": 9, "tasks_per_node": 4},
            "rule r: tasks: 9 is not allowed; 2 VMs with tasks_per_node=4 run 8 at the most",
        ),
        ({"nodes": "1-4"}, "rule r: nodes: '1-4' is not allowed; it must be a number"),
        ({"tasks": 8, "tasks_per_node": 4}, "rule r: tasks: 8 is not allowed"),
        ({"mem_mb": True}, "rule r: mem_mb: True is not allowed"),
        ({"mem_mb": float("inf")}, "rule r: mem_mb: inf is not allowed"),
        ({"mem_mb": float("nan")}, "rule r: mem_mb: nan is not allowed"),
        ({"mem_mb": 10**5000}, "rule r: mem_mb: a number of more than 12 digits is not allowed"),
        ({"runtime": "9" * 5000}, "9... is not allowed; it must be a number above 0 of at most 8"),
        ({"runtime": 10**12}, "rule r: runtime: a number of more than 12 digits is not allowed"),
        ({"gres": f"gpu:{'9' * 500}"}, "9... is not allowed; VMs have gpu:COUNT"),
        ({"disk_mb": -5}, "rule r: disk_mb: -5 is not allowed"),
        ({"gpu_model": "t4"}, "rule r: gpu_model: 't4' is not allowed; the number"),
        ({"gpu": 1, "gpu_model": "t 4"}, "rule r: gpu_model: 't 4' is not allowed; it must be"),
        ({"gres": "gpu"}, "rule r: gres: 'gpu' is not allowed; VMs have gpu:COUNT"),
        ({"gres": "disk:1"}, "rule r: gres: 'disk:1' is not allowed"),
        ({"gres": "gpu:1", "gpu": 1}, "rule r: gres: 'gpu:1' is not allowed; give either"),
        ({"constraint": "a&"}, "rule r: constraint: 'a&' is not allowed; it must be names"),
        ({"constraint": "(a|b)&c"}, "rule r: constraint: '(a|b)&c' is not allowed"),
    ],
)
def test_what_no_vm_can_give_is_refused(resources: dict[str, Any], message: str) -> None:
    assert message in problem(**resources)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--job-name=x", "the option --job-name is not yours to give: schlouder's own"),
        ("--job-n x", "the option --job-n is not yours to give"),
        ("--nodel=n1", "the option --nodel is not yours to give"),
        ("-J x", "the option -J is not yours to give"),
        ("-n4", "the option -n is not yours to give: use the resource tasks"),
        ("-vH", "write the long form of -v"),
        ("--mem=5", "use mem_mb"),
        ("--mem-per-cpu=5", "use mem_mb"),
        ("--time=5", "use the resource runtime"),
        ("--no-requeue", "the option --no-requeue is not yours to give"),
        ("--exclusive", "use --schlouder-sharing"),
        ("--exclude=n1", "the option --exclude is not yours to give"),
        ("--gres=gpu:1", "use the resource gpu"),
        ("--tres-per-task=cpu:8", "use threads, cpus_per_task or gpu"),
        ("--tres-per cpu:8", "the option --tres-per is not yours to give"),
        ("script.sh", "'script.sh' is no option of sbatch"),
        ("--nice 5", "'5' is no option of sbatch; write --option=value"),
        (":", "':' is no option of sbatch"),
        ("--", "'--' is no option of sbatch"),
        ("'--nice=5", "its quotes are not closed"),
    ],
)
def test_options_that_schlouder_gives_itself_are_refused(extra: str, message: str) -> None:
    assert message in problem(slurm_extra=extra)


@pytest.mark.parametrize(
    "extra", ["--mem-bind=local", "--time-min=5", "--gres-flags=none", "--nice=5", "--signal B:1@6"]
)
def test_options_that_only_look_like_ours_are_not(extra: str) -> None:
    assert demand("r", 1, {"slurm_extra": extra}).options.extra == (extra.replace(" ", "="),)


def test_all_problems_of_a_rule_are_told_at_once() -> None:
    wrong = problem(nodes=2, mem_mb=-1, slurm_extra="-J x -N 2")
    assert len(wrong.splitlines()) == 6


def test_factors_are_not_summed_over_a_group() -> None:
    """Four members of two tasks with three CPUs each, as Snakemake merges them."""
    member = {"tasks": 2, "cpus_per_task": 3, "mem_mb_per_cpu": 100, "nodes": 1, "mem_mb": 10}
    merged = {name: 4 * value for name, value in member.items()}
    asked = demand("g", 4, of_group("g", merged, 4, [member] * 4))
    assert (asked.need.cpus, asked.need.memory, asked.options.tasks) == (24, 2400, 2)


def test_members_of_a_group_that_name_no_cpus_have_their_threads() -> None:
    members: list[dict[str, Any]] = [{"cpus_per_task": 2}, {"tasks": "<TBD>"}]
    asked = demand("g", 7, of_group("g", {"cpus_per_task": 2}, 7, members))
    assert (asked.need.cpus, asked.options.tasks) == (7, 1)


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        ("schlouder", True),
        ("m5.large", True),
        ("schlouder&m5.large", True),
        ("m5.xlarge|m5.large", True),
        ("m5.large&avx", False),
        ("m5.large|avx&sse", False),
        ("avx&sse|m5.large", True),
    ],
)
def test_a_constraint_holds_from_left_to_right(constraint: str, holds: bool) -> None:
    assert SMALL.fits(need(constraint=constraint)) is holds


def test_a_type_fits_with_enough_gpus_of_the_model() -> None:
    fitting = {
        "gpu": [kind.name for kind in (SMALL, T4, FOUR) if kind.fits(need(gpu=1))],
        "two": [kind.name for kind in (SMALL, T4, FOUR) if kind.fits(need(gpu=2))],
        "t4": [kind.name for kind in (SMALL, T4, FOUR) if kind.fits(need(gpu=1, gpu_model="t4"))],
    }
    assert fitting == {
        "gpu": ["g4dn.xlarge", "p3.8xlarge"],
        "two": ["p3.8xlarge"],
        "t4": ["g4dn.xlarge"],
    }


def test_a_task_with_gpus_has_all_of_its_vm() -> None:
    """Slurm does not know of them, so that it could not keep two tasks apart."""
    assert need(gpu=1).on(FOUR).gpus == 4
    assert need().on(FOUR).gpus == 0


def test_a_feature_that_no_vm_has_is_named_with_those_there_are() -> None:
    message = too_big("rule r", need(constraint="m5.large&avx|sse"), [SMALL, T4])
    assert message == (
        "rule r: constraint: 'm5.large&avx|sse' names avx, sse, which no VM has as a feature; "
        "allowed are schlouder, m5.large, g4dn.xlarge"
    )


def test_a_gpu_rule_where_no_type_with_gpus_is_allowed_is_told_so() -> None:
    assert too_big("rule r", need(gpu=1, mem_mb=500), [SMALL]) == (
        "rule r needs 2 cpus and 500 MiB, 1 GPU; the allowed instance types offer m5.large (2 cpus, "
        "7372 MiB). None of them has a GPU: allow a type that has with --schlouder-instance-types"
    )
    assert "None of them has a GPU v100:" in too_big("r", need(gpu=1, gpu_model="v100"), [T4])
    assert "Lower what it asks for" in too_big("r", need(gpu=2), [T4])


def test_of_very_many_types_the_largest_are_told() -> None:
    types = [InstanceType(f"t{cpus}", cpus, 1024) for cpus in range(1, 101)]
    message = too_big("rule r", need(mem_mb=5000), [*types, T4])
    assert "offer g4dn.xlarge (4 cpus, 15082 MiB, 1 GPU t4), t100 (100 cpus" in message
    assert "t96 (96 cpus, 921 MiB) and 95 smaller ones. Lower" in message


def test_a_rule_with_types_of_its_own_is_told_of_these() -> None:
    own = need(mem_mb=9000, schlouder_instance_type="m5.large")
    offers = Offers((SMALL, T4), reserved=(SMALL.name,))
    assert offers.allowed(own) == [SMALL]
    assert offers.allowed(need(mem_mb=9000)) == [T4]
    message = too_big("rule r", own, offers.allowed(own))
    assert "offer m5.large (2 cpus, 7372 MiB). " in message
    assert message.endswith("allow a larger type with schlouder_instance_type")
