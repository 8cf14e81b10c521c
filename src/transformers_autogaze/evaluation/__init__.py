"""
How good gazes are: measures, the selectors to compare with, and the comparison itself.

By rebuilt pixels: `comparison` measures selectors on clips; `selectors` holds the rules a model is compared with; `quality`
the measures of rebuilt frames, which `metrics` offers to `evaluate.load`; `report` writes tables and curves.

By what an encoder keeps: `features` is the measure, `feature_clips` the clips, `feature_selectors` and `encoder_selector`
what is compared, `feature_comparison` the comparison, `feature_report` its tables and curves.
"""

from .comparison import EvaluationClips, GazeSetting, SelectorScores, compare_scores, evaluate_selectors, load_clips
from .selectors import baseline_selectors


__all__ = [
    "EvaluationClips",
    "GazeSetting",
    "SelectorScores",
    "baseline_selectors",
    "compare_scores",
    "evaluate_selectors",
    "load_clips",
]
