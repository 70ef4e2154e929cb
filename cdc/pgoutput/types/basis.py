"""Types of users and of extensions, reduced to a built-in type that prints the same: the one as which they are held.

A domain is what it is over, with the modifier that the domain has; an array of whatever has no list of its own is a
list of texts; all else (enums, composites, ranges, hstore, citext) is text. So is a type that is not there any more:
DROP TYPE may be ahead of the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from cdc.pgoutput.types.table import BY_ARRAY_OID, BY_OID

__all__ = ["TEXT", "Basis", "Declarations", "Declared", "basis", "is_built_in"]


class Basis(NamedTuple):
    """A built-in type and its modifier (-1: none)."""

    type_oid: int
    typmod: int


@dataclasses.dataclass(frozen=True, slots=True)
class Declared:
    """A row of pg_type.

    Attributes:
        domain_of: what a domain is over, and the modifier that it has; None: it is no domain.
        element: OID of what a true array has; 0: it is no array.
        delimiter: of an array's elements.
    """

    domain_of: Basis | None
    element: int
    delimiter: str


Declarations = Callable[[int], Declared | None]
"""Looks a type up by its OID; None: it is not there."""

TEXT = Basis(25, -1)
"""How all is held that has no type of its own here."""


def is_built_in(type_oid: int) -> bool:
    """Whether the table of types has the type, or an array of it."""
    return type_oid in BY_OID or type_oid in BY_ARRAY_OID


def basis(type_oid: int, typmod: int, declared: Declarations) -> Basis:
    """Return the built-in type as which a column of type `type_oid` with modifier `typmod` is held.

    Args:
        declared: what pg_type says.
    """
    if is_built_in(type_oid):
        return Basis(type_oid, typmod)
    found = declared(type_oid)
    if found is None:
        return TEXT
    if found.domain_of is not None:
        return basis(*found.domain_of, declared)
    if found.element:
        return _list_of(basis(found.element, typmod, declared), found.delimiter)
    return TEXT


def _list_of(element: Basis, delimiter: str) -> Basis:
    held = BY_OID.get(element.type_oid)  # None: a domain over an array, say
    if held is not None and held.array_oid and held.delimiter == delimiter:
        return Basis(held.array_oid, element.typmod)
    texts = {row.delimiter: row.array_oid for row in (BY_OID[_BOX], BY_OID[TEXT.type_oid])}
    return Basis(texts[delimiter], -1) if delimiter in texts else TEXT


_BOX = 603  # text to us, and the one type of Postgres' own whose arrays have semicolons
