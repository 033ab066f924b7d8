"""Keeps a training job going: plan, gate, launch, watch; restart, drop a group, grow again.

`words.py` and `decide.py` are pure; `shell.py` obeys, with processes and the clock; `needs.py` is
what it is handed in, `files.py` what it reads and locks, `interrupts.py` ctrl-c.
"""
