"""Decoders that run as one native call a step, on packed weights. Start at `decoder`."""
