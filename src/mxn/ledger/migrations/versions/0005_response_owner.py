"""An answer that is made in the background knows which gateway makes it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_response_owner"
down_revision = "0004_base"
branch_labels = None
depends_on = None

_UNDER_WAY = sa.text("owner IS NOT NULL")


def upgrade() -> None:
    op.add_column("responses", sa.Column("owner", sa.Text(), nullable=True))
    op.create_index(
        "responses_under_way",
        "responses",
        ["owner"],
        sqlite_where=_UNDER_WAY,
        postgresql_where=_UNDER_WAY,
    )


def downgrade() -> None:
    op.drop_index("responses_under_way", table_name="responses")
    op.drop_column("responses", "owner")
