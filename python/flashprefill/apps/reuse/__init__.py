"""`flashprefill plan-reuse`: finds which layers of a model can take their masks from earlier ones.

profile.py looks at a forward, choose.py makes the plan of what it saw, run.py is the order of work.
"""

from .run import Options, run

__all__ = ["Options", "run"]
