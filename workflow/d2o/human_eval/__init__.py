"""Stage `human_eval`: people judge, blind, which of two answers is better; a page for each, and the verdicts back."""

from d2o.human_eval.answers import read
from d2o.human_eval.pages import write

__all__ = ["read", "write"]
