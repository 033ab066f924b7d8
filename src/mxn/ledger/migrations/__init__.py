"""Revisions of the tables, run in-process by `Database.migrate`."""
