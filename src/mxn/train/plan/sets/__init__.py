"""Readers of public sets of measured training runs: text in, cases out. See `tests/data`."""
