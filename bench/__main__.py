"""`make bench`: all measurements, one row a figure, also in build/bench.json."""

from __future__ import annotations

import sys
from pathlib import Path

from bench import first_job
from bench.rows import finish

sys.exit(finish(first_job.rows(), Path("build/bench.json")))
