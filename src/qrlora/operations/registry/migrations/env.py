"""Alembic's environment: migrations run in the transaction of `database.connect`."""

from alembic import context

from qrlora.operations.registry.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
