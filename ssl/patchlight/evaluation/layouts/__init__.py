"""Writers of small procedural data sets in the layouts that evaluations read."""
