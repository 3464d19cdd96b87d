"""Log-probs of the responses of groups: the forward pass that log-probs and training share."""

from d2o.forward.policy import COMPARED, Policy, load
from d2o.forward.rows import Row
from d2o.forward.sides import sides

__all__ = ["COMPARED", "Policy", "Row", "load", "sides"]
