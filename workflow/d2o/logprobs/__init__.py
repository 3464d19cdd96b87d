"""Log-probs of the responses of groups: the forward pass that references and training share."""

from d2o.logprobs.policy import Policy, load
from d2o.logprobs.rows import Row

__all__ = ["Policy", "Row", "load"]
