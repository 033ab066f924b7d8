"""Carry out a training plan on real devices. Start at `job.Job`."""
