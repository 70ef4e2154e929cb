"""Arrays as lists, against a printer that quotes what array_out quotes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput.types import arrays, column_type, scalars
from cdc.pgoutput.types.arrays import ListType
from cdc.pgoutput.types.column import ColumnType
from cdc.pgoutput.types.scalars import VARCHAR
from cdc.pgoutput.types.temporal import INTERVAL, TIMESTAMP

TEXT, INTEGER, DECIMAL = VARCHAR, scalars.INTEGER, column_type(1700, (5 << 16 | 2) + 4)
UNFIT = object()


def parsed(element: ColumnType, texts: list[str | None], delimiter: str = ",") -> list[Any]:
    """Return the lists, or UNFIT where a text is marked as a misfit; in a slice of a column all the same."""
    whole = pa.array(["{1}", None, '{"', *texts, "}", "{x}"], pa.string())
    outcomes = []
    for text in (pa.array(texts, pa.string()), whole[3:-2]):
        array, misfits = ListType(element, delimiter).parse(text)
        array.validate(full=True)
        assert array.type == pa.list_(element.arrow)
        assert len(array) == len(texts)
        assert misfits is None or misfits.any()
        marked = [False] * len(texts) if misfits is None else misfits.tolist()
        assert all(value is None for value, unfit in zip(array.to_pylist(), marked, strict=True) if unfit)
        assert sum(array.value_lengths().drop_null().to_pylist()) == len(array.values)  # none is left of a misfit
        outcomes.append([UNFIT if unfit else v for v, unfit in zip(array.to_pylist(), marked, strict=True)])
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


TEXTS: list[tuple[str | None, Any]] = [
    (None, None),
    ("{}", []),
    ("{a}", ["a"]),
    ("{1,2,3}", ["1", "2", "3"]),
    ('{1,NULL,"NULL"}', ["1", None, "NULL"]),
    ("{NULL}", [None]),
    ("{NULL,NULL}", [None, None]),
    ("{NULLS,ANULL,NUL,nULL,NULl}", ["NULLS", "ANULL", "NUL", "nULL", "NULl"]),
    ('{""}', [""]),
    ('{"",""}', ["", ""]),
    (r'{"a\"b","c\\d","","{x}"," "}', ['a"b', r"c\d", "", "{x}", " "]),
    (r'{"\\","\\\\","\\\"","\"","\"\""}', ["\\", r"\\", r"\"", '"', '""']),
    (r'{"\\",a,"\\,\"}",b}', ["\\", "a", r'\,"}', "b"]),
    ('{"{1,2}","[0:1]={1}","},{"}', ["{1,2}", "[0:1]={1}", "},{"]),
    ('{"a,b",c}', ["a,b", "c"]),
    ('{é,"😀, ü",\u2028,"\u00a0","\n\t"}', ["é", "😀, ü", "\u2028", "\u00a0", "\n\t"]),
    ("{a;b}", ["a;b"]),
    ("{{1,2},{3,4}}", UNFIT),
    ("{{}}", UNFIT),
    ('{{"a"}}', UNFIT),
    ("[0:1]={1,2}", UNFIT),
    ("[1:1][2:3]={{1,2}}", UNFIT),
    # nothing that Postgres prints
    ("", UNFIT),
    ("{", UNFIT),
    ("}", UNFIT),
    ("1 2 3", UNFIT),
    ('{"}', UNFIT),
    ('{"\\"}', UNFIT),
    ("{}\n", UNFIT),
]


@pytest.mark.parametrize(("text", "value"), TEXTS)
def test_an_array(text: str | None, value: Any) -> None:
    """Alone, and between others."""
    assert parsed(TEXT, [text]) == [value]
    assert parsed(TEXT, ["{x}", text, text, '{"y"}']) == [["x"], value, value, ["y"]]


def test_all_in_one_column() -> None:
    """What is wrong with one array does not reach its neighbours."""
    for texts in (TEXTS, TEXTS[::-1]):
        assert parsed(TEXT, [text for text, _ in texts]) == [value for _, value in texts]


@pytest.mark.parametrize("fill", ["{1,2}", '{"a b",NULL}', "{}", None])
@pytest.mark.parametrize("block_bytes", [100, 1 << 22])
def test_among_thousands(fill: str | None, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind in the middle of others, in blocks of any size: even less than one array."""
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", block_bytes)
    values: dict[str | None, Any] = dict(TEXTS) | {"{1,2}": ["1", "2"], '{"a b",NULL}': ["a b", None]}
    texts = [fill] * 4_000
    for index, (text, _) in enumerate(TEXTS):
        texts[50 + 97 * index] = text
    texts[777] = "{" + "b" * 1_000 + "}"
    values[texts[777]] = ["b" * 1_000]
    assert parsed(TEXT, texts) == [values[text] for text in texts]


@pytest.mark.parametrize("texts", [[], [None], [None] * 3, ["{}"], ["{}", None], ["{}"] * 3])
def test_no_elements(texts: list[str | None]) -> None:
    expected: list[Any] = [None if text is None else [] for text in texts]
    for element in (TEXT, INTEGER, INTERVAL, ListType(TEXT)):
        assert parsed(element, texts) == expected
        array, misfits = ListType(element).parse(pa.nulls(len(texts), pa.string()))
        assert (array.to_pylist(), misfits) == ([None] * len(texts), None)


def test_an_element_that_does_not_fit() -> None:
    """It takes its array along, and no other one."""
    texts: list[str | None] = ["{1.00,NaN}", None, "{NULL,2.5}", "{NaN}", "{}", "{1000}", "{-0.01}", "{{1}}"]
    values = [[f"{v:f}" if v is not None else None for v in row] if isinstance(row, list) else row
              for row in parsed(DECIMAL, texts)]  # fmt: skip
    assert values == [UNFIT, None, [None, "2.50"], UNFIT, [], UNFIT, ["-0.01"], UNFIT]
    assert parsed(INTERVAL, ['{"1 day",00:00:01}', "{infinity}", '{NULL,"1 day"}']) == [
        [{"months": 0, "days": 1, "microseconds": 0}, {"months": 0, "days": 0, "microseconds": 1_000_000}],
        UNFIT,
        [None, {"months": 0, "days": 1, "microseconds": 0}],
    ]


def test_what_is_behind_a_null() -> None:
    """Arrow lets bytes stand behind a NULL; they are no elements."""
    text = pa.array(['{"1', "{2}", "{3}"])
    hidden = pa.StringArray.from_buffers(3, *text.buffers()[1:], pa.py_buffer(b"\x06"))
    array, misfits = ListType(INTEGER).parse(hidden)
    assert (array.to_pylist(), misfits) == ([None, [2], [3]], None)
    assert array.values.to_pylist() == [2, 3]


def test_boxes() -> None:
    """The one type whose elements have a semicolon between them, so that commas need no quotes."""
    texts: list[str | None] = ["{(1,1),(0,0);(2,2),(1,1)}", "{}", "{NULL;(2,2),(1,1)}", '{"a;b";c}']
    assert parsed(TEXT, texts, ";") == [["(1,1),(0,0)", "(2,2),(1,1)"], [], [None, "(2,2),(1,1)"], ["a;b", "c"]]


def test_an_array_of_a_domain_over_arrays() -> None:
    assert parsed(ListType(INTEGER), ['{"{1,2}",NULL,"{}"}', '{"{{1}}"}', "{}"]) == [[[1, 2], None, []], UNFIT, []]


# Beside anything at all: what makes trouble, in any order.
ELEMENT = st.text(max_size=8) | st.text('"\\,;{} N\té😀', max_size=6) | st.sampled_from(["NULL", "null", "Null", "{}"])
LIST = st.none() | st.lists(st.none() | ELEMENT, max_size=5)


def printed(values: list[str | None], delimiter: str) -> str:
    """Print as array_out does."""
    words = []
    for value in values:
        special = value is not None and any(c in '"\\{}' + delimiter + " \t\n\r\v\f" for c in value)
        if value is None:
            words.append("NULL")
        elif special or value == "" or value.upper() == "NULL":
            words.append('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
        else:
            words.append(value)
    return "{" + delimiter.join(words) + "}"


@given(st.lists(LIST, max_size=12), st.sampled_from(",;"))
def test_any_text(values: list[list[str | None] | None], delimiter: str) -> None:
    texts = [None if value is None else printed(value, delimiter) for value in values]
    assert parsed(TEXT, texts, delimiter) == values


@given(st.lists(LIST | st.sampled_from(["{{1},{2}}", "[0:0]={a}", '{"', '{"}']), max_size=12))
def test_any_text_among_misfits(values: list[list[str | None] | str | None]) -> None:
    texts = [printed(value, ",") if isinstance(value, list) else value for value in values]
    assert parsed(TEXT, texts) == [UNFIT if isinstance(value, str) else value for value in values]


@given(st.lists(st.none() | st.lists(st.none() | st.integers(-(2**31), 2**31 - 1)), max_size=12))
def test_any_integers(values: list[list[int | None] | None]) -> None:
    texts = [
        None if value is None else printed([None if v is None else str(v) for v in value], ",") for value in values
    ]
    assert parsed(INTEGER, texts) == values


@given(st.lists(st.none() | st.lists(st.none() | st.datetimes()), max_size=12))
def test_any_timestamps(values: list[list[Any] | None]) -> None:
    """Elements that are always quoted."""
    texts = [
        None if value is None else printed([None if v is None else v.isoformat(" ") for v in value], ",")
        for value in values
    ]
    assert parsed(TIMESTAMP, texts) == values


def test_types() -> None:
    kind = ListType(INTERVAL)
    assert (kind.arrow, kind.duckdb) == (pa.list_(INTERVAL.arrow), "INTERVAL[]")
    assert (ListType(kind).arrow, ListType(kind).duckdb) == (pa.list_(kind.arrow), "INTERVAL[][]")


def test_sql_only_where_it_is_needed() -> None:
    for element in (TEXT, INTEGER, ListType(INTEGER)):
        kind = ListType(element)
        assert [kind.load("a"), kind.unload("a"), kind.exact("a")] == ["a", "a", "a"]
    assert ListType(INTERVAL).exact("a") == "CAST(a AS VARCHAR)"
    assert ListType(ListType(INTERVAL)).exact("a") == "CAST(a AS VARCHAR)"


def _through_duckdb(element: ColumnType, texts: list[str | None], look: Callable[[str], str]) -> list[Any]:
    """Parse, load into a table, and return what is looked at and what comes out of it."""
    kind = ListType(element)
    array, misfits = kind.parse(pa.array(texts, pa.string()))
    assert misfits is None
    source = pa.table({"x": array, "months": [0] * len(texts)})
    with duckdb.connect() as connection:
        connection.register("x", source)  # table and column are named like the parameter
        connection.execute(f"CREATE TABLE target (x {kind.duckdb})")
        connection.execute(f"INSERT INTO target SELECT {kind.load('x.x')} FROM x")
        looked = connection.sql(f"SELECT {look('x')} FROM target").fetchall()
        back = connection.sql(f"SELECT {kind.unload('x')} AS x FROM target").to_arrow_table().column("x")
    assert back.cast(array.type).to_pylist() == array.to_pylist()
    return [value for (value,) in looked]


def test_load_and_unload() -> None:
    """NULL lists, empty ones and NULL elements come through DuckDB as they are."""
    texts = [None, "{}", "{NULL}", '{"1 mon -2 days +00:00:03",NULL,"1 day"}', "{24:00:00}"]
    assert _through_duckdb(INTERVAL, texts, ListType(INTERVAL).exact) == [
        None, "[]", "[NULL]", "['1 month -2 days 00:00:03', NULL, 1 day]", "['24:00:00']",
    ]  # fmt: skip
    nested = [None, "{}", "{NULL}", '{"{}","{NULL}","{\\"1 day\\"}"}']
    assert _through_duckdb(ListType(INTERVAL), nested, lambda v: f"{v}::VARCHAR") == [
        None, "[]", "[NULL]", "[[], [NULL], [1 day]]",
    ]  # fmt: skip
    assert _through_duckdb(TEXT, [None, "{}", "{NULL}", '{a,NULL,"NULL"}'], lambda v: v) == [
        None, [], [None], ["a", None, "NULL"],
    ]  # fmt: skip


def test_what_prints_alike_is_equal() -> None:
    """DuckDB thinks that a day is 24 hours, in lists as well; `exact` does not."""
    different = [
        "{NULL}",
        '{"1 day"}',
        "{24:00:00}",
        "{}",
        '{"1 day",NULL}',
        '{"1 day","1 day"}',
        '{"30 days"}',
        '{"1 mon"}',
    ]
    found = _through_duckdb(INTERVAL, list(different), ListType(INTERVAL).exact)
    assert all(a != b for a, b in itertools.combinations(found, 2))
