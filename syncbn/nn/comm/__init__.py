"""Communication: process groups, nodes, the all-reduce, and checks that ranks are in lockstep."""
