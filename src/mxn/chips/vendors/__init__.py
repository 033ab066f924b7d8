"""One small file per maker; each is an entry point of the group `mxn.chips`."""
