"""The SQL that the database's owner has to run once, for ``cdc setup``: settings, role, grants, publications.

Source: PostgreSQL manual; docs/how-to/managed-postgres.md for what differs between services.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from cdc.source import catalog
from cdc.source.catalog import TableDefinition
from cdc.source.connection import Connection, translated
from cdc.source.publication import matches
from cdc.source.upkeep import identifier, plan, render

__all__ = ["SERVICES", "setup_sql"]

SERVICES = ("own", "rds", "cloudsql", "azure", "supabase", "neon")
"""Who may run the server; own: oneself."""

_SWITCHES = {
    "rds": "-- Parameter group: rds.logical_replication = 1, then reboot.",
    "cloudsql": "-- Database flag: cloudsql.logical_decoding = on, then restart.",
    "azure": "-- Server parameter: wal_level = logical, then restart.",
    "supabase": "-- wal_level is logical already. Connect directly (db.PROJECT.supabase.co), not by the pooler.",
    "neon": "-- Settings, Logical Replication, Enable. Connect to the host without -pooler in its name.",
}


def setup_sql(
    connection: Connection,
    name: str,
    patterns: Sequence[str],
    role: str,
    service: str = "own",
    exclude: Sequence[str] = (),
) -> str:
    """Return the SQL that the database's owner has to run once, as a script with comments.

    Args:
        connection: as a role that may read the catalogs; nothing is changed.
        name: CDC_PUBLICATION.
        patterns: CDC_TABLES.
        role: that the consumer will use.
        service: one of `SERVICES`.
        exclude: CDC_EXCLUDE.

    Raises:
        ConnectionLost, SourceError: as `plan`.
    """
    planned = plan(connection, name, patterns, exclude)
    tables = [table for table in catalog.user_tables(connection) if matches(table, patterns)]
    lines = [
        *_settings_sql(connection, service),
        "",
        "-- The role of the consumer. Choose a password for it: \\password " + role,
        *_role_sql(connection, role, service),
        "",
        "-- What it reads.",
        *render(connection, _grants(connection, role, tables)),
        "",
        "-- What is published: the tables' owner (or a superuser) has to run this.",
        *(render(connection, planned.statements) or ["-- nothing is missing"]),
    ]
    return "\n".join(lines) + "\n"


def _settings_sql(connection: Connection, service: str) -> list[str]:
    if service in _SWITCHES:
        return [_SWITCHES[service]]
    entry = "pg_hba.conf must let the role in, for this database"
    with translated("read wal_level"):
        ((wal_level,),) = connection.execute("SHOW wal_level").fetchall()
    if wal_level == "logical":
        return [f"-- wal_level is logical already; {entry}."]
    return [f"-- As a superuser, then restart the server; {entry}.", "ALTER SYSTEM SET wal_level = 'logical';"]


def _role_sql(connection: Connection, role: str, service: str) -> list[str]:
    with translated(f"read role {role}"):
        query = "SELECT rolcanlogin AND rolreplication FROM pg_roles WHERE rolname = %s"
        found = connection.execute(query, [role]).fetchone()
    exists = found is not None
    if found == (True,) and service != "rds":
        return ["-- It is there already, and may replicate."]
    if service == "neon":
        return [f"-- Make {role} in the console, or by the API: one that is made by SQL may not replicate."]
    name = sql.Identifier(role)
    statements: list[sql.Composed] = []
    if service == "rds":
        statements += [] if exists else [sql.SQL("CREATE ROLE {} LOGIN").format(name)]
        statements += [sql.SQL("GRANT rds_replication TO {}").format(name)]
    else:
        verb = "ALTER" if exists else "CREATE"
        statements += [sql.SQL(f"{verb} ROLE {{}} LOGIN REPLICATION").format(name)]
    return render(connection, statements)


def _grants(connection: Connection, role: str, tables: Sequence[TableDefinition]) -> list[sql.Composed]:
    name = sql.Identifier(role)
    schemas = sorted({table.schema for table in tables})
    database = sql.Identifier(connection.info.dbname)
    grants: list[sql.Composed] = [sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, name)]
    for schema in schemas:
        grants.append(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), name))
        grants.append(
            sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA {} GRANT SELECT ON TABLES TO {}").format(
                sql.Identifier(schema), name
            )
        )
    grants += [sql.SQL("GRANT SELECT ON {} TO {}").format(identifier(table), name) for table in tables]
    return grants
