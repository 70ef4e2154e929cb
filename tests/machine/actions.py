"""Statements for a table, made of what the catalogs say about it and of small numbers that are drawn.

Pure, but for `describe`. No model of rows or columns is kept: Postgres knows, and says it to each transaction in its
own way. Every table has an integer `id`; the other columns are called c0, c1, ... and have any of the types below.
Rows are made of their id and a number called salt, so that a run is the same whenever it is repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "ALTERATIONS",
    "KINDS",
    "PRELUDE",
    "SHAPES",
    "UPDATES",
    "Column",
    "Table",
    "create",
    "delete",
    "describe",
    "insert",
    "partition",
    "truncate",
]

_LARGE = " STORAGE EXTERNAL"

KINDS = (
    "text STORAGE EXTERNAL",
    "int",
    "numeric(10,2)",
    "text",
    "bytea STORAGE EXTERNAL",
    "bigint",
    "boolean",
    "timestamptz",
    "jsonb STORAGE EXTERNAL",
)
"""Types of columns. What is stored EXTERNAL gets values of 3 to 9 kB, which updates that leave them do not send."""

PRELUDE = """
    CREATE FUNCTION large(n bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    repeat(chr((97 + n % 26)::int), (3000 + n * 131 % 6000)::int)"""
"""What the statements need."""

SHAPES = ("key", "composite", "full", "index", "list", "range", "none", "child", "full key", "long key")
"""What identifies a table's rows, and whether it has partitions."""


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A column: `kind` is what format_type says, `large` means STORAGE EXTERNAL."""

    name: str
    kind: str
    required: bool
    large: bool

    def value(self, i: str, salt: int) -> str:
        """Return an expression for its value in the row whose id is the expression `i`."""
        value = _value(self, i, salt)
        return value if self.required else f"CASE WHEN ({i} + {salt}) % 5 <> 4 THEN {value} END"


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table as one transaction sees it.

    Attributes:
        oid: its OID.
        name: its name, in schema public.
        columns: all of them, in order.
        key: the primary key's columns.
        constraint: the primary key's name; '': there is none.
        strategy: l or r of a partitioned table; '': it is not one.
        leaves: names of its partitions.
        followed: whether its updates and deletes can be made, and are published: it has an identity, and is not in the
            publication of tables that have none. (What such a table's rows go through unpublished, the copy that
            follows when it gets an identity brings; but it may lose the identity again before that copy.)
        identity: pg_class.relreplident.
    """

    oid: int
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    constraint: str
    strategy: str
    leaves: tuple[str, ...]
    followed: bool
    identity: str

    @property
    def loose(self) -> list[Column]:
        """The columns that DDL may have its way with."""
        return [column for column in self.columns if column.name.startswith("c")]

    def pick(self, number: int) -> Column | None:
        """Return one of the loose columns, if there are any."""
        return self.loose[number % len(self.loose)] if self.loose else None


_DESCRIBE = """
    SELECT c.oid::int8, c.relreplident::text,
        (SELECT array_agg(json_build_array(a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                                           a.attstorage = 'e') ORDER BY a.attnum)
         FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
        (SELECT json_build_array(k.conname, (SELECT json_agg(a.attname) FROM pg_attribute a
                                             WHERE a.attrelid = c.oid AND a.attnum = ANY (k.conkey)))
         FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'p'),
        coalesce((SELECT partstrat::text FROM pg_partitioned_table WHERE partrelid = c.oid), ''),
        ARRAY(SELECT l.relname::text FROM pg_inherits i JOIN pg_class l ON l.oid = i.inhrelid WHERE i.inhparent = c.oid
              ORDER BY 1),
        (SELECT bool_and(l.relreplident = c.relreplident AND CASE l.relreplident
                WHEN 'f' THEN true
                WHEN 'd' THEN EXISTS (SELECT FROM pg_index x WHERE x.indrelid = l.oid AND x.indisprimary)
                WHEN 'i' THEN EXISTS (SELECT FROM pg_index x WHERE x.indrelid = l.oid AND x.indisreplident)
                ELSE false END)
         FROM pg_class l
         WHERE l.oid = c.oid OR l.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = c.oid))
        AND NOT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                        WHERE r.prrelid = c.oid AND p.pubname = 'cdc_append')
    FROM pg_class c WHERE c.oid = to_regclass(%s) AND c.relkind IN ('r', 'p') AND NOT c.relispartition"""


def describe(look: Callable[[str, Sequence[Any]], list[tuple[Any, ...]]], name: str) -> Table | None:
    """Return the table `name` of schema public as the asking transaction sees it, if it is there and no partition."""
    found = look(_DESCRIBE, [f"public.{name}"])
    if not found:
        return None
    oid, identity, columns, key, strategy, leaves, followed = found[0]
    constraint, names = key or ("", [])
    columns = tuple(Column(*column) for column in columns)
    return Table(oid, name, columns, tuple(names), constraint, strategy, tuple(leaves), followed, identity)


def _value(column: Column, i: str, salt: int) -> str:
    number = f"({i} * 7 + {salt})"
    letters = f"large({number})"
    kind = column.kind.partition("(")[0]
    if kind in ("text", "character varying"):
        return letters if column.large else f"'v' || {number}"
    return {
        "integer": f"{number} % 1000",
        "bigint": f"{number} * 3000000001",
        "numeric": f"round({number} * 1.37, 2)",
        "boolean": f"{number} % 2 = 0",
        "timestamp with time zone": f"timestamptz '2024-01-01 00:00Z' + {number} * interval '1 hour 1 microsecond'",
        "jsonb": f"jsonb_build_object('n', {number}, 'pad', {letters})",
        "bytea": f"convert_to({letters}, 'UTF8')",
    }[kind]


# DML


def insert(table: Table, first: int, count: int, salt: int) -> list[str]:
    """Insert `count` rows from `first` on; what has their keys already stays."""
    if table.strategy and not table.leaves:
        return []
    names = ", ".join(column.name for column in table.columns)
    values = ", ".join(_fill(table, column, salt) for column in table.columns)
    rows = f"generate_series({first}::bigint, {first + count - 1}) i"
    return [f"INSERT INTO {table.name} ({names}) SELECT {values} FROM {rows} ON CONFLICT DO NOTHING"]


def _fill(table: Table, column: Column, salt: int) -> str:
    bound = _bounds(table, table.leaves[salt % len(table.leaves)])[0] if table.leaves else 0
    fixed = {
        "id": "i",
        "p": str(bound),
        "part": f"'part' || {salt % 2}",
        "long": "repeat('k', 2400) || i",
        "alt": "i + 1000",
        "parent": f"(SELECT max(o.id) FROM {_PARENT} o WHERE o.id <= i)",
    }
    return fixed.get(column.name) or column.value("i", salt)


_PARENT = "t0"


def _where(first: int, count: int) -> str:
    return f"WHERE id BETWEEN {first} AND {first + count - 1}"


def delete(table: Table, first: int, count: int, _salt: int = 0) -> list[str]:
    """Delete rows by their id."""
    return [f"DELETE FROM {table.name} {_where(first, count)}"] if table.followed else []


def _update_values(table: Table, first: int, count: int, salt: int) -> list[str]:
    """All columns but the first of them: where it is large, it stays and is not sent."""
    sets = ", ".join(f"{c.name} = {c.value('id', salt)}" for c in table.loose[1:] or table.loose)
    return [f"UPDATE {table.name} SET {sets} {_where(first, count)}"] if sets else []


def _update_large(table: Table, first: int, count: int, salt: int) -> list[str]:
    column = next((c for c in table.loose if c.large), table.pick(salt))
    return (
        [f"UPDATE {table.name} SET {column.name} = {column.value('id', salt)} {_where(first, count)}"] if column else []
    )


def _update_nothing(table: Table, first: int, count: int, _salt: int) -> list[str]:
    return [f"UPDATE {table.name} SET id = id {_where(first, count)}"]


def _update_key(table: Table, first: int, count: int, salt: int) -> list[str]:
    name = "alt" if table.identity == "i" and salt % 2 else "id"
    return [f"UPDATE {table.name} SET {name} = {name} + {10 + salt} {_where(first, count)}"]


def _swap_keys(table: Table, first: int, _count: int, _salt: int) -> list[str]:
    update = f"UPDATE {table.name} SET id ="
    steps = ((-1, first), (first, first + 1), (first + 1, -1))
    return [f"{update} {new} WHERE id = {old}" for new, old in steps]


def _move_rows(table: Table, first: int, count: int, salt: int) -> list[str]:
    """To another partition, or to another half of a composite key."""
    if table.leaves:
        (bound, _) = _bounds(table, table.leaves[salt % len(table.leaves)])
        return [f"UPDATE {table.name} SET p = {bound} {_where(first, count)}"]
    if any(column.name == "part" for column in table.columns):
        return [f"UPDATE {table.name} SET part = 'part' || {salt} {_where(first, count)}"]
    return _update_key(table, first, count, salt)


UPDATES: Mapping[str, Callable[[Table, int, int, int], list[str]]] = {
    "values": _update_values,
    "large": _update_large,
    "nothing": _update_nothing,
    "key": _update_key,
    "swap": _swap_keys,
    "move": _move_rows,
}
"""What an update may do; each may be made of a table that is `followed`."""


def truncate(tables: Sequence[Table], *, cascade: bool) -> list[str]:
    """Truncate one table or several by one statement."""
    return [f"TRUNCATE {', '.join(table.name for table in tables)}{' CASCADE' if cascade else ''}"] if tables else []


# Tables and partitions


def create(name: str, shape: str, kinds: Sequence[str]) -> list[str]:
    """Create a table of a certain shape."""
    loose = [f"c{index} {kind.removesuffix(_LARGE)}" for index, kind in enumerate(kinds)]
    large = [f"c{index}" for index, kind in enumerate(kinds) if kind.endswith(_LARGE)]
    columns, options, after = {
        "key": (["id int PRIMARY KEY"], "", []),
        "composite": (["part text", "id int", "PRIMARY KEY (id, part)"], "", []),
        "full": (["id int"], "", [f"ALTER TABLE {name} REPLICA IDENTITY FULL"]),
        "full key": (["id int PRIMARY KEY"], "", [f"ALTER TABLE {name} REPLICA IDENTITY FULL"]),
        "none": (["id int"], "", []),
        "index": (
            ["id int PRIMARY KEY", "alt int NOT NULL"],
            "",
            [
                f"CREATE UNIQUE INDEX {name}_alt ON {name} (alt)",
                f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_alt",
            ],
        ),
        "child": (
            ["id int PRIMARY KEY", f"parent int REFERENCES {_PARENT} ON DELETE CASCADE ON UPDATE CASCADE"],
            "",
            [],
        ),
        "long key": (["long text PRIMARY KEY", "id int NOT NULL"], "", []),
        "list": (["id int", "p int", "PRIMARY KEY (id, p)"], " PARTITION BY LIST (p)", []),
        "range": (["id int", "p int", "PRIMARY KEY (id, p)"], " PARTITION BY RANGE (p)", []),
    }[shape]
    kind = {"list": "l", "range": "r"}.get(shape, "")
    leaves = [f"{name}_p{index}" for index in range(2 if kind else 0)]
    large += ["long"] * (shape == "long key")
    return [
        f"CREATE TABLE {name} ({', '.join(columns[:2] + loose + columns[2:])}){options}",
        *(f"ALTER TABLE {name} ALTER {column} SET STORAGE EXTERNAL" for column in large),
        *after,
        *(f"CREATE TABLE {leaf} PARTITION OF {name} {_for_values(kind, leaf)}" for leaf in leaves),
    ]


def _bounds(table: Table, leaf: str) -> tuple[int, str]:
    """Return a value of `p` that the leaf has, and its bounds."""
    number = int(leaf.rpartition("_p")[2])
    return (number * 10, _for_values(table.strategy, leaf))


def _for_values(strategy: str, leaf: str) -> str:
    low = int(leaf.rpartition("_p")[2]) * 10
    return f"FOR VALUES IN ({low})" if strategy == "l" else f"FOR VALUES FROM ({low}) TO ({low + 10})"


def partition(table: Table, how: str, number: int) -> list[str]:
    """Change the partitions of `table`: new, attach (a filled one), attach empty, detach, drop, truncate leaf."""
    leaf = f"{table.name}_p{number}"
    identity = [f"ALTER TABLE {leaf} REPLICA IDENTITY FULL"] if table.identity == "f" else []
    there = leaf in table.leaves
    if not table.strategy or there == (how in ("new", "attach", "attach empty")):
        return []
    values = _for_values(table.strategy, leaf)
    if how == "new":
        return [f"CREATE TABLE {leaf} PARTITION OF {table.name} {values}", *identity]
    if how in ("attach", "attach empty"):
        # Its columns stand in another order than the root's.
        columns = reversed(table.columns)
        likes = ", ".join(f"{c.name} {c.kind}{' NOT NULL' if c.required else ''}" for c in columns)
        only = dataclasses.replace(table, leaves=(leaf,))
        rows = [row.replace(table.name, leaf, 1) for row in insert(only, 50, 3, 1)] if how == "attach" else []
        fresh = [f"DROP TABLE IF EXISTS {leaf}", f"CREATE TABLE {leaf} ({likes})", *rows]
        return [*fresh, f"ALTER TABLE {table.name} ATTACH PARTITION {leaf} {values}", *identity]
    return {
        "detach": [f"ALTER TABLE {table.name} DETACH PARTITION {leaf}"],
        "drop": [f"DROP TABLE {leaf}"],
        "truncate leaf": [f"TRUNCATE {leaf}"],
    }[how]


# DDL


def _alter(*changes: str) -> Callable[[Table, int], list[str]]:
    """Return an alteration by clauses in which {c} is one of the loose columns, and {new} a name that is free."""

    def alteration(table: Table, number: int) -> list[str]:
        column = table.pick(number)
        if column is None and any("{c}" in change for change in changes):
            return []
        name = column.name if column else ""
        return [f"ALTER TABLE {table.name} {each.format(c=name, new=_free(table, number))}" for each in changes]

    return alteration


def _free(table: Table, number: int) -> str:
    names = {column.name for column in table.columns}
    return next(name for index in range(100) if (name := f"c{(number + index) % 100}") not in names)


def _widen(table: Table, number: int) -> list[str]:
    """Another type in which every value looks the same."""
    column = table.pick(number)
    wider = {"integer": "bigint", "numeric(10,2)": "numeric(12,2)", "text": "varchar(20000)", "numeric(12,2)": "text"}
    if column is None or column.kind not in wider:
        return [f"ALTER TABLE {table.name} ALTER id TYPE bigint"]
    return [f"ALTER TABLE {table.name} ALTER {column.name} TYPE {wider[column.kind]}"]


def _to_text(table: Table, number: int) -> list[str]:
    column = table.pick(number)
    return [f"ALTER TABLE {table.name} ALTER {column.name} TYPE text"] if column else []


def _using(table: Table, number: int) -> list[str]:
    """Other values of the same type: nothing of it is in the stream."""
    column = next((c for c in table.loose[number % 3 :] if c.kind in ("integer", "bigint", "numeric(10,2)")), None)
    if column is None:
        return []
    return [f"ALTER TABLE {table.name} ALTER {column.name} TYPE {column.kind} USING {column.name} * 2"]


def _add_again(table: Table, _number: int) -> list[str]:
    """Drop the last column and add one of the same name and type."""
    if not table.loose or table.columns[-1] not in table.loose:
        return []
    last = table.columns[-1]
    alter = f"ALTER TABLE {table.name}"
    return [f"{alter} DROP COLUMN {last.name}", f"{alter} ADD COLUMN {last.name} {last.kind}"]


def _primary_key(table: Table, _number: int) -> list[str]:
    if table.constraint:
        return [f"ALTER TABLE {table.name} DROP CONSTRAINT {table.constraint} CASCADE"]
    key = "id, p" if table.strategy else "id"
    return [f"ALTER TABLE {table.name} ADD PRIMARY KEY ({key})"]


def _identity(table: Table, number: int) -> list[str]:
    word = ("FULL", "DEFAULT", "NOTHING")[number % 3]
    if any(column.name == "alt" for column in table.columns) and number % 4 == 3:
        word = f"USING INDEX {table.name}_alt"
    return [f"ALTER TABLE {name} REPLICA IDENTITY {word}" for name in (table.name, *table.leaves)]


def _required(table: Table, number: int) -> list[str]:
    column = table.pick(number)
    if column is None:
        return []
    if column.required:
        return [f"ALTER TABLE {table.name} ALTER {column.name} DROP NOT NULL"]
    fill = f"UPDATE {table.name} SET {column.name} = {_value(column, 'id', number)} WHERE {column.name} IS NULL"
    alter = f"ALTER TABLE {table.name} ALTER {column.name} SET NOT NULL"
    return [fill, alter] if table.followed else [alter]


def _vacuum(table: Table, _number: int) -> list[str]:
    return [f"VACUUM FULL {table.name}"]


ALTERATIONS: Mapping[str, Callable[[Table, int], list[str]]] = {
    "add column": _alter("ADD COLUMN {new} text"),
    "add column with a default": _alter("ADD COLUMN {new} int DEFAULT 7"),
    "add required column": _alter("ADD COLUMN {new} numeric(10,2) NOT NULL DEFAULT 1.5"),
    "add column with a volatile default": _alter("ADD COLUMN {new} text DEFAULT md5(random()::text)"),
    "drop column": _alter("DROP COLUMN {c}"),
    "rename column": _alter("RENAME {c} TO {new}"),
    "drop and add another type": _alter("DROP COLUMN {c}", "ADD COLUMN {c} boolean DEFAULT true"),
    "widen": _widen,
    "to text": _to_text,
    "using": _using,
    "drop and add again": _add_again,
    "primary key": _primary_key,
    "replica identity": _identity,
    "not null": _required,
    "vacuum full": _vacuum,
}
"""DDL of one table, by the name under which it can be switched off."""
