"""Triggers that count `rules.version` up. Used by revision 0001; never changed after a release."""

from __future__ import annotations

from collections.abc import Iterator

# Table -> columns whose change matters; none: all. When a key was last used does not.
WATCHED = {
    "organizations": "",
    "projects": "",
    "users": "",
    "api_keys": "project_id, user_id, digest, scopes, models, expires_us, revoked_us",
    "rate_limits": "",
    "budgets": "",
    "prices": "",
}
_BUMP = "UPDATE rules SET version = version + 1 WHERE id = 1;"


def statements(dialect: str) -> Iterator[str]:
    """Yield the statements that make the row of `rules` and its triggers."""
    yield "INSERT INTO rules (id, version) VALUES (1, 1)"
    if dialect == "postgresql":
        yield (
            "CREATE FUNCTION mxn_rules_changed() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {_BUMP} RETURN NULL; END $$"
        )
    for table, columns in WATCHED.items():
        update = f"UPDATE OF {columns}" if columns else "UPDATE"
        if dialect == "postgresql":
            yield (
                f"CREATE TRIGGER {table}_rules AFTER INSERT OR DELETE OR {update} ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION mxn_rules_changed()"
            )
            continue
        for action in ("INSERT", "DELETE", update):
            name = f"{table}_rules_{action.split()[0].lower()}"
            yield f"CREATE TRIGGER {name} AFTER {action} ON {table} BEGIN {_BUMP} END"
