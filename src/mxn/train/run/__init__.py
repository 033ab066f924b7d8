"""Carry a training plan out on real devices. Loads torch. Start at `rank` and `launch`."""
