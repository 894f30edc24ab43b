"""Lead from one picture to the line in stages, with figures at every gate and a person's signed go or no-go.

line.py        line.toml: the subject, the styles, the products, what is asked of their pictures
work.py        adapters and pictures, each made once
stages.py      one picture; several styles
whole_line.py  every product in every style, by the catalog
costs.py       time, energy, money, storage; what the next stage will take
recording.py   what it leaves in the registry; requests for approvals
report.py      a stage's page in English and Japanese (texts.toml)
project.py     Pilot: which stages have run, on what, and what was decided
"""

from qrlora.operations.pilot.line import STAGES, Line
from qrlora.operations.pilot.project import Pilot
from qrlora.operations.pilot.whole_line import WholeLine
from qrlora.operations.pilot.work import Scorer, metric_scorer

__all__ = ["STAGES", "Line", "Pilot", "Scorer", "WholeLine", "metric_scorer"]
