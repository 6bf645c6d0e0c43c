"""Snakemake executor plugin schlouder: rents EC2 machines by a strategy and runs jobs on them through Slurm.

Snakemake imports this module in every call on the machine, so it imports no SDK and does no I/O.
"""

from snakemake_interface_executor_plugins.settings import CommonSettings

from .executor import Executor
from .settings import ExecutorSettings

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=True,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
)
