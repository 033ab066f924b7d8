"""Tables of uploaded files and batches. Contents lie in the database too, in chunks, so that every
gateway of a pool can read them and a backup of the database is a backup of everything."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text

from mxn.ledger.schema import metadata

CHUNK_BYTES = 1 << 20

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("org_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("status", Text, nullable=False),  # uploaded, processed, error
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Index("files_by_project", "project_id", "created_us"),
)

file_chunks = Table(
    "file_chunks",
    metadata,
    Column("file_id", Text, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("org_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("user_id", Text),
    Column("principal", Text, nullable=False),  # JSON: who pays, with scopes and allowed models
    Column("endpoint", Text, nullable=False),
    Column("model", Text),
    Column("status", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("completion_window", Text, nullable=False),
    Column("metadata", Text),  # JSON
    Column("errors", Text),  # JSON
    Column("output_expires_s", BigInteger),
    Column("total", Integer, nullable=False, default=0),
    Column("created_us", BigInteger, nullable=False),
    Column("in_progress_us", BigInteger),
    Column("expires_us", BigInteger, nullable=False),
    Column("finalizing_us", BigInteger),
    Column("completed_us", BigInteger),
    Column("failed_us", BigInteger),
    Column("expired_us", BigInteger),
    Column("cancelling_us", BigInteger),
    Column("cancelled_us", BigInteger),
    # The gateway that works on it, until when, and how often it has changed hands.
    Column("owner", Text),
    Column("lease_us", BigInteger, nullable=False, default=0),
    Column("fence", Integer, nullable=False, default=0),
    Index("batches_by_project", "project_id", "created_us"),
    Index("batches_by_status", "status"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("body", Text, nullable=False),  # JSON of the request
    Column("state", Text, nullable=False),  # pending, running, completed, failed
    Column("usage_id", Text),  # of the attempt under way or done: its row in the ledger
    Column("result", Text),  # JSON of the line of the output or error file
    Index("batch_lines_by_state", "batch_id", "state"),
)
