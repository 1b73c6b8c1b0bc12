"""Merging experts: pure functions on deltas, deltas from adapter folders, and applying a merge to a model."""

from sam.merging.apply import MergedWeights, fold, merged
from sam.merging.deltas import AdapterDeltas, Factors
from sam.merging.factors import factor_linear, factor_ties
from sam.merging.functions import dare, dare_ties, linear, task_arithmetic, ties
from sam.merging.merge import MERGE_VERSION, merge_modules, model_key
from sam.merging.spec import USES, CustomMerge, Merge, MergeSpec

__all__ = [
    "MERGE_VERSION",
    "USES",
    "AdapterDeltas",
    "CustomMerge",
    "Factors",
    "Merge",
    "MergeSpec",
    "MergedWeights",
    "dare",
    "dare_ties",
    "factor_linear",
    "factor_ties",
    "fold",
    "linear",
    "merge_modules",
    "merged",
    "model_key",
    "task_arithmetic",
    "ties",
]
