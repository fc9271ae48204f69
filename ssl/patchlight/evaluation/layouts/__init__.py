"""Small procedural data in the layouts of data sets, and readers of such layouts."""
