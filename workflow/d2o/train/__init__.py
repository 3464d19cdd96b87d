"""Stage `train`: a model, a method and its tables in; an aligned model and its log out."""

from d2o.train.data import Inputs
from d2o.train.recipe import run

__all__ = ["Inputs", "run"]
