"""Keeps a DuckDB warehouse and a Parquet change log in step with a Postgres database."""

from __future__ import annotations

import os

# Before Arrow is loaded: its own default, mimalloc, takes a fifth more memory and a tenth more time for a backlog
# (bench/backlog.py), and has crashed beside other copies of itself: https://github.com/microsoft/mimalloc/issues/1287
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
