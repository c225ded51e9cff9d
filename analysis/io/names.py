"""The values that the columns `stage` and `outcome` of a study's tables may hold."""

STAGES = ("search", "calibrate", "confirm")  # in the order in which they run
OUTCOMES = ("completed", "stopped_early", "infeasible", "failed")
