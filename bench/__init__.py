"""Measurements beside a peer, in one run on one machine, as ratios. `make bench`."""
