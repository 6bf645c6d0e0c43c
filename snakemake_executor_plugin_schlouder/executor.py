"""The Snakemake side: jobs become tasks, ended tasks become callbacks, signals become stop or release.

Decides nothing; the broker does. Contract of the base class: snakemake-interface-executor-plugins 9.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import math
import os
import re
import signal
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.logging import LoggerExecutorInterface
from snakemake_interface_executor_plugins.utils import encode_target_jobs_cli_args
from snakemake_interface_executor_plugins.workflow import WorkflowExecutorInterface

from .broker import RECLAIMS, Broker, BrokerConfig
from .costs import spot_bills
from .dag import Dag, dependencies, members_of
from .ec2.account import Ec2Settings
from .ec2.joining import Join
from .history import Boot, History, Walltime, history_path
from .job_files import Sweeper, make_folder, names_to_remove, tail
from .journal import Journal, Remains, RunRecord, birth_of, journal_path
from .keeping import Mark, Shelf, shelf_path
from .launcher import Limits
from .market import catalog
from .market.catalog import Catalog, Market
from .market.offers import Offers
from .market.tariff import Tariff
from .model import (
    NEVER,
    ON_DEMAND,
    ONLY,
    SPOT,
    VM,
    VM_ENDED,
    InstanceType,
    SchlouderError,
    Task,
    TaskState,
)
from .objects import Objects, Storage, has_credentials, shares_files
from .objects import connect as connect_s3
from .planning import too_big
from .pool import Announcement
from .prediction import Walltimes
from .printable import one_line
from .provision import Cloud, Ec2Cloud, connect, this_owner
from .quoting import RULES, quoted_options, shell_command
from .reattach import changed, content_of, identity_of, is_made
from .resources import IGNORED, of_group
from .settings import Config, RuleSettings, rule_settings, validated
from .slurm import Cluster, ClusterUnavailable
from .slurm.cli import SlurmCommands
from .slurm.rpc import choose

if TYPE_CHECKING:
    from .recording import PlannedJob

_PAUSE_BUSY = 0.5
_PAUSE_QUIET = 1.0
_LOOK_UP = 0.05
_FAILED_ROUNDS = 60
_LAUNCH_TIMEOUT = 300.0
_JOB_NAME = re.compile("schlouder-[0-9a-f]{8}")


class Executor(RemoteExecutor):
    """`--executor schlouder`. Keeps no list of jobs of its own beyond results not yet handed on."""

    def __init__(
        self, workflow: WorkflowExecutorInterface, logger: LoggerExecutorInterface
    ) -> None:
        """The base class starts the thread that checks jobs before it calls `__post_init__`, so
        everything that thread touches is made first."""
        self._wake = threading.Event()
        self._broker: Broker | None = None
        self._journal: Journal | None = None
        self._history: History | None = None
        self._walltimes = Walltimes()
        self._complete: list[Task] = []
        self._place = ""
        self._ended: dict[str, Task] = {}
        self._sweeper: Sweeper | None = None
        self._objects: Objects | None = None
        self._to_sweep: list[Task] = []
        self._dropped = 0
        self._reported = False
        self._job_cores = 1
        self._ending = False
        self._handlers: dict[int, Any] = {}
        self._failed_rounds = 0
        self._patience = 0.0
        self._task_count = 0
        self._ignored: set[str] = set()
        self._run = uuid.uuid4().hex[:8]
        self._offered: Catalog | None = None
        super().__init__(workflow, logger)

    def __post_init__(self) -> None:
        """Checks everything that can be checked while it costs nothing. Starts no VM; with nothing to
        be done, or only local rules, it does not even look at the cloud."""
        try:
            self._config = validated(self.executor_settings)
            self._shares_files = shares_files(self.workflow.storage_settings.shared_fs_usage)
            if self._config.bundle and not self._shares_files:
                raise SchlouderError(
                    "--schlouder-bundle: 'on' is not supported with --shared-fs-usage none; it must be off"
                )
            self._places = Dag(self.dag, self._walltimes_ahead)
            jobs = self._jobs_ahead()
            if jobs:
                self._open(jobs)
        except SchlouderError as error:
            raise WorkflowError(str(error)) from error

    # -- Snakemake hands jobs over

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        broker = self._opened(jobs)
        keys: list[tuple[JobExecutorInterface, str]] = []
        tasks = []
        for job in jobs:
            self.run_job_pre(job)
            try:
                task = self._task(job)
            except SchlouderError as error:
                self.report_job_error(SubmittedJobInfo(job), msg=f"{error}\n")
                continue
            live = self._live(job, task)
            keys.append((job, task.key if live is None else live.key))
            if live is None:
                tasks.append(task)
        broker.submit(tasks)
        for job, key in keys:
            self.report_job_submission(SubmittedJobInfo(job, external_jobid=key))
        self._wake.set()

    def run_job(self, job: JobExecutorInterface) -> None:
        self.run_jobs([job])

    @property
    def cores(self) -> int:
        """The CPUs the job being written down gets of its VM; a shared VM has more."""
        return self._job_cores

    def get_jobscript(self, job: JobExecutorInterface) -> str:
        """Beside which Snakemake puts long lists of files; a rule's name may be no name of a file."""
        return str(Path(self.tmpdir, _file_name(str(job.jobid))))

    def get_job_args(self, job: JobExecutorInterface) -> str:
        """With the default limit of 100 jobs a second the job's own Snakemake, which has one job to start,
        would wait a second for the next; among the jobs of a group the limit keeps it from spinning."""
        unneeded = list(self.workflow.dag.get_unneeded_temp_files(job))
        options = (
            ("--target-jobs", encode_target_jobs_cli_args(job.get_target_spec())),
            (RULES, list(job.rules)),
            ("--unneeded-temp-files", unneeded),
            ("--wait-for-files", [self.tmpdir, *job.get_wait_for_files()]),
        )
        arguments = quoted_options(super().get_job_args(job), options)
        return arguments if job.is_group() else f"{arguments} --max-jobs-per-timespan 1/0s"

    # -- Snakemake asks what became of them

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Yields every job that is not known to have ended, whatever goes wrong in between: a job
        neither yielded nor reported would be forgotten."""
        self._tick()
        for info in active_jobs:
            task = self._ended.pop(info.external_jobid or "", None)
            if task is None:
                yield info
            else:
                self._hand_on(info, task)
        self._tell_dropped()

    async def sleep(self) -> None:
        """Short, and ended at once by new jobs, by the end of the run, or by the end of one of a few jobs;
        the longer Slurm takes to see that too, the less often it is asked."""
        broker, begun = self._broker, time.monotonic()
        pause = _PAUSE_BUSY if broker is not None and broker.is_busy else _PAUSE_QUIET
        while time.monotonic() < begun + pause and not self._wake.is_set():
            await asyncio.sleep(_LOOK_UP)
            if broker is None or not broker.has_news:
                self._patience = 0.0
            elif time.monotonic() >= begun + self._patience:
                self._patience = min(_PAUSE_BUSY, 2 * self._patience + _LOOK_UP)
                break
        self._wake.clear()

    # -- Snakemake ends

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Ends everything of this run, which somebody waits for. The list may lack jobs that are being
        checked just now, so the broker's own books count."""
        if self._broker is not None:
            self._broker.hurry()
        self._give_back()

    def shutdown(self) -> None:
        """The normal end of a run, after which idle VMs may stay for the next one."""
        if self._broker is not None and not self._ending:
            self._attempt(self._broker.hand_over)
        self._give_back()
        with self.lock:
            self.wait = False
        self._wake.set()
        super().shutdown()
        self._report()
        if threading.current_thread() is threading.main_thread():
            self._restore_signals()

    def _give_back(self) -> None:
        if self._broker is None or self._journal is None:
            return
        self._ending = True
        self._attempt(self._release)

    def _release(self) -> None:
        assert self._broker is not None and self._journal is not None
        self._broker.release()
        if self._broker.is_released:
            self._journal.end_run(self._run, time.time())
        self._end_sweeping(self._broker)
        self._keep_history()

    def _attempt(self, action: Callable[[], None]) -> None:
        """What goes wrong at the end of a run is told, and does not keep from ending."""
        try:
            action()
        except Exception as error:
            self.logger.error(
                f"schlouder: not everything could be given back: {error!r}. Look for instances "
                f"with the tag schlouder:run={self._run}."
            )
            self.logger.debug("schlouder: trace", exc_info=True)

    # -- opening

    def _opened(self, jobs: list[JobExecutorInterface]) -> Broker:
        if self._broker is None:
            try:
                self._open([job for job in jobs if not job.is_group()])
            except SchlouderError as error:
                raise WorkflowError(str(error)) from error
        assert self._broker is not None
        return self._broker

    def _open(self, jobs: list[Any]) -> None:
        """Checks rules, Slurm and EC2 in this order (the cheap checks first) and makes the broker."""
        config = self._config
        asked = self._handed_over(self._asked(jobs))
        objects = None if self._shares_files else self._storage()
        commands = SlurmCommands(config.partition, self.envvars())
        info = commands.check()
        cluster = choose(config.slurm_api, commands, info, self.logger)
        join = Join(
            info.controller,
            info.munge_socket,
            config.cluster_key,
            info.auth,
            info.version,
            config.mounts,
            config.boot_timeout + config.lease,
            config.billing.unit,
        )
        markets = _markets(config, asked.values())
        machines = _ec2_settings(config, markets)
        cloud = connect(machines, join, this_owner(), self.logger.warning)
        offered = catalog.connect(cloud.client, config.type_table, self.logger.warning)
        market = self._market(asked, cloud, offered, markets)
        _check_sizes(asked, market)
        self._journal = self._open_journal()
        check_strays(commands, self._journal, self._workdir)
        left = self._take_over(self._journal, cloud, offered, market.tariff)
        broker_config = BrokerConfig(
            run=self._run,
            workdir=self._workdir,
            partition=config.partition,
            types=market.types,
            reserved=market.reserved,
            tariff=market.tariff,
            zones=market.zones,
            max_vms=config.max_vms,
            billing=config.billing,
            boot_timeout=config.boot_timeout,
            lease=config.lease,
            goal=config.goal,
            sharing=config.sharing,
            order=config.order,
            asks_seldom=self._shares_files,
            launch_timeout=_LAUNCH_TIMEOUT,
            limits=Limits(config.max_booting, config.max_spend),
            reclaims=self._preemptible_retries(),
            shares_files=self._shares_files,
            keep=config.keep,
        )
        if objects is not None:
            self._objects = objects.of_run(self._run)
        make_folder(broker_config.files)
        self._sweeper = Sweeper(self._workdir, self._run, self._objects)
        self._sweeper.remove_old(config.log_days, self._journal.living_runs(socket.gethostname()))
        aws = "amazonaws.com" in cloud.endpoint
        self._place = cloud.region if aws else f"{cloud.region}, not AWS"
        makes = self._recorded(asked) if config.record and left is None else Broker
        mark = Mark.of(
            *(machines, join, config.billing),
            *(config.partition, cloud.region, cloud.endpoint),
        )
        shelf = self._open_shelf(mark)
        broker = self._make_broker(makes, broker_config, cloud, cluster, self._journal, shelf)
        broker.expect(self._announcements(asked))
        if left is not None:
            broker.adopt(left)
        self._broker = broker
        atexit.register(self._give_back)
        self._handle_signals()
        self._tell_taken(broker.take_kept())
        self._warn_of_few_jobs(len(jobs))

    def _market(
        self,
        asked: Mapping[Any, RuleSettings],
        cloud: Ec2Cloud,
        offered: Catalog,
        markets: Sequence[str],
    ) -> Market:
        """The types that the settings and the rules name, and what they cost on the markets in question."""
        config = self._config
        of_rules = dict.fromkeys(s.need.types for s in asked.values() if s.need.types)
        market = offered.market(
            config.instance_types,
            [word for words in of_rules for word in re.split(r"[,\s]+", words) if word],
            cloud.architecture,
            cloud.zones,
            config.prices,
            tuple(dict.fromkeys((ON_DEMAND, *markets))),
        )
        self.logger.info(f"schlouder: prices: {market.tariff.source}.")
        unpriced = [kind.name for kind in market.types if market.tariff.price(kind.name) is None]
        if unpriced and config.max_spend < math.inf:
            raise SchlouderError(
                f"--schlouder-max-spend: {config.max_spend} cannot be kept, the price of "
                f"{', '.join(unpriced)} is not known ({market.tariff.source}); give --schlouder-prices"
            )
        self._warn_of_spot(asked)
        self._offered = offered
        return market

    def _warn_of_spot(self, asked: Mapping[Any, RuleSettings]) -> None:
        """One machine for everything, that may be taken back at any time, is likely to be."""
        if any(s.strategy == "one-vm-for-all" and s.spot != NEVER for s in asked.values()):
            self.logger.warning(
                "schlouder: one-vm-for-all with --schlouder-spot: when the one VM is taken back, all that "
                "runs there is lost at once; never is the safer choice."
            )

    def _preemptible_retries(self) -> int:
        """Spot machines that a job may lose before it goes on without: what Snakemake is told of retries."""
        remote = getattr(self.workflow, "remote_execution_settings", None)
        given = getattr(remote, "preemptible_retries", None)
        return RECLAIMS if given is None else given

    def _make_broker(
        self,
        makes: Callable[..., Broker],
        config: BrokerConfig,
        cloud: Cloud,
        cluster: Cluster,
        journal: Journal,
        shelf: Shelf | None,
    ) -> Broker:
        history = self._open_history()
        self._history, self._walltimes = history, history.walltimes()
        boots = history.boots(config.types[0].name, self._place)
        return makes(
            config,
            cloud,
            cluster,
            journal,
            self.logger,
            boots=boots,
            walltimes=self._walltimes,
            **self._witnesses(),
            **({} if shelf is None else {"shelf": shelf}),
        )

    def _witnesses(self) -> dict[str, Callable[..., Any]]:
        """Where the exit codes of jobs are, if not in files."""
        objects = self._objects
        if objects is None:
            return {}
        return {
            "witness": objects.exit_of,
            "revoke": objects.revoke,
            "begun": objects.has_begun,
            "script": objects.script(self.get_python_executable(), self._config.keep_logs),
        }

    def _storage(self) -> Objects:
        """In the default storage, where jobs tell how they ended; SchlouderError if that is not fit."""
        given = self.workflow.storage_settings
        settings = self.workflow.storage_registry.default_storage_provider.settings
        provider, prefix = given.default_storage_provider, given.default_storage_prefix
        storage = Storage.of(provider, prefix, settings)
        objects = Objects(connect_s3(storage, settings), storage, self._run)
        objects.check()
        if not has_credentials(self.envvars()):
            self.logger.warning(
                "--shared-fs-usage none: jobs get no credentials for the storage, and the VMs' metadata "
                "service is closed to them. Unless the machine image has some, set "
                "SNAKEMAKE_STORAGE_S3_ACCESS_KEY and SNAKEMAKE_STORAGE_S3_SECRET_KEY, or give "
                "--envvars AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY."
            )
        return objects

    def _recorded(self, asked: Mapping[Any, RuleSettings]) -> Callable[..., Broker]:
        """Makes brokers that write down what they see and decide."""
        from .recording import RecordedBroker, Recorder

        recorder = Recorder(Path(self._config.record), self.logger)

        def make(*arguments: Any, **more: Any) -> Broker:
            broker = RecordedBroker(recorder, *arguments, **more)
            broker.plan(self._planned_jobs(asked))
            return broker

        return make

    def _open_journal(self) -> Journal:
        path = journal_path(self._workdir)
        journal = Journal(path)
        self._tell_set_aside("journal", path, journal.set_aside)
        return journal

    def _take_over(
        self, journal: Journal, cloud: Ec2Cloud, offered: Catalog, tariff: Tariff
    ) -> Remains | None:
        """Goes on with the run of this directory that was killed and has left something, or else begins a
        new one."""
        for killed in journal.killed_runs(socket.gethostname()):
            same_cloud = (killed.region, killed.endpoint) == (cloud.region, cloud.endpoint)
            if same_cloud and journal.take_over(killed, os.getpid()):
                names = sorted({vm.instance_type for vm in journal.vms(killed.run)})
                types = {kind.name: kind for kind in offered.named(names)}
                left = journal.remains(killed.run, types)
                self._tell_taken_over(killed.run, left)
                self._run, self._task_count = killed.run, left.task_count
                return left
        journal.begin_run(
            RunRecord(
                self._run,
                str(self._workdir),
                socket.gethostname(),
                os.getpid(),
                cloud.region,
                cloud.endpoint,
                self._config.strategy,
                time.time(),
                birth=birth_of(os.getpid()),
                unit=self._config.billing.unit,
                minimum=self._config.billing.minimum,
                prices=tariff.source,
            )
        )
        return None

    def _tell_taken_over(self, run: str, left: Remains) -> None:
        vms = sum(vm.state not in VM_ENDED for vm in left.vms)
        live = sum(task.state != TaskState.COMPLETE for task in left.tasks)
        self.logger.info(
            f"schlouder: run {run} was killed; this one goes on with its {vms} VMs, and waits for the "
            f"{live} jobs that Slurm had of it instead of submitting them again."
        )
        if self._config.record:
            self.logger.warning("--schlouder-record: nothing is recorded of a run that goes on.")

    def _live(self, job: JobExecutorInterface, task: Task) -> Task | None:
        """What a killed run has left of this job. What is complete counts unless the user wants it anew."""
        broker = self._broker
        if broker is None or not broker.has_left(task.identity):
            return None
        settings = getattr(self.workflow, "dag_settings", None)
        forced = any(getattr(settings, name, False) for name in ("forceall", "forcerun"))
        return broker.claim(task, changed(job), is_made(job) and not forced)

    def _open_shelf(self, mark: Mark) -> Shelf | None:
        """Where VMs wait between two runs; None: this one takes none and keeps none."""
        config, path = self._config, shelf_path()
        if config.record:
            if config.keep.is_on:
                self.logger.warning("--schlouder-keep: a run that is recorded keeps no VMs.")
            return None
        if config.keep.is_on and not config.keep.has_effect(config.billing):
            self.logger.warning(
                f"--schlouder-keep paid: a VM is never paid for long enough ahead with units of "
                f"{config.billing.unit:g} s (--schlouder-btu); no VM is kept. Give a duration instead."
            )
        if not config.keep.is_on and not path.exists():
            return None
        try:
            shelf = Shelf(path, mark)
        except SchlouderError as error:
            self.logger.warning(f"{error}; no VM is taken over or kept")
            return None
        self._tell_set_aside("store of kept VMs", path, shelf.set_aside)
        return shelf

    def _tell_taken(self, vms: Sequence[VM]) -> None:
        if vms:
            many = "" if len(vms) == 1 else "s"
            names = ", ".join(vm.name for vm in vms)
            self.logger.info(
                f"schlouder: {len(vms)} idle VM{many} of earlier runs are used: {names}."
            )

    def _open_history(self) -> History:
        """What earlier runs took; without it predictions begin anew, and the run goes on."""
        path = history_path()
        try:
            history = History(path)
        except SchlouderError as error:
            self.logger.warning(f"{error}; nothing is learned from this run")
            return History(":memory:")
        self._tell_set_aside("history", path, history.set_aside)
        return history

    def _tell_set_aside(self, what: str, path: Path, aside: Path | None) -> None:
        if aside is not None:
            self.logger.warning(
                f"The {what} {path} could not be read; it was moved to {aside} and a new one begun."
            )

    def _keep_history(self) -> None:
        """What this run has shown, for the next ones."""
        if self._broker is None or self._history is None:
            return
        history, self._history = self._history, None
        try:
            self._remember(history, self._broker.vms())
        except sqlite3.Error as error:
            self.logger.warning(f"The history cannot be written ({error}); it lacks this run.")
        history.close()

    def _remember(self, history: History, used: Iterable[VM]) -> None:
        vms = {vm.name: vm for vm in used}
        history.add(
            [
                Walltime(t.rule, t.strategy, vms[t.vm].type.name, t.planned, took, t.ended or 0.0)
                for t in self._complete
                if t.vm in vms and (took := t.took) is not None
            ],
            [
                Boot(vm.type.name, self._place, vm.boot_time, vm.beside, vm.requested)
                for vm in vms.values()
                if vm.boot_time is not None
            ],
        )

    @property
    def _workdir(self) -> Path:
        return Path(self.workflow.workdir_init).resolve()

    def _jobs_ahead(self) -> list[Any]:
        """The remote jobs of the DAG as far as it is known. This look ahead is no part of the executor
        interface; without it, checks happen when the first jobs come."""
        needrun = getattr(self.dag, "needrun_jobs", None)
        return [job for job in needrun() if not job.is_local] if needrun is not None else []

    def _walltimes_ahead(self) -> dict[Any, float]:
        """Seconds the remote jobs ahead are taken to run."""
        return {job: self._walltime(job) for job in self._jobs_ahead()}

    def _walltime(self, job: Any) -> float:
        try:
            planned = self._planned(self._settings(job))
        except SchlouderError:
            planned = None
        return self._walltimes.expected(_file_name(job.name), planned)

    def _planned(self, settings: RuleSettings) -> float | None:
        """What the user says a job takes, or else that it takes at most; what is learned of a rule is
        learned against that."""
        return settings.limit if settings.planned is None else settings.planned

    def _asked(self, jobs: list[Any]) -> dict[Any, RuleSettings]:
        """What each job or group asks for; all wrong resources in one error."""
        found: dict[Any, RuleSettings] = {}
        problems: dict[str, None] = {}
        for job in jobs:
            try:
                found[job] = self._settings(job)
            except SchlouderError as error:
                problems[str(error)] = None
        if problems:
            raise SchlouderError("\n".join(problems))
        return found

    def _handed_over(self, asked: dict[Any, RuleSettings]) -> dict[Any, RuleSettings]:
        """The same with the groups in their members' place, for a group comes as one task. Snakemake
        works a group's resources out once and for all, so that it is asked on a copy: some may depend
        on files that are still to be made."""
        group_of = getattr(self.dag, "get_job_group", lambda job: None)
        groups = dict.fromkeys(group_of(job) for job in asked)
        alone = {job: settings for job, settings in asked.items() if group_of(job) is None}
        return {**alone, **self._asked([copy.copy(group) for group in groups if group])}

    def _announcements(self, asked: Mapping[Any, RuleSettings]) -> list[Announcement]:
        return [
            Announcement(s.strategy, _file_name(job.name), s.need, self._planned(s), s.spot)
            for job, s in asked.items()
        ]

    def _planned_jobs(self, asked: Mapping[Any, RuleSettings]) -> list[PlannedJob]:
        """The workflow's graph as far as it is known; a look ahead like `_jobs_ahead`."""
        from .recording import PlannedJob

        name_of = {member: _display_name(job) for job in asked for member in members_of(job)}
        waits = dependencies(self.dag)
        planned = []
        for job, settings in asked.items():
            name, members = _display_name(job), members_of(job)
            before = [other for member in members for other in waits.get(member, ())]
            names = [name_of[other] for other in before if other in name_of]
            after = tuple(dict.fromkeys(other for other in names if other != name))
            rule = _file_name(job.name)
            estimate = self._planned(settings)
            planned.append(PlannedJob(name, rule, settings.need, estimate, after))
        return planned

    def _settings(self, job: Any) -> RuleSettings:
        resources: Mapping[str, Any] = dict(job.resources.items())
        threads = max(1, job.threads if isinstance(job.threads, int) else 1)
        if not job.is_group():
            return self._rule_settings(job, threads, resources)
        members = [dict(member.resources.items()) for member in job.jobs]
        resources = of_group(job.name, resources, threads, members)
        found = self._rule_settings(job, threads, resources)
        return found if found.planned is None else replace(found, planned=self._in_layers(job))

    def _rule_settings(self, job: Any, threads: int, resources: Mapping[str, Any]) -> RuleSettings:
        found = rule_settings(job.name, threads, resources, self._config, self._is_preemptible(job))
        if not self._shares_files:
            _check_alone(job.name, found)
        return found

    def _is_preemptible(self, job: Any) -> bool:
        """Whether --preemptible-rules names its rule, or those of all its members; no part of the executor
        interface."""
        remote = getattr(self.workflow, "remote_execution_settings", None)
        rules = getattr(remote, "preemptible_rules", None)
        return rules is not None and all(rules.is_preemptible(name) for name in job.rules)

    def _in_layers(self, group: Any) -> float:
        """Seconds a group takes whose members run side by side unless they wait for each other."""
        layers = [[self._settings(member) for member in layer] for layer in group.toposorted]
        return sum(max(self._planned(member) or 0.0 for member in layer) for layer in layers)

    def _task(self, job: JobExecutorInterface) -> Task:
        settings = self._settings(job)
        self._job_cores = settings.need.cpus
        self._tell_ignored(settings.ignored)
        self._task_count += 1
        task = Task(
            key=f"{self._run}-{self._task_count}",
            name=_display_name(job),
            rule=_file_name(job.name),
            jobid=_file_name(str(job.jobid)),
            strategy=settings.strategy,
            need=settings.need,
            command=shell_command(self.format_job_exec(job)),
            ends_run=self._ends_run(job),
            limit=settings.limit,
            planned=self._planned(settings),
            is_limit=settings.planned is None,
            options=settings.options,
            may_bundle=settings.bundle and not job.is_group(),
            spot=settings.spot,
            identity=identity_of(job),
            content=content_of(job),
        )
        self._places.note(job, task)
        return task

    def _tell_ignored(self, names: Iterable[str]) -> None:
        """Once a run for each resource."""
        for name in names:
            if name not in self._ignored:
                self._ignored.add(name)
                self.logger.info(f"schlouder: the resource {name} is not used: {IGNORED[name]}.")

    def _warn_of_few_jobs(self, ahead: int) -> None:
        """Strategies see only what Snakemake hands over at a time."""
        limit = getattr(self.workflow.resource_settings, "nodes", None)
        if limit is not None and limit < min(ahead, self._config.max_vms):
            self.logger.warning(
                f"--jobs {limit} lets schlouder see {limit} of {ahead} jobs at a time; "
                "with a larger --jobs (1000, say) it can plan, and --schlouder-max-vms still holds."
            )

    def _handle_signals(self) -> None:
        """Snakemake itself only waits on SIGTERM; meanwhile nothing new must be started. The first
        Ctrl-C ends the run, further ones must not interrupt the giving back. A closed terminal
        (SIGHUP, unless it is ignored as under nohup) counts as Ctrl-C, or the VMs would stay."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._handle(signal.SIGTERM, self._on_terminate)
        self._handle(signal.SIGINT, self._on_interrupt)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            self._handle(signal.SIGHUP, self._on_interrupt)

    def _handle(self, number: int, handler: Callable[[int, Any], None]) -> None:
        self._handlers[number] = signal.signal(number, handler)

    def _on_terminate(self, number: int, frame: Any) -> None:
        if self._broker is not None:
            self._broker.stop()
        snakemakes = self._handlers[number]
        if callable(snakemakes):
            snakemakes(number, frame)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self._ending:
            self.logger.info("VMs are being given back, please wait.")
            return
        self._ending = True
        raise KeyboardInterrupt

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    # -- results

    def _tick(self) -> None:
        if self._broker is None:
            return
        try:
            ended = self._broker.tick()
            self._ended.update({task.key: task for task in ended})
            self._complete += [task for task in ended if task.state == TaskState.COMPLETE]
            self._fetch_logs(self._broker, ended)
            self._sweep(self._broker, ended)
            self._failed_rounds = 0
        except Exception as error:
            self._failed_rounds += 1
            if self._failed_rounds == 1:
                self.logger.warning(f"schlouder: a round failed and will be repeated: {error!r}")
            self.logger.debug("schlouder: trace of the failed round", exc_info=True)
            if self._failed_rounds >= _FAILED_ROUNDS:
                raise WorkflowError(
                    f"schlouder: {_FAILED_ROUNDS} rounds failed: {error!r}"
                ) from error

    def _hand_on(self, info: SubmittedJobInfo, task: Task) -> None:
        if task.state == TaskState.COMPLETE:
            self.report_job_success(info)
        elif task.state == TaskState.CANCELLED:
            self._dropped += task.started is None
            self.workflow.scheduler.error_callback(info.job)
        else:
            self._report_failure(info, task)

    def _report_failure(self, info: SubmittedJobInfo, task: Task) -> None:
        assert self._broker is not None
        log = self._broker.log_of(task)
        where = f" on VM {task.vm}" if task.vm else ""
        shown = tail(log) if task.slurm_id else ""
        self.report_job_error(
            info,
            msg=f"Job {task.name}{where}: {task.reason}.\n{shown}",
            aux_logs=[str(log)] if log.exists() else [],
        )
        if info.job.is_group():
            self.logger.error(f"Group job {task.name}{where}: {task.reason}.\n{shown}")

    def _fetch_logs(self, broker: Broker, ended: Iterable[Task]) -> None:
        """The logs of failed tasks, from the storage if they are there; before that is swept."""
        if self._objects is None:
            return
        failed = [task for task in ended if task.state == TaskState.FAILED and task.slurm_id]
        for task in failed:
            try:
                self._objects.fetch_log(broker.exit_file(task), broker.log_of(task))
            except OSError as error:
                self.logger.warning(
                    f"No log of {task.name}: {error}. A job leaves one if its VM is not lost, and the VM's "
                    f"{self.get_python_executable()!r} has boto3 and credentials for the storage."
                )

    def _sweep(self, broker: Broker, ended: Iterable[Task]) -> None:
        """Removes the files that ended tasks leave, once the journal has their ends: until then a crash
        would leave nothing else to tell them."""
        self._to_sweep += ended
        sweeper = self._sweeper
        if sweeper is None or not broker.is_written:
            return
        swept, self._to_sweep = self._to_sweep, []
        if self._config.keep_logs:
            swept = [task for task in swept if task.state != TaskState.COMPLETE]
        if names := [name for task in swept for name in names_to_remove(task)]:
            sweeper.remove(names)

    def _end_sweeping(self, broker: Broker) -> None:
        if self._sweeper is not None:
            self._sweep(broker, [])
            sweeper, self._sweeper = self._sweeper, None
            over = broker.is_released and broker.is_written
            sweeper.close(everything=over and not self._config.keep_logs)

    def _ends_run(self, job: Any) -> bool:
        """Whether a failure of this attempt ends the workflow: no retry left and no --keep-going."""
        retried = (getattr(job, "restart_times", 0) or 0) > job.attempt - 1
        settings = getattr(self.workflow, "execution_settings", None)
        return not retried and not getattr(settings, "keep_going", False)

    def _tell_dropped(self) -> None:
        if self._dropped:
            self.logger.info(f"{self._dropped} jobs were not started, because the run is ending.")
            self._dropped = 0

    def _note_spot_prices(self, journal: Journal) -> None:
        """What the spot VMs have really cost: their price changes while they run."""
        used = [vm for vm in journal.vms(self._run) if vm.market == SPOT and vm.meter is not None]
        if not used or self._offered is None:
            return
        names = sorted({vm.instance_type for vm in used})
        kinds = [InstanceType(name, 1, 1) for name in names]
        zones = sorted({vm.zone for vm in used if vm.zone})
        history = self._offered.spot_history(kinds, zones, min(vm.meter or 0.0 for vm in used))
        journal.note_paid(self._run, spot_bills(used, history, self._config.billing, time.time()))

    def _report(self) -> None:
        if self._journal is None or self._reported:
            return
        from . import report

        self._reported = True
        self._note_spot_prices(self._journal)
        self.logger.info(report.as_text(report.run_report(self._journal, self._run)))


def _markets(config: Config, asked: Iterable[RuleSettings]) -> tuple[str, ...]:
    """Those on which machines may be started."""
    spots = {config.spot, *(settings.spot for settings in asked)}
    wanted = {ON_DEMAND: spots != {ONLY}, SPOT: spots != {NEVER}}
    return tuple(market for market, is_wanted in wanted.items() if is_wanted)


def _ec2_settings(config: Config, markets: tuple[str, ...]) -> Ec2Settings:
    return Ec2Settings(
        region=config.region,
        image=config.image,
        subnets=config.subnets,
        security_groups=config.security_groups,
        key_name=config.key_name,
        instance_profile=config.instance_profile,
        launch_template=config.launch_template,
        volume_size=config.volume_size,
        volume_encrypted=config.volume_encrypted,
        tags=config.tags,
        types=config.instance_types,
        markets=markets,
    )


def _check_alone(rule: str, settings: RuleSettings) -> None:
    """SchlouderError for what takes a file system that the VMs share."""
    nodes = settings.need.nodes
    if settings.bundle or nodes > 1:
        what = "schlouder_bundle" if settings.bundle else f"nodes: {nodes}"
        raise SchlouderError(
            f"rule {rule}: {what} is not supported with --shared-fs-usage none; it takes a file system "
            "that the VMs share"
        )


def _check_sizes(asked: Mapping[Any, RuleSettings], market: Market) -> None:
    offers = Offers(market.types, reserved=market.reserved)
    needs = dict.fromkeys((job.name, settings.need) for job, settings in asked.items())
    problems = [
        too_big(f"rule {rule}", need, offers.allowed(need))
        for rule, need in needs
        if offers.fits_none(need)
    ]
    if problems:
        raise SchlouderError("\n".join(problems))


def check_strays(commands: SlurmCommands, journal: Journal, workdir: Path) -> None:
    """SchlouderError while jobs of a run work here that this journal does not know: they write what this run
    is to write."""
    known = {f"schlouder-{record.run}" for record in journal.runs()}
    try:
        found = {name for name in commands.jobs_in(workdir) if _JOB_NAME.fullmatch(name)}
    except ClusterUnavailable as error:
        raise SchlouderError(f"Slurm: slurmctld does not answer ({error})") from error
    if strays := ",".join(sorted(found - known)):
        raise SchlouderError(
            f"jobs of a run that the journal does not know work in {workdir}: its journal was lost, or is "
            f"on another host. Wait until they have ended, or end them with `scancel --name={strays}`; "
            "`schlouder gc` finds the VMs they leave."
        )


def _display_name(job: Any) -> str:
    """Rule and wildcards, such as `search chunk=3`, for people: in one line, fit for a terminal."""
    wildcards = getattr(job, "wildcards_dict", None) or {}
    return one_line(" ".join([job.name, *(f"{name}={value}" for name, value in wildcards.items())]))


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)
