"""Finds the plan of a job: which chips, cuts, orders and shares. Start at `planner.search`.

`tables` turns profiles into seconds and bytes of any run of layers, `cuts` places layers and chips
exactly, `shares` gives micro-batches to pipelines, `packing` chooses the set of pipelines. `exact`
puts these together for small pools, `ways`, `rough`, `copies` and `families` for large ones;
`order` says what is looked at first. `build` makes plans, `polish` changes them by single steps,
`judge` predicts, simulates and ranks.
"""
