"""The settings: by flag, environment variable or ``cdc.toml``, in that order of precedence, under the same names.

The names of the polling predecessor (POSTGRES_HOST, DUCKDB_PATH, ...) are read as well; where both are set, ours wins.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from psycopg.conninfo import make_conninfo
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cdc.errors import SettingsError
from cdc.pgoutput.masks import Kind, Mask
from cdc.pgoutput.types import Basis, read_choice
from cdc.source.connection import read_dsn

__all__ = ["Settings", "load", "read_seconds"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def _bytes(value: object) -> object:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f"not a size such as 64MB: {value!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def read_seconds(value: object) -> float:
    """Return a duration in seconds.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].lower() not in _SECONDS:
        raise ValueError(f"not a duration such as 1s or 200ms: {value!r}")
    return float(match[1]) * _SECONDS[match[2].lower()]


def _names(value: object) -> object:
    if isinstance(value, str):
        names = re.split(r",(?![^()]*\))", value)  # but not the comma of DECIMAL(12,2)
        return tuple(name.strip() for name in names if name.strip())
    return value


def _masks(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        column, _, kind = entry.rpartition(":")
        if column.count(".") < _DOTS or kind not in get_args(Kind):
            raise ValueError(f"not schema.table.column and one of :hmac, :null, :hash: {entry!r}")
    return value


def _choices(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        column, _, kind = entry.rpartition(":")
        if column.count(".") < _DOTS or read_choice(kind) is None:
            raise ValueError(f"not schema.table.column and one of :VARCHAR, :DOUBLE, :DECIMAL(p,s): {entry!r}")
    return value


def _none(value: object) -> object:
    return None if value == "" else value


def _file(value: Path) -> Path:
    if not value.name:  # '' is the folder we are in
        raise ValueError("must be the path of a file, and is empty or a folder")
    return value


Size = Annotated[int, BeforeValidator(_bytes)]
Duration = Annotated[float, BeforeValidator(read_seconds)]
File = Annotated[Path, AfterValidator(_file)]
Folder = Annotated[Path | None, BeforeValidator(_none)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
_DOTS = 2

PREDECESSOR = {
    "POSTGRES_SCHEMA": None,
    "POSTGRES_TABLE": None,
    "POSTGRES_HOST": None,
    "POSTGRES_PORT": None,
    "POSTGRES_DB": None,
    "POSTGRES_USER": None,
    "POSTGRES_PASSWORD": None,
    "SYNC_INTERVAL_SECONDS": "flush_interval",
    "BATCH_SIZE": "flush_rows",
    "POSTGRES_PRIMARY_KEY": "primary_key",
    "DUCKDB_PATH": "warehouse",
    "DUCKDB_TABLE": "view",
    "PARQUET_DIR": "history",
    "STATE_DIR": None,
}
"""The predecessor's variables and which of our settings each means; None: several together do, or it has no use now."""

_PREDECESSOR_TABLE, _PREDECESSOR_VIEW = "subscriptions", "analytics_subscriptions"


class Settings(BaseSettings):
    """What `cdc` is told. Sizes are bytes and durations seconds once read."""

    model_config = SettingsConfigDict(
        env_prefix="CDC_", toml_file="cdc.toml", extra="forbid", frozen=True, env_ignore_empty=False
    )

    dsn: str = Field("", description="the source database: a URL or conninfo string, TLS options included")
    warehouse: File = Field(Path("lake/warehouse.duckdb"), description="the DuckDB database")
    history: Folder = Field(Path("lake/history"), description="folder of the Parquet change log; empty: none")
    slot: str = Field("cdc", pattern=r"^[a-z0-9_]{1,63}$", description="the replication slot: a-z, 0-9 and _")
    publication: str = Field("cdc", min_length=1, max_length=56, description="the publication")
    tables: Annotated[
        Names, Field(description="schema.table names or patterns, by comma; empty: every user table")
    ] = ()
    exclude: Annotated[
        Names, Field(description="schema.table.column names, by comma, of columns that never leave Postgres")
    ] = ()
    mask: Annotated[
        Names,
        AfterValidator(_masks),
        Field(description="schema.table.column:kind, by comma; kind: hmac or hash (64 hex digits), or null"),
    ] = ()
    mask_key: SecretStr = Field(SecretStr(""), description="the key of hmac; better in the environment than as a flag")
    types: Annotated[
        Names,
        AfterValidator(_choices),
        Field(description="schema.table.column:type, by comma; type: VARCHAR; of numeric also DOUBLE or DECIMAL(p,s)"),
    ] = ()
    quarantine_limit: int = Field(
        10_000, ge=0, description="a column of which more values do not fit its type becomes VARCHAR"
    )
    flush_interval: Annotated[Duration, Field(gt=0, le=3600, description="longest time that a batch is collected")] = (
        1.0
    )
    poll_interval: Annotated[
        Duration,
        Field(gt=0, le=3600, description="how often new tables, and DDL that no change has followed, are seen"),
    ] = 5.0
    flush_rows: int = Field(100_000, ge=1, le=10_000_000, description="largest number of changes in a batch")
    flush_bytes: Annotated[Size, Field(ge=1, le=10**9, description="largest size of a batch")] = 64_000_000
    memory: Annotated[Size, Field(ge=64_000_000, description="DuckDB's memory limit")] = 512_000_000
    threads: int = Field(os.cpu_count() or 2, ge=1, le=1024, description="DuckDB's threads, and those of a copy")
    tmp: Folder = Field(None, description="DuckDB's folder for spilling; default: beside the warehouse")
    view: str = Field("", description="a view of CDC_VIEW_OF in schema main, under a name that old queries know")
    view_of: str = Field("", pattern=r"^$|^[^.]+\..+$", description="schema.table that CDC_VIEW shows")
    primary_key: str = Field("", description="what must identify the rows of CDC_VIEW_OF: columns, by comma")
    log: Literal["text", "json"] = Field("text", description="log lines for people, or one JSON object each")
    deletes: Literal["hard", "soft"] = Field("hard", description="hard: deleted rows go; soft: they stay")

    @property
    def masks(self) -> dict[str, Mask]:
        """CDC_MASK by ``schema.table.column``."""
        key = self.mask_key.get_secret_value().encode()
        parts = (entry.rpartition(":") for entry in self.mask)
        return {column: Mask(cast("Kind", kind), key if kind == "hmac" else b"") for column, _, kind in parts}

    @property
    def choices(self) -> dict[str, Basis]:
        """CDC_TYPES by ``schema.table.column``."""
        parts = (entry.rpartition(":") for entry in self.types)
        return {column: basis for column, _, kind in parts if (basis := read_choice(kind)) is not None}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- we read no .env file
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- nor a folder of secrets
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then ``cdc.toml``."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings that `flags`, the environment and ``cdc.toml`` give together.

    Args:
        flags: setting name (``flush_rows``) to value, only those that were given.

    Raises:
        SettingsError: a value is not usable, or a ``CDC_`` variable or key of ``cdc.toml`` is unknown.
    """
    _refuse_unknown(environ)
    values = dict(flags)
    for name, value in _predecessor(environ).items():
        if f"CDC_{name.upper()}" not in environ:
            values.setdefault(name, value)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise _explain(error, flags, environ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"cdc.toml cannot be read: {error}", "mend the file, or take it away") from None
    read_dsn(settings.dsn)
    _check_masks(settings)
    _check_choices(settings)
    if (settings.view or settings.primary_key) and not settings.view_of:
        lonely = "CDC_VIEW" if settings.view else "CDC_PRIMARY_KEY"
        raise SettingsError(f"{lonely} needs CDC_VIEW_OF", "set it to the schema.table that is meant")
    return settings


def _check_masks(settings: Settings) -> None:
    if any(entry.endswith(":hmac") for entry in settings.mask) and not settings.mask_key.get_secret_value():
        raise SettingsError("CDC_MASK has hmac, but CDC_MASK_KEY is empty", "set it to a long random text; keep it")
    names = [entry.rpartition(":")[0] for entry in settings.mask]
    for name in names:
        if name in settings.exclude:
            raise SettingsError(f"CDC_MASK: {name} is in CDC_EXCLUDE as well", "take it out of one of them")
        if names.count(name) > 1:
            raise SettingsError(f"CDC_MASK: {name} has more than one mask", "leave one of them")


def _check_choices(settings: Settings) -> None:
    names = [entry.rpartition(":")[0] for entry in settings.types]
    for name in names:
        if name in settings.exclude or name in settings.masks:
            raise SettingsError(
                f"CDC_TYPES: {name} is in CDC_EXCLUDE or CDC_MASK as well", "take it out of one of them"
            )
        if names.count(name) > 1:
            raise SettingsError(f"CDC_TYPES: {name} has more than one type", "leave one of them")


def _predecessor(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that the polling predecessor's variables stand for."""
    values: dict[str, Any] = {
        ours: environ[theirs] for theirs, ours in PREDECESSOR.items() if ours and environ.get(theirs)
    }
    keys = {"HOST": "host", "PORT": "port", "DB": "dbname", "USER": "user", "PASSWORD": "password"}
    parts = {key: environ[f"POSTGRES_{name}"] for name, key in keys.items() if environ.get(f"POSTGRES_{name}")}
    if parts:
        values["dsn"] = make_conninfo("", **parts)
    schema, table = environ.get("POSTGRES_SCHEMA"), environ.get("POSTGRES_TABLE")
    if any(character in (table or "") for character in ".*?["):
        raise SettingsError(
            f"POSTGRES_TABLE must be the name of one table, and is {table}",
            "its schema goes into POSTGRES_SCHEMA; for several tables or a pattern set CDC_TABLES instead",
        )
    if table:
        values["tables"] = f"{schema or 'public'}.{table}"
    elif schema:
        values["tables"] = f"{schema}.*"
    if table or "view" in values:
        values.setdefault("view", _PREDECESSOR_VIEW)
    if table or "view" in values or "primary_key" in values:
        values["view_of"] = f"{schema or 'public'}.{table or _PREDECESSOR_TABLE}"
    return values


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = [f"CDC_{name.upper()}" for name in Settings.model_fields]
    for name in environ:
        if name.startswith("CDC_") and name not in known and name not in _OF_TESTS:
            raise SettingsError(f"unknown setting {name}", _suggestion(name, known))


_OF_TESTS = ("CDC_CRASH_AT", "CDC_DEMO_DSN")
"""Variables with our prefix that are no settings: the named crash points (cdc/failpoints.py), and the connection of
``cdc demo --changes``, which stands in the environment of a consumer that has no use for it."""


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "the settings are: " + ", ".join(known)


def _explain(error: ValidationError, flags: Mapping[str, Any], environ: Mapping[str, str]) -> SettingsError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    variable = f"CDC_{name.upper()}"
    if name not in flags and variable not in environ:
        variable = next(
            (theirs for theirs, ours in PREDECESSOR.items() if ours == name and theirs in environ), variable
        )
    if first["type"] == "extra_forbidden":
        asked = name.lower().removeprefix("cdc_")
        return SettingsError(f"unknown setting {name} in cdc.toml", _suggestion(asked, list(Settings.model_fields)))
    if first["type"] == "value_error":  # one of ours, above
        reason = first["msg"].removeprefix("Value error, ")
    else:
        must = re.sub("^(Input|String) should ", "must ", first["msg"].split(", unable", 1)[0])
        reason = must if name == "dsn" else f"{must}, and is {first['input']!r}"  # a DSN may hold a password
    field = Settings.model_fields.get(name)
    return SettingsError(f"{variable}: {reason}", f"what it means: {field.description if field else 'unknown'}")
