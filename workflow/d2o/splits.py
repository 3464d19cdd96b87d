"""The splits of an organism's data set. Their order decides which things each split asks about."""

SPLITS = ("demonstrations", "train", "validation", "test")
