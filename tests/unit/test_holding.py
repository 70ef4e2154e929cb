"""Under which names, and as which types, columns are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import duckdb
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput.messages import Column, Relation
from cdc.pgoutput.types import Basis, Declared
from cdc.sink.holding import DELETED_AT, Holding, aliases, held, table_alias
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import folded

TABLE = Table(7, "public", "t", "streaming")
NAMES = ("public.t",)
NUMERIC, TEXT, UUID = 1700, 25, 2950
TEN_TWO = (10 << 16 | 2) + 4
# 16400: a domain over int4; 16401: its array; 16402: an enum
DECLARED = {
    16400: Declared(Basis(23, -1), 0, ","),
    16401: Declared(None, 16400, ","),
    16402: Declared(None, 0, ","),
}
HOLDING = Holding({}, {}, DECLARED.get, logged=True, limit=10)


def columns(*names: str, oid: int = TEXT, typmod: int = -1, key: Collection[int] = (1,)) -> list[StoredColumn]:
    return [StoredColumn(name, oid, typmod, n, is_key=n in key) for n, name in enumerate(names, start=1)]


def here(*names: str, holding: Holding = HOLDING, soft: bool = False) -> list[str]:
    return [column.here for column in holding.columns(TABLE, NAMES, columns(*names), soft=soft)]


def test_names_that_are_one_to_duckdb() -> None:
    """B2: the first has its own, the others get their attnum behind it, whatever others are called."""
    assert here("a", "b") == ["a", "b"]
    assert here("Ab", "aB", "ab") == ["Ab", "aB_2", "ab_3"]
    assert here("a", "A", "a_2") == ["a", "A_2_", "a_2"]
    # DuckDB folds ASCII alone, so these are two names each
    pairs = [("É", "é"), ("ß", "ss"), ("Σ", "ς"), ("\u212a", "k")]
    connection = duckdb.connect()
    for number, pair in enumerate(pairs):
        assert here(*pair) == list(pair)
        connection.execute(f'CREATE TABLE t{number} ("{pair[0]}" INTEGER, "{pair[1]}" INTEGER)')


def test_names_of_ours() -> None:
    """B3: those of the change log where there is one, and that of soft deletes."""
    assert here("x", "_LSN", "_op") == ["x", "_LSN_2", "_op_3"]
    assert here("x", "_lsn", holding=dataclasses.replace(HOLDING, logged=False)) == ["x", "_lsn"]
    assert here(DELETED_AT) == [DELETED_AT]
    assert here(DELETED_AT, soft=True) == ["_deleted_at_1"]


@given(st.lists(st.text("aAbB_12", min_size=1, max_size=4), max_size=12, unique=True))
def test_every_column_has_a_name_of_its_own(names: list[str]) -> None:
    """B2: whatever they are; and the order in which they come makes no difference."""
    numbered = list(enumerate(names, start=1))
    found = aliases(numbered, ["_a"])
    every = folded(*(found.get(attnum, name) for attnum, name in numbered), "_a")
    assert len(set(every)) == len(every)
    assert aliases(reversed(numbered), ["_a"]) == found


def test_names_of_tables() -> None:
    """B2: the first that is here keeps its name, else the one of the lowest OID; others have their OID behind it."""
    first, second = Table(10, "s", "t", "pending"), Table(20, "s", "T", "pending")
    assert (table_alias([first, second], 10, "s", "t"), table_alias([first, second], 20, "s", "T")) == ("", "T_20")
    # T was here before t: it keeps its name when it is copied anew, too
    here = dataclasses.replace(second, copy_lsn=1)
    assert (table_alias([first, here], 10, "s", "t"), table_alias([first, here], 20, "s", "T")) == ("t_10", "")
    # one that is gone is in nobody's way; an alias is no other table's name
    assert table_alias([dataclasses.replace(first, state="dropped"), second], 20, "s", "T") == ""
    assert table_alias([first, second, Table(30, "s", "t_20", "pending")], 20, "s", "T") == "T_20_"
    # in the midst of two that swap their names: the other one will tell
    swapping = [dataclasses.replace(first, copy_lsn=1), Table(11, "s", "u", "streaming", copy_lsn=1)]
    assert table_alias(swapping, 11, "s", "t") == ""


def test_types() -> None:
    """A16: a domain is what it is over; A15: an enum is text; what is gone, too."""
    described = [StoredColumn("c", oid, -1, 1) for oid in (23, 16400, 16401, 16402, 99999)]
    found = HOLDING.columns(TABLE, NAMES, described, soft=False)
    assert [c.held_as for c in found] == [None, (23, -1), (1007, -1), (TEXT, -1), (TEXT, -1)]
    assert [c.kind.duckdb for c in found] == ["INTEGER", "INTEGER", "INTEGER[]", "VARCHAR", "VARCHAR"]


def test_choices() -> None:
    """CDC_TYPES: of one column, by any name of its table, and only what it can be."""
    holding = dataclasses.replace(
        HOLDING,
        choices={"public.t.a": Basis(701, -1), "old.t.b": Basis(NUMERIC, TEN_TWO), "public.t.c": Basis(TEXT, -1)},
    )

    def kinds(oid: int, *key: int) -> list[str]:
        described = columns("a", "b", "c", "d", oid=oid, key=key)
        found = holding.columns(TABLE, ("old.t", "public.t"), described, soft=False)
        return [column.kind.duckdb for column in found]

    assert kinds(NUMERIC) == ["DOUBLE", "DECIMAL(10,2)", "VARCHAR", "VARCHAR"]
    # two numerics may be one double: what identifies rows is never rounded
    assert kinds(NUMERIC, 1, 2) == ["VARCHAR", "DECIMAL(10,2)", "VARCHAR", "VARCHAR"]
    assert kinds(UUID) == ["UUID", "UUID", "VARCHAR", "UUID"]


def test_widened() -> None:
    """A column whose type could not hold what it has is text, whatever was chosen."""
    holding = dataclasses.replace(HOLDING, choices={"public.t.a": Basis(701, -1)})
    table = dataclasses.replace(TABLE, widened=(1, 3))
    found = holding.columns(table, NAMES, columns("a", "b", "c", oid=NUMERIC, typmod=TEN_TWO), soft=False)
    assert [column.kind.duckdb for column in found] == ["VARCHAR", "DECIMAL(10,2)", "VARCHAR"]


def test_held() -> None:
    """A relation as the decoder is given it has the names and types of the table, and its own key."""
    stored = HOLDING.columns(
        TABLE, NAMES, [StoredColumn("a", 16400, -1, 1), StoredColumn("A", 16402, -1, 2)], soft=False
    )
    table = dataclasses.replace(TABLE, columns=stored)
    relation = Relation(7, "s", "r", "d", (Column("a", 16400, -1, is_key=True), Column("A", 16402, -1, is_key=False)))
    assert held(table, relation) == dataclasses.replace(
        relation, columns=(Column("a", 23, -1, is_key=True), Column("A_2", TEXT, -1, is_key=False))
    )
