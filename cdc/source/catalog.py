"""What the source's catalogs say about tables, their columns, their replica identity and their publication.

Everything is read by plain SELECTs from the catalogs' tables: one statement sees one snapshot, and within a transaction
that imported a snapshot it sees that one, while syscache functions (pg_relation_filenode, regclass, format_type and the
like) always see the newest state. And none of them waits for a lock on a table, but where it is said.

Source: PostgreSQL manual, "System Catalogs" and "Publications"; RelationGetIndexList for what a usable identity is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from psycopg import sql

from cdc.source.connection import Connection, translated

__all__ = [
    "MARK",
    "Attribute",
    "Member",
    "PublishedTable",
    "TableDefinition",
    "Terms",
    "definition",
    "definitions",
    "owned",
    "published",
    "row_filter",
    "user_tables",
]

MARK = "managed by pg-duckdb-cdc"
"""The comment on a publication of ours."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attribute:
    """One column.

    Attributes:
        generated: '' for an ordinary column, 's' stored, 'v' virtual.
        missing: what rows written before the column was added hold in it, as text; None: NULL, or nothing is recorded.
    """

    attnum: int
    name: str
    type_oid: int
    typmod: int
    generated: str
    missing: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A table of a partition tree; of an ordinary table, itself.

    Attributes:
        is_leaf: it has storage.
        link: xmin of the row of pg_inherits that attaches it to its parent; 0: of the root.
        xid: xmin of its row of pg_class: which transaction wrote that last, a TRUNCATE, say.
        columns_xid: which transaction was the last to write one of its columns, as ALTER TABLE ... TYPE does.
        born: it was made by CREATE TABLE ... PARTITION OF, and so had no row before it was a partition.
    """

    oid: int
    is_leaf: bool
    relfilenode: int
    link: int
    xid: int
    columns_xid: int
    born: bool


@dataclasses.dataclass(frozen=True, slots=True)
class TableDefinition:
    """An ordinary or partitioned table.

    Attributes:
        relkind: r ordinary, p partitioned.
        members: the table and all partitions below it, by OID.
        attributes: without dropped ones, in the order of attnum.
        natts: the highest attnum that was ever used.
        types: a JSON object of what decides how values of the user's types print: by OID, each label of an enum, and
            the attributes of a composite type.
        replica_identity: d default, n nothing, f full, i index.
        identity_usable: whether its updates and deletes can be published without making them fail, and be followed:
            a valid key, or FULL. Of a partitioned table every leaf must send what the root's Relation promises: the
            same key, or under FULL the whole row (ALTER TABLE ... REPLICA IDENTITY does not reach the leaves).
        leaves_astray: a leaf sends old rows, and not what the root's Relation promises. The server minds not: whoever
            followed them would look for the wrong rows.
        key: attnums of the identity's columns; empty under FULL, NOTHING or without a valid one.
    """

    oid: int
    schema: str
    name: str
    relkind: str
    members: tuple[Member, ...]
    attributes: tuple[Attribute, ...]
    natts: int
    types: str
    replica_identity: str
    identity_usable: bool
    leaves_astray: bool
    key: tuple[int, ...]

    @property
    def storage(self) -> str:
        """What changes when the table is rewritten, or a partition is attached or detached, as text to keep."""
        return ",".join(f"{m.oid}:{m.relfilenode}:{m.link}" for m in self.members)

    @property
    def leaves(self) -> tuple[int, ...]:
        """OIDs of what has storage."""
        return tuple(member.oid for member in self.members if member.is_leaf)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """A publication, without what it lists.

    Attributes:
        version: the transaction that last changed its options (or its owner): what was altered and put back shows, too.
        publishes: the first letters of insert, update, delete and truncate, as far as it does.
        ours: it has `MARK`.
        subscribed: OIDs of all the publications that were asked for, tables or not: one that is dropped and made anew
            has another.
    """

    version: int
    publishes: str
    ours: bool
    subscribed: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table as one publication publishes it.

    Attributes:
        columns: names of what is published, in the order of attnum.
        publication: its name.
        entry: OID of the row by which it is: of pg_publication_rel, pg_publication_namespace, or pg_publication. A
            table that was taken out and put in again, with other columns or another filter, say, has another one.
        terms: of the publication.
    """

    oid: int
    schema: str
    name: str
    columns: tuple[str, ...]
    publication: str
    entry: int
    terms: Terms

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


# attmissingval is an array of one element: its text is read as text[], unless its type has another delimiter (box),
# whose text array_out does not quote. A partitioned table holds no rows and so has none: its leaves do, all the same.
_DEFINITIONS = """
    WITH RECURSIVE wanted AS MATERIALIZED (
        SELECT c.oid, n.nspname, c.relname, c.relkind, c.relreplident, c.relnatts
        FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND {condition}
    ), tree AS (
        SELECT oid AS root, oid AS member, relkind, true AS is_root, '0'::xid AS link FROM wanted
        UNION ALL
        SELECT tree.root, c.oid, c.relkind, false, i.xmin
        FROM tree
        JOIN pg_catalog.pg_inherits AS i ON i.inhparent = tree.member
        JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
        WHERE tree.relkind = 'p'
    ), members AS MATERIALIZED (
        SELECT tree.root, tree.is_root, c.oid, c.relkind, c.relreplident, c.relfilenode, key.attnums, key.names,
               tree.link, c.xmin AS xid,
               -- ATTACH PARTITION writes the columns anew; CREATE TABLE ... PARTITION OF just once, with the row type.
               (SELECT a.xmin FROM pg_catalog.pg_attribute AS a
                WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY age(a.xmin) LIMIT 1) AS columns_xid,
               NOT tree.is_root AND (SELECT coalesce(bool_or(a.xmin = t.xmin AND a.cmin = t.cmin), false)
                FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS t ON t.oid = c.reltype
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS born
        FROM tree
        JOIN pg_catalog.pg_class AS c ON c.oid = tree.member
        LEFT JOIN LATERAL (
            SELECT array_agg(a.attnum ORDER BY k.position) AS attnums, array_agg(a.attname::text) AS names
            FROM pg_catalog.pg_index AS x
            CROSS JOIN LATERAL unnest(x.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
            JOIN pg_catalog.pg_attribute AS a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
            WHERE x.indrelid = c.oid AND k.position <= x.indnkeyatts
              AND x.indisvalid AND x.indisunique AND x.indimmediate
              AND (c.relreplident = 'd' AND x.indisprimary OR c.relreplident = 'i' AND x.indisreplident)
        ) AS key ON true
    ), used (root, type) AS (
        SELECT w.oid, a.atttypid
        FROM wanted AS w JOIN pg_catalog.pg_attribute AS a ON a.attrelid = w.oid
        WHERE a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
        UNION
        SELECT used.root, part.type
        FROM used
        JOIN pg_catalog.pg_type AS t ON t.oid = used.type
        CROSS JOIN LATERAL (
            SELECT t.typbasetype WHERE t.typtype = 'd'
            UNION ALL SELECT t.typelem
            UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range AS r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
            UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
                      WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) AS part (type)
        WHERE part.type >= 16384
    )
    SELECT w.oid::int8, w.nspname::text, w.relname::text, w.relkind::text, w.relreplident::text,
           (SELECT json_agg(json_build_array(a.attnum, a.attname, a.atttypid::int8, a.atttypmod, a.attgenerated,
                                CASE WHEN s.attmissingval IS NULL THEN NULL
                                     WHEN t.typdelim = ',' THEN (s.attmissingval::text::text[])[1]
                                     ELSE btrim(s.attmissingval::text, '{{}}') END)
                            ORDER BY a.attnum)
            FROM pg_catalog.pg_attribute AS a LEFT JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
            LEFT JOIN LATERAL (
                SELECT l.attmissingval
                FROM members AS m JOIN pg_catalog.pg_attribute AS l ON l.attrelid = m.oid AND l.attname = a.attname
                WHERE m.root = w.oid AND l.atthasmissing AND NOT l.attisdropped ORDER BY m.oid LIMIT 1
            ) AS s ON true
            WHERE a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped),
           (SELECT json_agg(json_build_array(m.is_root, m.oid::int8, m.relkind, m.relreplident, m.relfilenode::int8,
                                             m.attnums, m.names, m.link::text::int8, m.xid::text::int8,
                                             coalesce(m.columns_xid::text::int8, 0),
                                             m.born) ORDER BY m.oid)
            FROM members AS m WHERE m.root = w.oid),
           w.relnatts,
           (SELECT json_object_agg(part.key, part.value ORDER BY part.key)
            FROM (SELECT e.oid::text, e.enumlabel::text
                  FROM used JOIN pg_catalog.pg_enum AS e ON e.enumtypid = used.type WHERE used.root = w.oid
                  UNION ALL
                  SELECT t.oid::text, string_agg(a.attnum || ' ' || a.atttypid, ',' ORDER BY a.attnum)
                  FROM used
                  JOIN pg_catalog.pg_type AS t ON t.oid = used.type AND t.typtype = 'c'
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
                  WHERE used.root = w.oid GROUP BY t.oid) AS part (key, value))
    FROM wanted AS w
    ORDER BY w.nspname, w.relname"""

# 1259: pg_class itself. Schemas named pg_... are the system's: catalogs, TOAST, temporary tables.
_USER_TABLE = sql.SQL("""
    NOT c.relispartition AND c.relpersistence = 'p'
    AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', '_cdc')
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend AS d
                    WHERE d.classid = 1259 AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype = 'e')""")

# Not by pg_publication_tables: it locks every table that it lists, and so waits behind whoever alters any of them.
# Under `named` stands what a publication lists, by table, by schema or as everything; `below` are the partitions of
# that. A column list is for what is listed by table alone, and so is a row filter. 16384: the first OID of users'.
# What any of the publications publishes by way of a partitioned table, the stream has under that name alone, the
# topmost one, even if another publication lists the partition itself. 6104 is pg_publication.
_PUBLISHED = """
    WITH RECURSIVE wanted AS MATERIALIZED (
        SELECT p.oid, p.pubname, p.puballtables, p.pubviaroot, {generated} AS generated,
               p.xmin::text::int8 AS version,
               concat(CASE WHEN p.pubinsert THEN 'i' END, CASE WHEN p.pubupdate THEN 'u' END,
                      CASE WHEN p.pubdelete THEN 'd' END, CASE WHEN p.pubtruncate THEN 't' END) AS publishes,
               coalesce(d.description = %s, false) AS ours
        FROM pg_catalog.pg_publication AS p
        LEFT JOIN pg_catalog.pg_description AS d ON d.objoid = p.oid AND d.classoid = 6104 AND d.objsubid = 0
        WHERE p.pubname = ANY (%s)
    ), named AS MATERIALIZED (
        SELECT w.oid AS publication, r.prrelid AS relation, r.prattrs AS attnums, r.oid AS entry
        FROM wanted AS w JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid = w.oid
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_publication_namespace AS s
                          JOIN pg_catalog.pg_class AS c ON c.relnamespace = s.pnnspid
                          WHERE s.pnpubid = w.oid AND c.oid = r.prrelid)
        UNION ALL
        SELECT w.oid, c.oid, NULL,
               coalesce((SELECT s.oid FROM pg_catalog.pg_publication_namespace AS s
                         WHERE s.pnpubid = w.oid AND s.pnnspid = c.relnamespace), w.oid)
        FROM wanted AS w JOIN pg_catalog.pg_class AS c ON c.relpersistence = 'p' AND c.oid >= 16384
        WHERE c.relkind IN ('r', 'p')
          AND (w.puballtables OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace AS s
                                         WHERE s.pnpubid = w.oid AND s.pnnspid = c.relnamespace))
    ), below AS (
        SELECT n.publication, i.inhrelid AS relation, n.entry
        FROM named AS n
        JOIN pg_catalog.pg_class AS c ON c.oid = n.relation AND c.relkind = 'p'
        JOIN pg_catalog.pg_inherits AS i ON i.inhparent = c.oid AND NOT i.inhdetachpending
        UNION
        SELECT b.publication, i.inhrelid, b.entry
        FROM below AS b
        JOIN pg_catalog.pg_class AS c ON c.oid = b.relation AND c.relkind = 'p'
        JOIN pg_catalog.pg_inherits AS i ON i.inhparent = c.oid AND NOT i.inhdetachpending
    )
    SELECT c.oid::int8, s.nspname::text, c.relname::text, w.pubname::text,
           ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                   AND CASE WHEN n.attnums IS NOT NULL THEN a.attnum = ANY (n.attnums::int2[])
                            ELSE a.attgenerated IN ('', w.generated::"char") END
                 ORDER BY a.attnum),
           coalesce(n.entry, (SELECT min(b.entry) FROM below AS b
                              WHERE (b.publication, b.relation) = (p.publication, p.relation)))::int8,
           w.version, w.publishes, w.ours, ARRAY(SELECT oid::int8 FROM wanted ORDER BY oid)
    FROM (SELECT publication, relation FROM named UNION SELECT publication, relation FROM below) AS p
    JOIN wanted AS w ON w.oid = p.publication
    JOIN pg_catalog.pg_class AS c ON c.oid = p.relation
    JOIN pg_catalog.pg_namespace AS s ON s.oid = c.relnamespace
    LEFT JOIN named AS n ON (n.publication, n.relation) = (p.publication, p.relation)
    WHERE (w.pubviaroot OR c.relkind = 'r')
      AND p.relation NOT IN (SELECT b.relation FROM below AS b JOIN wanted AS v ON v.oid = b.publication
                             WHERE v.pubviaroot)
    ORDER BY s.nspname, c.relname, w.pubname"""

_ROW_FILTERS = """
    SELECT (SELECT pg_catalog.pg_get_expr(r.prqual, r.prrelid)
            FROM pg_catalog.pg_publication_rel AS r
            WHERE r.prpubid = p.oid AND r.prrelid = %s::text::oid
              AND NOT EXISTS (SELECT FROM pg_catalog.pg_publication_namespace AS s
                              JOIN pg_catalog.pg_class AS c ON c.relnamespace = s.pnnspid
                              WHERE s.pnpubid = p.oid AND c.oid = r.prrelid))
    FROM pg_catalog.pg_publication AS p WHERE p.pubname = ANY (%s)"""


def definition(connection: Connection, oid: int) -> TableDefinition | None:
    """Return the table `oid`, or None if the snapshot has no such table.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    return definitions(connection, [oid]).get(oid)


def definitions(connection: Connection, oids: Sequence[int]) -> dict[int, TableDefinition]:
    """Return those of the tables `oids` that exist, by OID.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    # Unsigned 32 bits: as oid[], not int4[].
    found = _definitions(connection, sql.SQL("c.oid = ANY ({}::oid[])").format([str(oid) for oid in oids]))
    return {table.oid: table for table in found}


def user_tables(connection: Connection) -> list[TableDefinition]:
    """Return the user's tables by schema and name.

    Ordinary and partitioned tables that are no partition themselves; not the system's, temporary or unlogged ones, no
    extension's, and none in our own schema.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    return _definitions(connection, _USER_TABLE)


def owned(connection: Connection, oids: Sequence[int]) -> frozenset[int]:
    """Return those of the tables `oids` that we have the rights of the owner of.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    with translated("read the owners of tables"):
        rows = connection.execute(
            "SELECT c.oid::int8 FROM pg_class AS c WHERE c.oid = ANY (%s::oid[]) AND pg_has_role(c.relowner, 'USAGE')",
            [[str(oid) for oid in oids]],
        ).fetchall()
    return frozenset(oid for (oid,) in rows)


def published(connection: Connection, names: Sequence[str]) -> list[PublishedTable]:
    """Return the tables that the publications `names` publish, once per publication.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    # Before 18 generated columns are never published.
    generated = "p.pubgencols" if connection.info.server_version >= 180000 else "'n'"
    with translated("read what is published"):
        query = sql.SQL(_PUBLISHED).format(generated=sql.SQL(generated))
        rows = connection.execute(query, [MARK, list(names)]).fetchall()
    return [
        PublishedTable(
            *(oid, schema, name, tuple(columns), publication, entry), Terms(version, publishes, ours, tuple(subscribed))
        )
        for oid, schema, name, publication, columns, entry, version, publishes, ours, subscribed in rows
    ]


def row_filter(connection: Connection, oid: int, names: Sequence[str]) -> str | None:
    """Return the condition for a row of the table `oid` to be published, None if each is.

    To print it, the server takes ACCESS SHARE on the table: use a session that has that lock.

    Args:
        names: the publications that publish the table: a row goes out if any of them lets it.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    with translated("read row filters"):
        rows = connection.execute(_ROW_FILTERS, [str(oid), list(names)]).fetchall()
    filters = [text for (text,) in rows]
    return None if None in filters or not filters else " OR ".join(f"({text})" for text in filters)


def _definitions(connection: Connection, condition: sql.Composable) -> list[TableDefinition]:
    with translated("read the definitions of tables"):
        rows = connection.execute(sql.SQL(_DEFINITIONS).format(condition=condition)).fetchall()
    return [_definition(row) for row in rows]


def _definition(row: tuple[Any, ...]) -> TableDefinition:
    oid, schema, name, relkind, identity, attributes, members, natts, types = row
    root = next(member for member in members if member[0])
    leaves = [member for member in members if member[2] != "p"]
    return TableDefinition(
        oid=oid,
        schema=schema,
        name=name,
        relkind=relkind,
        members=tuple(Member(m[1], m[2] != "p", m[4], m[7], m[8], m[9], m[10]) for m in members),
        attributes=tuple(Attribute(*attribute) for attribute in attributes or ()),
        natts=natts,
        types=json.dumps(types or {}),
        replica_identity=identity,
        identity_usable=_promises(root) and all(_keeps(leaf, root) for leaf in leaves),
        leaves_astray=any(_promises(leaf) and not (_promises(root) and _keeps(leaf, root)) for leaf in leaves),
        key=tuple(root[5] or ()),
    )


def _promises(member: Sequence[Any]) -> bool:
    """Whether the Relation of `member` names something to find its rows by."""
    return member[3] == "f" or bool(member[6])


def _keeps(leaf: Sequence[Any], root: Sequence[Any]) -> bool:
    """Whether the old tuples of `leaf` hold what the Relation of `root` names."""
    if leaf[3] == "f":
        return True
    return root[3] != "f" and set(leaf[6] or ()) == set(root[6] or ())
