"""Training jobs over chips of different makers: `plan` decides (pure), `run` carries it out."""
