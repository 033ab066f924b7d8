"""Keeps a training job going: plan, gate, launch, watch; restart, drop a group, grow again.

`words.py` and `decide.py` are pure; `shell.py` has the processes, files and the clock.
"""
