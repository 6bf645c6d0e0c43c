"""The `schlouder` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from snakemake_executor_plugin_schlouder.localcloud import Options
    from snakemake_executor_plugin_schlouder.pool import Goal


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for an error told in one line, or that of the command of `local run`."""
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    arguments = _parser().parse_args(words[:split])
    arguments.command = words[split + 1 :]
    return int(arguments.action(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="schlouder", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    _add_status(commands)
    _add_gc(commands)
    _add_simulate(commands)
    _add_replay(commands)
    _add_local(commands)
    _add_init(commands)
    return parser


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser("status", help="show the VMs of a run and what ran on each")
    status.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the directory in which snakemake was run (default: the current one)",
    )
    status.add_argument("--run", metavar="RUN", help="which run (default: the newest)")
    status.set_defaults(action=_status)


def _add_gc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gc = commands.add_parser(
        "gc",
        help="list and delete VMs whose owner is gone",
        description="Lists the machines that have schlouder's tags, with what they cost, and deletes those "
        "that no living run owns, after a yes. Does no harm beside running workflows, and touches nothing "
        "without the tags schlouder:run and schlouder:owner.",
        epilog="exit codes: 0 nothing is left behind, 1 an error, 2 wrong options, 3 something was found and "
        "not deleted",
    )
    where = gc.add_mutually_exclusive_group()
    where.add_argument(
        "--region", action="append", metavar="REGION", help="may be repeated; default: that of AWS"
    )
    where.add_argument("--all-regions", action="store_true", help="all that the account has")
    gc.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="RUN",
        help="only this run, also where nothing is known of its owner or its VMs are kept; may be repeated",
    )
    gc.add_argument(
        "--everybody",
        action="store_true",
        help="not only your own of this host (for administrators)",
    )
    gc.add_argument("--yes", action="store_true", help="delete without asking")
    gc.add_argument("--json", action="store_true", help="print JSON, and do not ask")
    gc.set_defaults(action=_gc)


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = commands.add_parser(
        "simulate", help="play a task list under the strategies, side by side; starts nothing"
    )
    simulate.add_argument("tasks", type=Path, metavar="TASKS", help="a task list (.tasks)")
    simulate.add_argument("--strategy", action="append", metavar="NAME", help="default: all")
    simulate.add_argument(
        "--order",
        default="submission",
        metavar="ORDER",
        help="in which waiting tasks are placed: submission (default), rank or level",
    )
    simulate.add_argument("--max-vms", type=int, default=20, metavar="N")
    simulate.add_argument("--btu", type=float, default=1.0, metavar="S", help="default: 1")
    simulate.add_argument("--min-charge", type=float, default=60.0, metavar="S", help="default: 60")
    simulate.add_argument("--margin", type=float, default=50.0, metavar="S", help="default: 50")
    simulate.add_argument(
        "--boot-seconds", type=float, default=60.0, metavar="S", help="default: 60"
    )
    simulate.add_argument(
        "--deadline", metavar="TIME", help="from the start (2h), for the strategy deadline"
    )
    simulate.add_argument(
        "--budget", metavar="TIME", help="billed VM time (12h), for the strategy budget"
    )
    simulate.add_argument("--price", type=float, metavar="USD", help="of one VM for an hour")
    simulate.set_defaults(action=_simulate)


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser(
        "replay", help="play recorded runs again and compare with what was measured"
    )
    replay.add_argument("runs", type=Path, metavar="RUNS.csv")
    replay.add_argument("--strategy", metavar="NAME", help="another one than the recorded")
    replay.set_defaults(action=_replay)


def _add_local(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    local = commands.add_parser(
        "local",
        help="a cloud on this machine",
        description="EC2, its VMs and a Slurm controller on this machine. Needs root, Slurm and munge.",
    )
    subcommands = local.add_subparsers(title="commands", required=True)

    up = subcommands.add_parser("up", help="start the cloud; prints what to set in the environment")
    _add_options(up)
    up.set_defaults(action=_local_up)

    run = subcommands.add_parser(
        "run",
        help="run a command in a cloud of its own",
        usage="schlouder local run [options] -- COMMAND [ARGUMENT ...]",
    )
    _add_options(run)
    run.set_defaults(action=_local_run)

    status = subcommands.add_parser("status", help="list the clouds of this machine")
    status.add_argument("--name", help="print what to set in the environment to use this one")
    status.set_defaults(action=_local_status)

    down = subcommands.add_parser("down", help="end a cloud and everything that runs in it")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--name", default="default", help="default: %(default)s")
    which.add_argument("--all", action="store_true", help="all clouds of this machine")
    down.set_defaults(action=_local_down)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="tells clouds of one machine apart")
    parser.add_argument(
        "--boot-seconds",
        default="5",
        metavar="SECONDS",
        help="how long a VM takes to boot: a number, or a range such as 3-8 (default: %(default)s)",
    )
    parser.add_argument(
        "--share",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="DIR",
        help="directories that the VMs share with this machine "
        "(default: the current directory and your home)",
    )
    parser.add_argument(
        "--no-share",
        dest="shared",
        action="store_false",
        help="the VMs share nothing, and do not see the current directory, your home and /tmp",
    )


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = commands.add_parser(
        "init",
        help="write what an administrator needs to set schlouder up on an AWS account",
        description="Writes slurm.conf lines, IAM policies, the user data of VMs, a Snakemake profile, and a "
        "README that says what to do with each. Touches neither AWS nor Slurm.",
    )
    init.add_argument("directory", type=Path, metavar="DIRECTORY")
    for name, metavar, text in (
        ("region", "REGION", "AWS region"),
        ("account", "ID", "AWS account, 12 digits"),
        ("image", "AMI", "machine image of the VMs"),
        ("subnets", "SUBNET[,SUBNET...]", "subnets of the VMs"),
        ("security-groups", "SG[,SG...]", "security groups of the VMs"),
        ("controller", "HOST:PORT", "where VMs reach slurmctld"),
        ("cluster-key", "ssm:/NAME|secretsmanager:NAME", "where VMs find munge.key or slurm.key"),
        ("kms-key", "ARN", "the KMS key of your own that encrypts it"),
        ("vm-role", "NAME", "IAM role and instance profile of the VMs"),
        ("partition", "NAME", "Slurm partition of the VMs"),
        ("instance-types", "TYPE[,TYPE...]", "allowed instance types"),
        ("mount", "SERVER:/PATH=/MOUNTPOINT[,OPTION...]", "NFS file systems that VMs mount"),
        ("auth", "munge|slurm", "AuthType of slurm.conf"),
        ("slurm", "RELEASE", "release of slurmctld; default: that of the Slurm installed here"),
    ):
        init.add_argument(f"--{name}", metavar=metavar, help=text)
    init.add_argument("--max-nodes", type=int, metavar="N", help="most nodes Slurm may ever have")
    init.add_argument("--force", action="store_true", help="replace files that are there")
    init.set_defaults(action=_init)


def _init(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from snakemake_executor_plugin_schlouder import init
    from snakemake_executor_plugin_schlouder.model import SchlouderError

    values = {field.name: getattr(arguments, field.name) for field in fields(init.Site)}
    given = {name: value for name, value in values.items() if value is not None}
    try:
        written = init.write(arguments.directory, init.Site(**given), arguments.force)
    except SchlouderError as error:
        return _fail(error)
    print("\n".join(map(str, written)))
    left = [f"--{name.replace('_', '-')}" for name in init.PLACEHOLDERS if name not in given]
    if left:
        print(f"placeholders stand for {', '.join(left)}", file=sys.stderr)
    print(f"what to do with them, in order: {written[0]}", file=sys.stderr)
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder import gc, report
    from snakemake_executor_plugin_schlouder.model import SchlouderError
    from snakemake_executor_plugin_schlouder.printable import brief

    regions = arguments.region or [os.environ.get("SNAKEMAKE_SCHLOUDER_REGION", "")]
    scope = gc.Scope(arguments.everybody, tuple(arguments.run))
    try:
        collector = gc.Collector(gc.connect(regions, arguments.all_regions), scope)
        survey = collector.survey()
        _tell((*survey.notes, *survey.problems))
        if not arguments.json:
            report.show_table(report.leftovers(survey))
        found = bool(survey.doomed or survey.nodes)
        agreed = arguments.yes or (found and not arguments.json and _says_yes("Delete?"))
        ending = collector.end(survey) if found and agreed else None
    except SchlouderError as error:
        return _fail(brief(str(error)))
    if ending is not None:
        still = [f"{one.id} in {one.region} was to end and is still there" for one in ending.left]
        _tell((*ending.notes, *ending.problems, *still))
    if arguments.json:
        print(json.dumps(gc.as_data(survey, ending)))
    elif ending is not None:
        print(f"deleted: {len(ending.ended)}")
    if survey.problems or (ending is not None and (ending.left or ending.problems)):
        return 1
    return 3 if found and ending is None else 0


def _tell(lines: Iterable[str]) -> None:
    from snakemake_executor_plugin_schlouder.printable import brief

    for line in lines:
        print(f"schlouder: {brief(line)}", file=sys.stderr)


def _says_yes(question: str) -> bool:
    """False where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _simulate(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder import report, simulate, strategies, tasklist
    from snakemake_executor_plugin_schlouder.model import Billing, SchlouderError
    from snakemake_executor_plugin_schlouder.prediction import LinearBoots

    try:
        _check_numbers(arguments)
        tasks = tasklist.read(arguments.tasks)
        goal = _goal(arguments)
        names = arguments.strategy or [name for name in strategies.known() if goal.allows(name)]
        billing = Billing(arguments.btu, arguments.min_charge, arguments.margin)
        boots = LinearBoots(arguments.boot_seconds, 0.0)
        scenarios = [
            simulate.Scenario(
                name, arguments.max_vms, billing, boots, goal=goal, order=arguments.order
            )
            for name in names
        ]
        outcomes = {scenario.strategy: simulate.simulate(tasks, scenario) for scenario in scenarios}
    except SchlouderError as error:
        return _fail(error)
    report.show_table(report.outcome_table(outcomes, arguments.price))
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    from snakemake_executor_plugin_schlouder.model import SchlouderError

    for name, least in (
        *(("max_vms", 1), ("btu", 0.001), ("min_charge", 0), ("margin", 0), ("boot_seconds", 0)),
    ):
        value = getattr(arguments, name)
        if not least <= value < float("inf"):
            option = "--" + name.replace("_", "-")
            raise SchlouderError(f"{option}: {value} is not allowed; it must be at least {least}")


def _goal(arguments: argparse.Namespace) -> Goal:
    from snakemake_executor_plugin_schlouder.pool import Goal
    from snakemake_executor_plugin_schlouder.settings import seconds

    given = {
        name: seconds(f"--{name}", getattr(arguments, name))
        for name in ("deadline", "budget")
        if getattr(arguments, name) is not None
    }
    return Goal(**given)


def _replay(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder import replay, report
    from snakemake_executor_plugin_schlouder.model import SchlouderError

    try:
        runs = replay.read_runs(arguments.runs)
        replays = [replay.replay(run, arguments.strategy) for run in runs]
    except SchlouderError as error:
        return _fail(error)
    report.show_table(report.replay_table(replays))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder import report
    from snakemake_executor_plugin_schlouder.model import SchlouderError

    try:
        report.show(arguments.directory, arguments.run)
    except SchlouderError as error:
        return _fail(error)
    return 0


def _local_up(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder.localcloud import LocalCloud, LocalCloudError

    try:
        cloud = LocalCloud.up(_options(arguments, "default"))
    except LocalCloudError as error:
        return _fail(error)
    print(f"The cloud {cloud.name!r} is up; its logs are in {cloud.folder}.", file=sys.stderr)
    _print_exports(cloud.environment())
    return 0


def _options(arguments: argparse.Namespace, name: str) -> Options:
    from snakemake_executor_plugin_schlouder.localcloud import Options

    seconds = Options.parse_seconds(arguments.boot_seconds)
    return Options(arguments.name or name, seconds, arguments.share, shared=arguments.shared)


def _local_run(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder.localcloud import LocalCloudError
    from snakemake_executor_plugin_schlouder.localcloud.run import run

    try:
        if not arguments.command:
            raise LocalCloudError("give the command to run after --")
        return run(_options(arguments, f"run-{os.getpid()}"), arguments.command)
    except LocalCloudError as error:
        return _fail(error)


def _local_status(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder.localcloud import LocalCloud

    if arguments.name is None:
        for cloud in LocalCloud.all():
            print(f"{cloud.name}  {cloud.endpoint}  {cloud.folder}")
        return 0
    found = LocalCloud.find(arguments.name)
    if found is None:
        return _fail(f"no cloud {arguments.name!r} is up")
    _print_exports(found.environment())
    return 0


def _local_down(arguments: argparse.Namespace) -> int:
    from snakemake_executor_plugin_schlouder.localcloud import LocalCloudError, down

    try:
        ended = down(None if arguments.all else arguments.name)
    except LocalCloudError as error:
        return _fail(error)
    print(f"ended: {', '.join(ended)}" if ended else "nothing is up")
    return 0


def _print_exports(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        print(f"export {name}={shlex.quote(value)}")


def _fail(error: object) -> int:
    print(f"schlouder: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
