"""The broker: observes, decides, acts. Owns the fleet's life cycle, the queues and the retries.

Knows neither boto3 nor subprocess nor Snakemake: it speaks to the ports `Cloud` and `Cluster` and
writes to the journal what it is about to do. `loop.py` is the round; `lifecycle.py` the table of what is to
be done about a VM, which `keeper.py` and `starting.py` carry out; `attempts.py` judges what Slurm has,
`submission.py` hands over more; `claims.py` goes on with what a killed run has left, `ending.py` ends a run,
and `handover.py` takes VMs from earlier runs and keeps them for later ones.
"""

from .attempts import MAX_LOSSES
from .desk import RECLAIMS, BrokerConfig
from .loop import Broker
from .notebook import Books

__all__ = ["MAX_LOSSES", "RECLAIMS", "Books", "Broker", "BrokerConfig"]
