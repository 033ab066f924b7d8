"""Alembic's entry: it executes this file, with the connection that `upgrade` gave it."""

from __future__ import annotations

from importlib.util import find_spec

from alembic import context

from mxn.ledger import schema

# Tables of later revisions lie on the same metadata, in modules of their owners.
for _name in ("mxn.ledger.tables_batch", "mxn.ledger.tables_responses"):
    if find_spec(_name) is not None:
        __import__(_name)

# The transaction is the caller's: all revisions apply, or none.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
