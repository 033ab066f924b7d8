"""One file for each revision, in a fixed chain."""
