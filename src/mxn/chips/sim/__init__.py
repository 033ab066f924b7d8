"""The simulated chip: a torch device of its own for tests, in host memory, that is not the CPU.

Knows torch; knows nothing of engines, models or kernels. Start at `device.load`. The C++ is in
`csrc/`, explained in `csrc/sim.h`; docs/guides/simulated-chip.md shows how to use it.
"""
