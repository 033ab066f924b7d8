"""A usage row knows whose prices count where its model has none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_base"
down_revision = "0003_responses"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("base", sa.Text(), server_default="", nullable=False))


def downgrade() -> None:
    op.drop_column("usage", "base")
