"""`benchmark`: every objective at equal compute, a table of what came of it, and what the paper claims about it."""

from experiments.objectives.job import benchmark as benchmark
