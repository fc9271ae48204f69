"""DAVIS 2017: the first frame's objects are found again in all frames by patch features, and scored."""
