"""Changes as lines: their order, what is one change, and how values are shown. Those of a server are in integration."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cdc.pgoutput.decoder import Decoder
from cdc.pgoutput.messages import Column, Relation
from cdc.tail import MOST_CHARACTERS, Change, as_json, as_text, boundary, changes_of, wanted
from tests.unit import wire

T, FULL, OTHER = wire.table(1), wire.table(2, "f", name="full"), wire.table(3, name="other")
AT = 1_700_000_000_000_123
CLOCK = "22:13:20.000123"


def one_of_each() -> list[bytes]:
    """Return two transactions that touch three tables in turn."""
    return [
        wire.begin(100, xid=7, commit_ts=AT),
        *map(wire.relation, (T, FULL, OTHER)),
        wire.insert(3, "1", "a"),
        wire.update(2, "1", "b", old=("1", "a")),
        wire.insert(1, "1", "a"),
        wire.update(1, "2", wire.UNCHANGED, key=("1", None)),
        wire.delete(2, "1", "b", whole=True),
        wire.insert(2, "1", "c"),
        wire.truncate(1, 3),
        wire.commit(100, commit_ts=AT),
        wire.begin(200, xid=8, commit_ts=AT),
        wire.delete(3, "1", None),
        wire.commit(200, commit_ts=AT),
    ]


def changes(*frames: bytes, decoder: Decoder | None = None, complete: bool = True) -> list[Change]:
    return changes_of((decoder or Decoder(0)).decode(wire.batch(*frames, complete=complete)).rows)


def only(described: Relation, *cells: wire.Value) -> Change:
    """Return the change of one INSERT."""
    frames = wire.begin(1), wire.relation(described), wire.insert(described.oid, *cells), wire.commit(1)
    (change,) = changes(*frames)
    return change


def test_order_and_pairs() -> None:
    """Changes come as they happened, over all tables; an update is one, a DELETE and an INSERT are two."""
    assert [as_text(change) for change in changes(*one_of_each())] == [
        f"{CLOCK} public.other INSERT (c0=1) c1='a'",
        f"{CLOCK} public.full UPDATE c0=1 c1='a' => 'b'",
        f"{CLOCK} public.t INSERT (c0=1) c1='a'",
        f"{CLOCK} public.t UPDATE (c0=1 => 2) c1=(unchanged)",
        f"{CLOCK} public.full DELETE c0=1 c1='b'",
        f"{CLOCK} public.full INSERT c0=1 c1='c'",
        f"{CLOCK} public.t TRUNCATE",
        f"{CLOCK} public.other TRUNCATE",
        f"{CLOCK} public.other DELETE (c0=1)",
    ]


def test_json_members() -> None:
    """Every change has the same; sequence numbers are the history's."""
    objects = [json.loads(as_json(change)) for change in changes(*one_of_each())]
    assert len({tuple(each) for each in objects}) == 1
    assert [(each["lsn"], each["seq"], each["xid"]) for each in objects] == [
        *(("0/64", seq, 7) for seq in (1, 2, 4, 5, 7, 8, 9, 9)),
        ("0/C8", 1, 8),
    ]
    assert {each["commit_ts"] for each in objects} == {"2023-11-14T22:13:20.000123+00:00"}
    assert (objects[3]["new"], objects[3]["unchanged"]) == ({"c0": 2}, ["c1"])


def test_any_batches() -> None:
    """Wherever the stream is cut, the changes are the same."""
    frames = one_of_each()
    whole = changes(*frames)
    for cut in range(1, len(frames)):
        decoder = Decoder(0)
        first = changes(*frames[:cut], decoder=decoder, complete=False)
        assert first + changes(*frames[cut:], decoder=decoder) == whole


def test_boundary() -> None:
    assert boundary(changes(*one_of_each())[0]) == "-- xid 7, LSN 0/64, 2023-11-14 22:13:20.000123 UTC"


@pytest.mark.parametrize(
    ("type_oid", "typmod", "text", "shown", "plain"),
    [
        (16, -1, "t", "true", True),
        (17, -1, r"\x00ff", r"\x00ff", "00ff"),
        (20, -1, "9223372036854775807", "9223372036854775807", 9223372036854775807),
        (25, -1, "", "''", ""),
        (25, -1, "a\tb\x1b[31m", r"'a\tb\x1b[31m'", "a\tb\x1b[31m"),
        (25, -1, "Übermut", "'Übermut'", "Übermut"),
        (114, -1, '{"a": 1.0}', "'{\"a\": 1.0}'", '{"a": 1.0}'),
        (700, -1, "0.1", "0.1", 0.1),
        (701, -1, "0.30000000000000004", "0.30000000000000004", 0.30000000000000004),
        (701, -1, "-Infinity", "-Infinity", "-Infinity"),
        (1082, -1, "2024-02-29", "2024-02-29", "2024-02-29"),
        (1082, -1, "infinity", "infinity", "infinity"),
        (1083, -1, "24:00:00", "24:00:00", "24:00:00"),
        (1083, -1, "12:00:00.5", "12:00:00.500000", "12:00:00.500000"),
        (1114, -1, "0044-03-15 00:00:00 BC", "0044-03-15 00:00:00 BC", "0044-03-15 00:00:00 BC"),
        (1184, -1, "2024-02-29 12:00:00+00", "2024-02-29 12:00:00+00:00", "2024-02-29T12:00:00+00:00"),
        (1700, (5 << 16 | 2) + 4, "-1.50", "-1.50", "-1.50"),
        (1700, (38 << 16 | 30) + 4, "0." + "0" * 30, "0." + "0" * 30, "0." + "0" * 30),
        (1700, (5 << 16 | 2) + 4, "NaN", "NaN", "NaN"),
        (1700, -1, "1e1000", "'1e1000'", "1e1000"),
        (2950, -1, "a" * 8, "'aaaaaaaa'", "aaaaaaaa"),
    ],
)
def test_values(type_oid: int, typmod: int, text: str, shown: str, plain: object) -> None:
    """Exact in both formats; text is in quotes, and nothing reaches the terminal that it would obey."""
    change = only(Relation(1, "public", "t", "d", (Column("v", type_oid, typmod, False),)), text)
    assert as_text(change).partition("v=")[2] == shown
    assert json.loads(as_json(change))["new"] == {"v": plain}


def test_names_that_do_not_print() -> None:
    change = only(Relation(1, "public", "a\nb", "d", (Column("\x1b", 25, -1, False),)), "x")
    assert as_text(change).endswith(r"'public.a\nb' INSERT '\x1b'='x'")


def test_long_values_are_cut() -> None:
    shown = as_text(only(T, "1", "x" * 1000))
    assert shown.endswith(f"c1='{'x' * (MOST_CHARACTERS - 1)}... (1002 characters)")


def test_bytes_that_are_no_text() -> None:
    """Of a database in SQL_ASCII."""
    change = only(T, "1", b"\xff")
    assert as_text(change).endswith(r"c1=\xff")
    assert json.loads(as_json(change))["new"] == {"c0": 1, "c1": r"\xff"}


def test_nothing_of_a_change_is_lost_by_its_key() -> None:
    """A key of several columns is shown in the table's order."""
    described = dataclasses.replace(wire.table(types="tit", key=(2, 0)), name="k")
    assert as_text(only(described, "a", "1", "b")).endswith("public.k INSERT (c0='a', c2='b') c1=1")


def test_wanted() -> None:
    for patterns, expected in (
        ([], True),
        (["public.t"], True),
        (["public.*"], True),
        (["x", "*.t"], True),
        (["public.T"], False),
        (["t"], False),
        (["public.[t]"], True),
    ):
        assert wanted("public.t", patterns) is expected
    assert wanted("public.[t]", ["public.[t]"])
