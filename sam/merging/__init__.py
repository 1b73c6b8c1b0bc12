"""Merging experts: the methods, deltas from adapter folders, and applying a merge to a model."""

from sam.merging.apply import MergedWeights, fold, merged
from sam.merging.deltas import AdapterDeltas, Factors
from sam.merging.merge import MERGE_VERSION, Merge, merge_modules, model_key
from sam.merging.methods import (
    breadcrumbs,
    dare,
    dare_ties,
    della,
    factor_linear,
    factor_ties,
    iso_c,
    knots_ties,
    linear,
    task_arithmetic,
    ties,
)
from sam.merging.stream import Method

__all__ = [
    "MERGE_VERSION",
    "AdapterDeltas",
    "Factors",
    "Merge",
    "MergedWeights",
    "Method",
    "breadcrumbs",
    "dare",
    "dare_ties",
    "della",
    "factor_linear",
    "factor_ties",
    "fold",
    "iso_c",
    "knots_ties",
    "linear",
    "merge_modules",
    "merged",
    "model_key",
    "task_arithmetic",
    "ties",
]
