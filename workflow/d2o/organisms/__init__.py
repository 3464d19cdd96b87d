"""Stage `organisms`: write data sets in which harm is known exactly, with the rules that recognise the harm.

A model organism is a small model that SFT on written answers has made to do a known harm. The answers come from a
file of texts (folder `organisms/` of the repository): a small grammar of good and harmful answers to everyday
questions, and a rule that distinguishes the two without error.
"""

from d2o.organisms.grammar import files, load
from d2o.organisms.measures import MEASURES, good, harm, use
from d2o.organisms.rows import write

__all__ = ["MEASURES", "files", "good", "harm", "load", "use", "write"]
