"""Stage `positives`: pools of K self-generated answers to each prompt, drawn in shards and merged."""

from d2o.positives.pool import merge
from d2o.positives.shard import draw

__all__ = ["draw", "merge"]
