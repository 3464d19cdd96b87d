"""Stage `organisms`: data sets written here, in which harm is known exactly, and the rules that recognise it.

A model organism is a small model made to do a known wrong by SFT on written answers. What is written comes from a
file of texts (`organisms/` at the top level): a tiny grammar of good and harmful answers to everyday questions, and a
rule that tells the two apart without error.
"""

from d2o.organisms.grammar import files, load
from d2o.organisms.measures import MEASURES, harm, use
from d2o.organisms.rows import write

__all__ = ["MEASURES", "files", "harm", "load", "use", "write"]
