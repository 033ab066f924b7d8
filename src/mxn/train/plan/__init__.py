"""Predict, plan and simulate a training job. Pure: numbers in, numbers out; no torch, no I/O.

Start at `plan.TrainPlan` for what is decided, `predict.predict` for what it will do,
`simulate.simulate_plan` for the same pass by pass (`picture.plan_svg` draws it), and
`search.search` for how the best one is found.
"""
