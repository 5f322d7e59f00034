"""The data set on a page: what the model will get of each file, and what looks wrong with it."""
