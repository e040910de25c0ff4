"""Ways to score a pool against targets, one file each."""
