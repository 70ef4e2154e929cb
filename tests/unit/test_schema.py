"""What brings a table to a changed Relation: the ALTERs, when only a new copy will do, and what cannot be had."""

from __future__ import annotations

import dataclasses
import decimal
from collections.abc import Mapping
from types import MappingProxyType

import duckdb
import pyarrow as pa
import pytest

from cdc.errors import TableError
from cdc.pgoutput.messages import Column, Relation
from cdc.sink import schema
from cdc.sink.columns import LiveTable, identify, same
from cdc.sink.holding import Holding
from cdc.sink.schema import Plan
from cdc.sink.stored import StoredColumn, Table

INT, BIGINT, TEXT, NUMERIC, DATE = 23, 20, 25, 1700, 1082
TEN_TWO = (10 << 16 | 2) + 4
NODE = "16384:16384:0"
ID = StoredColumn("id", INT, -1, 1, is_key=True)
V = StoredColumn("v", TEXT, -1, 2, is_key=False)
TARGET = '"w"."public"."t"'
HOLDING = Holding({}, {}, lambda _oid: None, logged=True, limit=10)


def relation(*columns: StoredColumn) -> Relation:
    return Relation(1, "public", "t", "d", tuple(Column(c.name, c.type_oid, c.typmod, c.attnum == 1) for c in columns))


def live(
    *columns: StoredColumn, node: str = NODE, natts: int = 0, defaults: Mapping[str, str] = MappingProxyType({})
) -> LiveTable:
    by_attnum = {c.attnum: defaults[c.name] for c in columns if c.name in defaults}
    return LiveTable(node, columns, max(natts, *(c.attnum for c in columns)), defaults=by_attnum)


def plan(
    before: tuple[StoredColumn, ...], now: LiveTable | None, *after: StoredColumn, node: str = NODE
) -> Plan | None:
    highest = max(column.attnum for column in before)
    table = Table(1, "public", "t", "streaming", storage=node, columns=before, natts=highest)
    return schema.plan(TARGET, table, relation(*after), now, HOLDING)


def texts(found: Plan) -> list[str]:
    return [change.text for change in found.changes]


def run(statements: tuple[tuple[str, pa.Array | None], ...]) -> list[tuple[object, ...]]:
    """Run a plan in DuckDB, on a table with columns id, v and one row; return its rows."""
    connection = duckdb.connect()
    connection.execute(
        "ATTACH ':memory:' AS w; CREATE SCHEMA w.public; CREATE TABLE w.public.t (id INTEGER, v VARCHAR)"
    )
    connection.execute("INSERT INTO w.public.t VALUES (1, 'a')")
    for statement, value in statements:
        connection.register("_value", pa.table({"value": [] if value is None else value}))
        connection.execute(statement)
    return connection.execute("FROM w.public.t").fetchall()


def test_same() -> None:
    assert same((ID, V), relation(ID, V))
    for other in (
        (ID,),
        (V, ID),
        (ID, dataclasses.replace(V, name="w")),
        (ID, dataclasses.replace(V, type_oid=INT)),
        (ID, dataclasses.replace(V, typmod=8)),
        (ID, V, StoredColumn("w", TEXT, -1, 3)),
    ):
        assert not same((ID, V), relation(*other))


def test_added_and_dropped() -> None:
    """H1: ALTERs, with the default that the rows from before have, exactly as Postgres stores it."""
    described = ("n", NUMERIC, TEN_TWO, 3), ('we"ird', TEXT, -1, 4), ("d", DATE, -1, 5)
    added = tuple(StoredColumn(*each, is_key=False) for each in described)
    now = live(ID, *added, defaults={"n": "1.50", 'we"ird': "it's"})
    found = plan((ID, V), now, ID, *added)
    assert found is not None
    assert found.columns == (ID, *added)
    assert texts(found) == ["column v dropped", "column n added", 'column we"ird added', "column d added"]
    assert run(found.statements) == [(1, decimal.Decimal("1.50"), "it's", None)]


def test_masks_that_change_hands() -> None:
    """B1: what a mask names is another column now: neither has what the other one had."""
    masked = dataclasses.replace(V, name="w", attnum=3, mask="hash")
    swapped = dataclasses.replace(V, name="w", mask="hash"), dataclasses.replace(masked, name="v", mask="")
    assert plan((ID, V, masked), live(ID, *swapped), ID, *swapped) is None
    assert plan((ID, V, masked), live(ID, V, masked), ID, V, masked) is not None


def test_a_name_used_again() -> None:
    """H6: what has another attnum is another column, though it has the name and even the type."""
    again = dataclasses.replace(V, attnum=3, type_oid=INT)
    found = plan((ID, V), live(ID, again, defaults={"v": "7"}), ID, again)
    assert found is not None
    assert run(found.statements) == [(1, 7)]
    assert texts(found) == ["column v dropped", "column v added"]


def test_renamed() -> None:
    """H1, H7: one column goes on under another name; two that swap theirs; one that takes the name of one dropped."""
    w = dataclasses.replace(V, name="w")
    found = plan((ID, V), live(ID, w), ID, w)
    assert found is not None
    assert [(c.old_name, c.new_name) for c in found.changes] == [("v", "w")]
    assert found.changes[0].default is None
    assert run(found.statements) == [(1, "a")]
    swapped = dataclasses.replace(ID, name="v"), dataclasses.replace(V, name="id")
    found = plan((ID, V), live(*swapped), *swapped)
    assert found is not None
    assert found.columns == swapped
    (row,) = run(found.statements)
    assert row == (1, "a")
    heir = dataclasses.replace(V, name="id")
    found = plan((ID, V), live(heir), heir)
    assert found is not None
    assert run(found.statements) == [("a",)]
    upper = dataclasses.replace(V, name="V")
    found = plan((ID, V), live(ID, upper), ID, upper)
    assert found is not None
    assert run(found.statements) == [(1, "a")]


def test_widened() -> None:
    """H5: in place where no value changes; with new storage a copy makes sure that USING made no others of them."""
    big = dataclasses.replace(ID, type_oid=BIGINT)
    found = plan((ID, V), live(big, V, node="16384:9:0"), big, V)
    assert found is not None
    assert found.rewritten
    assert texts(found) == ["column id is BIGINT now"]
    assert run(found.statements) == [(1, "a")]
    price = StoredColumn("n", NUMERIC, TEN_TWO, 3)
    for other, rewritten, statements in (
        (dataclasses.replace(price, typmod=(12 << 16 | 2) + 4), False, 1),
        (dataclasses.replace(price, typmod=-1), False, 1),
        (dataclasses.replace(price, typmod=(12 << 16 | 3) + 4), False, None),
        (dataclasses.replace(price, typmod=(8 << 16 | 2) + 4), False, None),
        (dataclasses.replace(price, typmod=(12 << 16 | 2) + 4), True, None),
        (dataclasses.replace(price, type_oid=TEXT, typmod=-1), True, None),
    ):
        node = "16384:9:0" if rewritten else NODE
        found = plan((ID, V, price), live(ID, V, other, node=node), ID, V, other)
        assert (None if found is None else len(found.statements)) == statements, other
    longer = dataclasses.replace(V, typmod=8)
    found = plan((ID, V), live(ID, longer), ID, longer)
    assert found is not None
    assert found.statements == ()


A, B, C, D = (StoredColumn(name, INT, -1, n) for n, name in enumerate("abcd", start=1))


@pytest.mark.parametrize(
    ("then", "now", "natts", "attnums"),
    [
        ((A, B, C), (A, B, C, D), 4, (1, 2, 3)),  # the stream has the first of two versions
        ((A, B, C), (A, B), 3, (1, 2, 3)),  # added, and dropped since
        ((A, B, C), (A, C), 3, (1, 2, 3)),  # added; an older one dropped since
        ((B,), (B, C), 3, (2,)),
        ((A, dataclasses.replace(B, name="x")), (A, dataclasses.replace(B, name="y")), 2, (1, 2)),
        ((A, dataclasses.replace(B, attnum=3, type_oid=TEXT)), (A, dataclasses.replace(B, attnum=3), D), 4, (1, 3)),
        ((A, B, C), (A, B, dataclasses.replace(C, name="x"), D), 4, (1, 2, 3)),
        # not certain
        ((A, dataclasses.replace(B, name="x")), (A, C), 3, None),
        ((A, B, dataclasses.replace(D, name="x")), (A, B, dataclasses.replace(D, name="x")), 4, None),
        ((A, dataclasses.replace(B, name="x"), C), (A, dataclasses.replace(B, name="y"), D), 4, None),
    ],
)
def test_versions_behind(
    then: tuple[StoredColumn, ...], now: tuple[StoredColumn, ...], natts: int, attnums: tuple[int, ...] | None
) -> None:
    """H2, H9: the stream has a version that the catalog has left behind."""
    assert identify((A, B), 2, relation(*then), live(*now, natts=natts)) == attnums


@pytest.mark.parametrize(
    ("reason", "now", "after", "node"),
    [
        ("the table is gone", None, (ID,), NODE),
        ("a column that went is there again", live(ID, V), (ID,), NODE),
        (
            "a volatile default",
            live(ID, V, StoredColumn("n", INT, -1, 3), node="16384:999:0"),
            (ID, V, StoredColumn("n", INT, -1, 3)),
            NODE,
        ),
        (
            "storage unknown",
            live(dataclasses.replace(ID, typmod=5), V),
            (dataclasses.replace(ID, typmod=5), V),
            "",
        ),
        (
            "another type",
            live(dataclasses.replace(ID, type_oid=TEXT), V),
            (dataclasses.replace(ID, type_oid=TEXT), V),
            NODE,
        ),
        (
            "one that is dropped and added again looks the same",
            live(ID, dataclasses.replace(V, attnum=3), StoredColumn("n", INT, -1, 4)),
            (ID, dataclasses.replace(V, attnum=3), StoredColumn("n", INT, -1, 4)),
            NODE,
        ),
        (
            "a default that does not fit",
            live(ID, V, StoredColumn("n", NUMERIC, TEN_TWO, 3), defaults={"n": "NaN"}),
            (ID, V, StoredColumn("n", NUMERIC, TEN_TWO, 3)),
            NODE,
        ),
    ],
)
def test_only_a_new_copy(reason: str, now: LiveTable | None, after: tuple[StoredColumn, ...], node: str) -> None:
    """H4, H5, trap 7: where the stream and the catalog together do not tell what the rows hold now."""
    assert plan((ID, V), now, *after, node=node) is None, reason


def test_no_columns() -> None:
    """B4."""
    table = Table(7, "public", "t", "copying")
    schema.refuse(table, [ID])
    with pytest.raises(TableError, match=r"^table public\.t has no columns, which DuckDB cannot store$") as caught:
        schema.refuse(table, [])
    assert caught.value.oid == 7
    assert caught.value.hint


def test_added_with_a_default_of_any_type() -> None:
    """H1: what is no Python value, too."""
    defaults = {"d": "-infinity", "i": "1 mon -3 days", "l": "{1,NULL}", "j": '{"a": 1}'}
    added = [
        StoredColumn(name, oid, -1, n)
        for n, (name, oid) in enumerate(zip("dilj", (DATE, 1186, 1007, 3802), strict=True), 3)
    ]
    found = plan((ID, V), live(ID, V, *added, defaults=defaults), ID, V, *added)
    assert found is not None
    as_text = (f"ALTER TABLE {TARGET} ALTER {name} TYPE VARCHAR" for name in "dilj")
    statements = (*found.statements, *((statement, None) for statement in as_text))
    assert run(statements) == [(1, "a", "-infinity", "1 month -3 days", "[1, NULL]", '{"a": 1}')]


def test_names_that_are_one_to_duckdb() -> None:
    """B2, H11: a column whose name differs in nothing but case gets its attnum behind it, and its own name back."""
    upper = StoredColumn("V", TEXT, -1, 3, alias="V_3", is_key=False)
    found = plan((ID, V), live(ID, V, upper), ID, V, upper)
    assert found is not None
    assert found.columns == (ID, V, upper)
    assert texts(found) == ["column V_3 added, which is V in Postgres"]
    assert run(found.statements) == [(1, "a", None)]
    alone = dataclasses.replace(upper, alias="")
    left = plan((ID, V, upper), live(ID, alone), ID, alone)
    assert left is not None
    assert left.columns == (ID, alone)
    assert [(c.old_name, c.new_name) for c in left.changes] == [("v", None), ("V_3", "V")]
    assert run(found.statements + left.statements) == [(1, None)]


def test_create_table() -> None:
    """The types are those of the one table of types; a quoted name stays one."""
    connection = duckdb.connect()
    columns = [ID, StoredColumn('q"uoted', NUMERIC, TEN_TWO, 2)]
    connection.execute(schema.create_table('"t x"', columns, soft=True))
    query = "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = 't x' ORDER BY column_index"
    found = connection.execute(query).fetchall()
    assert found == [("id", "INTEGER"), ('q"uoted', "DECIMAL(10,2)"), ("_deleted_at", "TIMESTAMP WITH TIME ZONE")]
    connection.execute(schema.create_table('"t x"', [ID], soft=False))
    assert connection.execute(query).fetchall() == [("id", "INTEGER")]
