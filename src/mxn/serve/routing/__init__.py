"""The router's decisions as pure state machines: time comes in as an argument, no I/O, no clock."""
