"""Keeps a DuckDB warehouse and a Parquet change log in step with a Postgres database."""

from __future__ import annotations

import os

# Before Arrow is loaded. Its own default, mimalloc 3, is suspected of handing out memory twice when threads come and go
# beside other allocators: https://github.com/microsoft/mimalloc/issues/1287, https://github.com/apache/arrow/issues/50908
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
