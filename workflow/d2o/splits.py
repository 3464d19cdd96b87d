"""The splits that an organism's data set is written in; which things each asks about depends on their order."""

SPLITS = ("demonstrations", "train", "validation", "test")
