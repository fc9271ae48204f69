"""DAVIS 2017: patch features find the first frame's objects in all frames of a video, and the result is scored."""
