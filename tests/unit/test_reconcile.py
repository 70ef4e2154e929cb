"""What a look at the publications means for the tables, without a server."""

from __future__ import annotations

import dataclasses

import pytest

from cdc.errors import StateError
from cdc.reconcile import gap, reconcile, refuse_less, theirs
from cdc.sink.stored import State, Table
from cdc.source.catalog import PublishedTable, Terms

TERMS = Terms(version=700, publishes="iudt", ours=True, subscribed=(1, 2))


def there(oid: int, entry: int = 10, publication: str = "cdc", terms: Terms = TERMS) -> PublishedTable:
    """Return a table as it is published."""
    return PublishedTable(oid, "public", f"t{oid}", ("id",), publication, entry, terms)


def known(*published: PublishedTable, state: State = "streaming") -> list[Table]:
    """Return the rows of tables that were published so, and are in `state` by now."""
    begun = reconcile([], published, gone=True, starting=True)
    return [dataclasses.replace(table, state=state) for table in begun]


def states(changed: list[Table]) -> list[tuple[int, str]]:
    """Return what becomes of which table."""
    return [(table.oid, table.state) for table in changed]


def test_what_is_new_and_what_is_gone() -> None:
    """G4, G5: a new table begins; one that is gone is only where the stream says so, and begins again later."""
    assert states(known(there(1), state="pending")) == [(1, "pending")]
    assert reconcile(known(there(1)), [], gone=False) == []
    assert states(reconcile(known(there(1)), [there(2)], gone=True)) == [(2, "pending"), (1, "dropped")]
    assert states(reconcile(known(there(1), state="dropped"), [there(1)], gone=False)) == [(1, "pending")]


def test_a_new_table_of_a_name_that_is_in_use() -> None:
    """H8: it waits until the stream has come to where the old one is gone."""
    successor = dataclasses.replace(there(2), name="t1")
    assert reconcile(known(there(1)), [successor], gone=False) == []
    assert states(reconcile(known(there(1)), [successor], gone=True)) == [(2, "pending"), (1, "dropped")]


@pytest.mark.parametrize(
    "changed",
    [
        there(1, entry=11),
        there(1, publication="cdc_append"),
        there(1, terms=dataclasses.replace(TERMS, version=701)),
        there(1, terms=dataclasses.replace(TERMS, version=701, publishes="diut")),
    ],
)
def test_published_in_another_way(changed: PublishedTable) -> None:
    """G1, G2, G7: then it is copied anew, and followed no more until that is done; an error stays one."""
    outcomes: dict[State, State] = {
        "streaming": "resyncing",
        "resyncing": "resyncing",
        "copying": "pending",
        "pending": "pending",
        "error": "error",
    }
    for state, becomes in outcomes.items():
        (table,) = reconcile(known(there(1), state=state), [changed], gone=False)
        assert (table.state, table.reason) == (becomes, "published in another way")
        assert reconcile([table], [changed], gone=True) == []


def test_a_label_of_another_kind() -> None:
    """It stands for nothing that is published now."""
    (table,) = reconcile([Table(1, "public", "t1", "streaming", publication="cdc:10")], [there(1)], gone=True)
    assert table.state == "resyncing"
    assert reconcile([table], [there(1)], gone=True) == []


def test_by_two_publications() -> None:
    """G3: both are remembered, in whatever order they come."""
    both = [there(1), there(1, 12, "cdc_append")]
    (table,) = known(*both)
    assert reconcile([table], both[::-1], gone=True) == []
    assert states(reconcile([table], both[:1], gone=True)) == [(1, "resyncing")]


def test_a_publication_made_anew() -> None:
    """G7: a running stream is of no use; a start copies all, and remembers also what publishes nothing."""
    anew = there(1, terms=dataclasses.replace(TERMS, subscribed=(1, 3)))
    tables = known(there(1))
    assert gap(tables, [anew])
    assert not gap(tables, [there(1), there(2)])
    assert not gap(tables, [there(1, terms=dataclasses.replace(TERMS, subscribed=(1,)))])
    assert not gap([], [anew])
    assert not gap([Table(1, "public", "t1", "pending")], [anew])
    with pytest.raises(StateError, match="made anew"):
        reconcile(tables, [anew], gone=False)
    (table,) = reconcile(tables, [anew], gone=False, starting=True)
    assert table.state == "streaming"  # the entry is the same: whoever finds the gap says what becomes of it
    assert not gap([table], [anew])


def test_less_is_published() -> None:
    """G6, G7: kinds of changes that another's publication has lost are refused; ours is put right by the next poll."""
    all_of_it = dataclasses.replace(TERMS, ours=False)
    less = dataclasses.replace(all_of_it, version=701, publishes="it")
    before = known(there(1, terms=all_of_it))
    with pytest.raises(StateError, match="cdc was altered: it no longer publishes update, delete") as caught:
        reconcile(before, [there(1, terms=less)], gone=False)
    assert "SET (publish = 'insert, update, delete, truncate')" in caught.value.hint
    with pytest.raises(StateError):  # seen by what another table says of it
        refuse_less(before, [there(2, terms=less)])
    refuse_less(before, [there(1, publication="cdc_append", terms=less)])
    refuse_less(known(there(1, terms=all_of_it), state="dropped"), [there(1, terms=less)])
    refuse_less(known(there(1, terms=less)), [there(1, terms=all_of_it)])
    refuse_less(known(there(1)), [there(1, terms=dataclasses.replace(less, ours=True))])


def test_whose_it_was() -> None:
    """G7: the newest knowledge counts: that of tables which are gone only where there is no other."""
    mine = there(1, terms=dataclasses.replace(TERMS, ours=False))
    assert theirs(known(mine), "cdc")
    assert not theirs(known(mine), "other")
    assert not theirs(known(there(1)), "cdc")
    assert theirs(known(mine, state="dropped"), "cdc")
    assert not theirs([*known(mine, state="dropped"), *known(there(2))], "cdc")
    assert theirs([*known(there(2), state="dropped"), *known(mine)], "cdc")
    assert not theirs([], "cdc")
