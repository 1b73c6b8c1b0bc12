"""Corpora: the catalogue of datasets, their files, the readers of their formats, and a user's own files."""

from sam.corpora.catalogue import DatasetSpec, datasets, spec
from sam.corpora.files import read_file
from sam.corpora.loading import Loaded, load, load_report, type_names

__all__ = ["DatasetSpec", "Loaded", "datasets", "load", "load_report", "read_file", "spec", "type_names"]
