"""Any value of any type arrives as it is: by copy, insert and update, in the warehouse and in the replayed history.

Hypothesis draws tables of types, built in or made by users, and their values (tests/literals.py). What is written to
them, and when the consumer runs, follows from a number that it draws too. Postgres is the oracle: values are compared
with what it prints; what does not fit, by the rule in tests/values.py, has to be in the quarantine, and nothing else.

    VALUES_EXAMPLES=200 SOAK=1 pytest tests/integration/test_any_value.py    other examples at every run
"""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
import pyarrow.parquet as pq
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from cdc.embedded import EmbeddedServer
from cdc.pgoutput.types.table import TYPES
from tests.conftest import DRAWN, SOAK, Database, Lake, fresh_database
from tests.integration.steps import sync
from tests.literals import BUILT_IN, EXTENSIONS, Kind, array, columns, composite, decimals, domain, enum, ranges
from tests.mirror import exact_differences, history_files, one_look, states, warehouse_rows
from tests.values import PINNED

EXAMPLES = int(os.environ.get("VALUES_EXAMPLES", "100" if SOAK else "4"))

_WRITING = PINNED.replace("search_path=", "search_path=public") + " -c standard_conforming_strings=on -c array_nulls=on"

# As a literal, not by a parameter: then a cast of a type with a length cuts what is too long.
_ACCEPTED = """
    CREATE FUNCTION accepted(value text, kind text) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
        EXECUTE format('SELECT %L::%s', value, kind);
        RETURN true;
    EXCEPTION WHEN OTHERS THEN
        RETURN false;
    END $$"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A table that is to be.

    Attributes:
        kinds: its columns, c0 and so on, next to the key `id` and `pad`, which no type of ours has.
        pools: values of each, of which rows have any.
        full: its replica identity is FULL.
        toast: each value of some length is kept out of line, and not sent while it stays as it is.
        rows: how many are written before they are changed.
    """

    name: str
    kinds: tuple[Kind, ...]
    pools: tuple[tuple[str, ...], ...]
    full: bool
    toast: bool
    rows: int

    @property
    def key(self) -> Sequence[str]:
        """What identifies its rows in the stream."""
        return () if self.full else ("id",)

    def __str__(self) -> str:
        flags = " FULL" * self.full + " TOAST" * self.toast
        return f"{self.name}{flags}: {', '.join(kind.sql for kind in self.kinds)}"


@st.composite
def plans(draw: st.DrawFn, name: str, extensions: Sequence[str]) -> Plan:
    """Return any table."""
    kinds = [draw(columns(f"{name}_c{number}", extensions)) for number in range(draw(st.integers(1, 8)))]
    return Plan(
        name,
        tuple(kinds),
        tuple(tuple(draw(st.lists(_any_text(kind), min_size=2, max_size=7))) for kind in kinds),
        full=draw(st.booleans()),
        toast=draw(st.booleans()),
        rows=14,
    )


def _any_text(kind: Kind) -> st.SearchStrategy[str]:
    return st.one_of(kind.texts, kind.texts, st.sampled_from(kind.nasty))


class Source:
    """Writes the tables, with a chance of its own; the values that Postgres refuses are left out."""

    def __init__(self, database: Database, plans: Sequence[Plan], seed: int) -> None:
        self.refused: set[tuple[str, str]] = set()
        self._made: set[str] = set()
        self._chance = random.Random(seed)
        self._plans = plans
        self._connection = database.connect(options=_WRITING)
        self._values: dict[str, list[list[str]]] = {}
        self._ids: dict[str, list[int]] = {plan.name: [] for plan in plans}
        self._next = dict.fromkeys(self._ids, 1)
        self._connection.execute(_ACCEPTED.encode())
        for plan in plans:
            self._create(plan)

    def _create(self, plan: Plan) -> None:
        # Out of line goes what is long only when the row is: so `pad`, which has to stay where it is.
        defined = ", ".join(f"c{number} {kind.sql}" for number, kind in enumerate(plan.kinds))
        table = f"CREATE TABLE {plan.name} (id int PRIMARY KEY, pad text STORAGE PLAIN, {defined})"
        if self._connection.info.server_version < 160000:
            table = table.replace(" STORAGE PLAIN", "") + f"; ALTER TABLE {plan.name} ALTER pad SET STORAGE PLAIN"
        for statement in [*(statement for kind in plan.kinds for statement in kind.ddl), table]:
            if statement not in self._made:
                self._made.add(statement)
                self._connection.execute(statement.encode())
        if plan.full:
            self._connection.execute(f"ALTER TABLE {plan.name} REPLICA IDENTITY FULL".encode())
        if plan.toast:
            self._keep_out_of_line(plan.name)
        self._values[plan.name] = [
            self._literals(kind, texts) for kind, texts in zip(plan.kinds, plan.pools, strict=True)
        ]

    def _keep_out_of_line(self, table: str) -> None:
        long = self._connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 2 AND attstorage <> 'p'",
            [table],
        ).fetchall()
        changes = [*(f"ALTER {name} SET STORAGE EXTERNAL" for (name,) in long), "SET (toast_tuple_target = 128)"]
        self._connection.execute(f"ALTER TABLE {table} {', '.join(changes)}".encode())

    def _literals(self, kind: Kind, texts: Sequence[str]) -> list[str]:
        """Return SQL for each of the texts that Postgres takes, and NULL."""
        asked = self._connection.execute(
            "SELECT value, accepted(value, %s) FROM unnest(%s::text[]) AS value", [kind.sql, list(texts)]
        ).fetchall()
        self.refused |= {(kind.sql, text) for text, accepted in asked if not accepted}
        return [f"{_literal(text)}::{kind.sql}" for text, accepted in asked if accepted] + ["NULL"]

    def insert(self) -> None:
        """Insert half of each table's rows, with one value after the other."""
        for plan in self._plans:
            self._run(self._inserts(plan, (plan.rows + 1) // 2))

    def _inserts(self, plan: Plan, count: int) -> list[str]:
        first = self._next[plan.name]
        ids = range(first, first + count)
        self._next[plan.name] += count
        self._ids[plan.name] += ids
        values = self._values[plan.name]
        return [
            f"INSERT INTO {plan.name} VALUES ({new}, {self._pad(plan)}, {', '.join(v[new % len(v)] for v in values)})"
            for new in ids
        ]

    def change(self) -> None:
        """Insert some rows, update and delete some of all of each table, in transactions of one statement or more."""
        for plan in self._plans:
            ids = self._ids[plan.name]
            statements = self._inserts(plan, 2) + [self._update(plan) for _ in ids]
            gone = [ids.pop(self._chance.randrange(len(ids))) for _ in range(len(ids) // 5)]
            statements += [f"DELETE FROM {plan.name} WHERE id = {old}" for old in gone]
            while statements:
                size = self._chance.choice((1, 2, 9))
                self._run(statements[:size])
                del statements[:size]

    def _update(self, plan: Plan) -> str:
        """Return an update of one row: some columns, or another key, or nothing but what is always sent."""
        ids = self._ids[plan.name]
        at = self._chance.randrange(len(ids))
        old, sets = ids[at], [f"pad = {self._pad(plan)}"]
        for number, values in enumerate(self._values[plan.name]):
            if self._chance.random() < 0.3:
                sets.append(f"c{number} = {self._chance.choice([*values, 'NULL'])}")
        if self._chance.random() < 0.1:
            ids[at] = self._next[plan.name]
            sets.append(f"id = {ids[at]}")
            self._next[plan.name] += 1
        return f"UPDATE {plan.name} SET {', '.join(sets)} WHERE id = {old}"

    def _pad(self, plan: Plan) -> str:
        return f"repeat('{self._chance.choice('abc')}', {2100 if plan.toast else 1})"

    def _run(self, statements: Sequence[str]) -> None:
        self._connection.execute("; ".join(statements).encode())


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_PARQUET = {
    "BOOLEAN": "bool",
    "SMALLINT": "int16",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "FLOAT": "float",
    "DOUBLE": "double",
    "BLOB": "binary",
    "DATE": "date32[day]",
    "TIMESTAMP": "timestamp[us]",
    "TIMESTAMP WITH TIME ZONE": "timestamp[us, tz=UTC]",
    "TIME": "time64[us]",
    "INTERVAL": "struct<months: int32, days: int32, microseconds: int64>",
}
"""By DuckDB type, the Arrow type of the change log; of the rest, string."""


def parquet_type(duckdb: str) -> str:
    """Return what docs/types.md says that the change log has, as Arrow calls it."""
    element = duckdb.removesuffix("[]")
    if element.startswith("DECIMAL"):
        precision, scale = element[8:-1].split(",")
        return f"decimal128({precision}, {scale})"
    return _PARQUET.get(element, "string")


def check_types(lake: Lake, plan: Plan) -> None:
    """Assert that each column is of the type that docs/types.md says, in DuckDB and in each file of the change log."""
    found = warehouse_rows(lake, f"DESCRIBE public.{plan.name}")
    kinds = {str(name): str(kind) for name, kind, *_ in found}
    assert {f"c{number}": kind.duckdb for number, kind in enumerate(plan.kinds)}.items() <= kinds.items(), str(plan)
    files = [path for path in history_files(lake) if path.parent.name == plan.name and path.suffix == ".parquet"]
    assert files
    for path in files:
        schema = pq.read_schema(path)
        for number, kind in enumerate(plan.kinds):
            arrow = schema.field(f"c{number}").type
            element = arrow.value_type if kind.duckdb.endswith("[]") else arrow
            assert str(element) == parquet_type(kind.duckdb), f"{kind} in {path}: {arrow}"


def mirror(database: Database, lake: Lake, plans: Sequence[Plan], seed: int) -> Source:
    """Write half of the rows, mirror them, then the other half, then change them: everything has to agree."""
    source = Source(database, plans, seed)
    source.insert()
    sync(database, lake)
    source.insert()
    sync(database, lake)
    agree_exactly(database, lake, plans)
    source.change()
    sync(database, lake)
    agree_exactly(database, lake, plans)
    return source


def agree_exactly(database: Database, lake: Lake, plans: Sequence[Plan]) -> None:
    """Assert that no value differs, that each column is of its type, and that no table was given up."""
    with one_look(lake):
        found = [exact_differences(database, lake, f"public.{plan.name}", plan.key) for plan in plans]
        assert not any(found), "\n".join(filter(None, found))
        assert states(lake) == {f"public.{plan.name}": "streaming" for plan in plans}
        for plan in plans:
            check_types(lake, plan)


def extensions(database: Database) -> list[str]:
    """Return the extensions that the server has."""
    return sorted(name for (name,) in database.execute("SELECT name FROM pg_available_extensions"))


_AVAILABLE: dict[int, list[str]] = {}


@pytest.fixture(scope="session")
def available(server: EmbeddedServer) -> list[str]:
    """The extensions that the server has."""
    if server.version not in _AVAILABLE:
        with fresh_database(server, "extensions") as database:
            _AVAILABLE[server.version] = extensions(database)
    return _AVAILABLE[server.version]


@pytest.mark.timeout(0 if SOAK else 900)  # half a minute, or what it takes to shrink a failure
@settings(DRAWN, max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_any_value_of_any_type(server: EmbeddedServer, available: list[str], data: st.DataObject, seed: int) -> None:
    """A1 to A20, A22, D1 to D4: three tables of any types, by copy, insert, update and delete."""
    drawn = [data.draw(plans(f"t{number}", available)) for number in range(3)]
    note("\n".join(map(str, drawn)))
    with (
        tempfile.TemporaryDirectory(prefix="values-") as root,
        fresh_database(server, "values") as database,
    ):
        lake = Lake(Path(root), Path(root) / "warehouse.duckdb", Path(root) / "history")
        mirror(database, lake, drawn, seed)


# Every type once

UNWRITABLE = {
    "gtsvector",
    "pg_node_tree",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
}
"""Types of which there is no literal."""

FAMILIES: Mapping[str, str] = {
    "A1 A2": "bool int2 int4 int8 float4 float8",
    "A3 A4": "numeric money",
    "A5 A6": "date timestamp timestamptz",
    "A7 A8": "time timetz interval",
    "A9": 'text varchar bpchar name "char"',
    "A10": "bytea bit varbit",
    "A11": "uuid json jsonb jsonpath",
    "A14": "int4range int8range numrange daterange tsrange tstzrange",
    "A14 multi": "int4multirange int8multirange nummultirange datemultirange tsmultirange tstzmultirange",
    "A18": "inet cidr macaddr macaddr8",
    "A19": "xml tsvector tsquery point line lseg box path polygon circle",
    "A20": "oid xid xid8 cid tid pg_lsn pg_snapshot txid_snapshot refcursor aclitem int2vector oidvector",
    "A20 reg": "regclass regcollation regconfig regdictionary regnamespace regoper regoperator regproc regprocedure "
    "regrole regtype",
}
"""By scenario, the built-in types."""


def made(available: Sequence[str]) -> Iterator[tuple[Kind, ...]]:
    """Yield the columns of a table for each way to make a type of others."""
    by_name = {kind.name: kind for kind in BUILT_IN}
    moods = enum(
        '"Mood"', ("", "NULL", "null", "a,b", 'q"q', "it's", "{}", r"\N", " ", "x" * 63, "größer 😀", "(", ";")
    )
    price, whole = decimals(10, 2), domain("whole", by_name["int8"])
    pair = composite("pair", (by_name["int4"], by_name["text"]))
    fitting = ((1, 0), (1, 1), (9, 4), (18, 18), (19, 0), (38, 0), (38, 10), (38, 38))
    others = ((39, 2), (5, -2), (2, 5), (1000, 1000), (1000, -1000))
    yield (*(decimals(*both) for both in fitting + others), array(decimals(38, 38)), array(decimals(5, -2)))  # A3
    yield moods, array(moods), domain("mood", moods), array(domain("moody", moods))  # A15
    dear, prices = domain("price", price), domain("prices", array(price))
    yield (
        dear,
        domain("dearer", dear),
        array(dear),
        prices,
        array(prices),
        domain("all_prices", array(dear)),
        whole,
        array(whole),
        *(array(domain(f"d_{name}", by_name[name])) for name in ("box", "bytea", "timestamptz", "json", "float4")),
    )  # A16
    nested = composite("nested", (pair, array(pair), moods, dear, by_name["bytea"], by_name["timestamptz"]))
    yield pair, array(pair), nested, array(nested), domain("pairs", array(pair))  # A17
    yield tuple(
        kind
        for number, name in enumerate(("float8", "text", "inet", "time", "uuid"))
        for kind in (
            ranges(f"r{number}", by_name[name], multi=False),
            array(ranges(f"s{number}", by_name[name], multi=False)),
            ranges(f"m{number}", by_name[name], multi=True),
        )
    )  # A14
    brought = tuple(kind for extension, kind in EXTENSIONS if extension in available)
    yield brought + tuple(map(array, brought))  # A12, A22


def every_plan(available: Sequence[str], version: int) -> list[Plan]:
    """Return tables that have every type, and an array of each; what is FULL on an even version is not on an odd one.

    The tables are in the order of `FAMILIES` and `made`.
    """
    by_name = {kind.name: kind for kind in BUILT_IN}
    found = [tuple(by_name[name] for name in names.split()) for names in FAMILIES.values()]
    assert sorted(kind.name for kinds in found for kind in kinds) == sorted(by_name)
    assert by_name.keys() == {row.name for row in TYPES} - UNWRITABLE
    tables = [*(kinds + tuple(map(array, kinds)) for kinds in found), *made(available)]
    return [
        Plan(
            f"t{number}",
            kinds,
            tuple(kind.nasty for kind in kinds),
            full=(number + version) % 2 == 0,
            toast=number % 3 > 0,
            rows=max(len(kind.nasty) for kind in kinds) + 1,
        )
        for number, kinds in enumerate(tables)
    ]


SESSIONS: Mapping[str, Mapping[str, str]] = {
    "plain": {},
    "german": {
        "datestyle": "German",
        "timezone": "Asia/Kathmandu",
        "intervalstyle": "sql_standard",
        "bytea_output": "escape",
        "extra_float_digits": "-15",
        "client_encoding": "LATIN1",
        "search_path": "nowhere",
        "lc_monetary": "C.utf8",
        "xmlbinary": "hex",
        "xmloption": "document",
        "array_nulls": "off",
        "standard_conforming_strings": "off",
        "quote_all_identifiers": "on",
    },
    "odd": {
        "datestyle": "SQL, DMY",
        "timezone": "<-13:07>13:07",
        "intervalstyle": "iso_8601",
        "extra_float_digits": "0",
        "client_encoding": "SQL_ASCII",
        "backslash_quote": "on",
        "escape_string_warning": "on",
        "transform_null_equals": "on",
        "enable_seqscan": "off",
        "default_toast_compression": "pglz",
        "lc_messages": "C.utf8",
        "row_security": "off",
        "default_transaction_isolation": "serializable",
        "default_transaction_deferrable": "on",
    },
}
"""By name, what a role or database may set for its sessions."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "session", ["german", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "odd"))]
)
def test_every_type_once(database: Database, lake: Lake, available: list[str], session: str) -> None:
    """A1 to A20, A22, J19: each type, arrays of it, and its nasty values, whatever a database sets for its sessions."""
    with psycopg.connect(database.server.dsn("postgres"), autocommit=True) as connection:
        for name, value in SESSIONS[session].items():
            setting = value if name in ("search_path", "datestyle") else _literal(value)
            connection.execute(f'ALTER DATABASE "{database.name}" SET {name} = {setting}'.encode())
    source = mirror(database, lake, every_plan(available, database.version), 0)
    unknown = ("infinity",) if database.version < 17 else ()
    refused = {(kind, text) for kind, text in source.refused if not any(word in text for word in unknown)}
    assert {kind for kind, _ in refused} <= {"xml", "xml[]"}  # of a server that was built without libxml


@pytest.mark.timeout(600)
def test_many_values_of_the_types_that_are_parsed(database: Database, lake: Lake) -> None:
    """A2, A3, A5 to A8, A11, A13: odd values between thousands of others, as columns are parsed by the block."""
    kinds = [kind for kind in BUILT_IN if kind.duckdb != "VARCHAR"] + [decimals(10, 2), decimals(38, 0)]
    short = [dataclasses.replace(kind, nasty=tuple(text for text in kind.nasty if len(text) < 100)) for kind in kinds]
    plans = [
        Plan(
            f"t{number}",
            tuple(columns),
            # Mostly one and the same value, so that the odd ones are far from each other.
            tuple((*kind.nasty, *[kind.nasty[0]] * (700 + at)) for at, kind in enumerate(columns)),
            full=False,
            toast=False,
            rows=5000,
        )
        for number, columns in enumerate((short, [array(kind) for kind in short]))
    ]
    source = Source(database, plans, 0)
    source.insert()
    sync(database, lake)
    source.insert()
    sync(database, lake)
    agree_exactly(database, lake, plans)
