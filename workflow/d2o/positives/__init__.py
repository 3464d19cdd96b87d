"""Stage `positives`: pools of K self-generated answers to each prompt, sampled in shards and merged."""

from d2o.positives.pool import merge
from d2o.positives.shard import sample

__all__ = ["merge", "sample"]
