"""Finds the plan of a job: which chips, cuts, orders and shares. Start at `planner.search`.

`tables` turns profiles into seconds and bytes of any run of layers, `cuts` places layers and chips
exactly, `shares` gives micro-batches to pipelines, `packing` chooses the set of pipelines,
`build` makes plans of them, `judge` predicts, simulates and ranks.
"""
