"""The default folder of the studies, the values of their columns `stage` and `outcome`, and how far seeds may go."""

STUDIES = "studies"
STAGES = ("search", "calibrate", "confirm")  # in the order in which they run
OUTCOMES = ("completed", "stopped_early", "infeasible", "failed")
SEEDS_APART = 10_000_000  # from a seed of a replicate to the same seed of the next: beyond every seed of a study
RUNGS_APART = 1_100_000  # from a seed of a rung to the same seed of the next, beyond every seed of a rung
PRELIMINARY = "Preliminary"  # first word of a verdict on too few seeds for a claim
