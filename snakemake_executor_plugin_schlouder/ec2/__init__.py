"""EC2's side of a launch: what is asked before the first one, what its errors mean, how a VM joins."""
