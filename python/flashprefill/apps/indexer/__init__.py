"""`flashprefill train-indexer`: trains the weights by which VSPrefill predicts verticals and slashes.

masses.py computes the truth that is learnt, harvest.py reads texts with the model, trainer.py is the
learner, run.py the order of work.
"""

from .run import Options, run

__all__ = ["Options", "run"]
