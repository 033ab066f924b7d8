"""Benchmarks that ship with mxn: ours and a peer in one run, interleaved, correctness first."""
