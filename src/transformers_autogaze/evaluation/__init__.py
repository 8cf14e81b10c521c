"""
Evaluation of selectors: measures, baselines and comparisons.

By reconstructions: `comparison` compares selectors on clips, `selectors` has the baselines, `quality` the measures, which
`metrics` makes available to `evaluate.load`, and `report` writes tables and curves.

By preserved encoder features: `features` has the measures, `feature_clips` the clips, `feature_selectors` and `encoder_selector`
the selectors, `feature_comparison` the comparison, and `feature_report` writes tables and curves.
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
