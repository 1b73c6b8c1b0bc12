"""Corpora: the catalogue of datasets, their files, the readers of their formats, and a user's own files."""

from sam.data.catalogue import DatasetSpec, datasets, spec
from sam.data.files import read_file
from sam.data.loading import Loaded, load, load_report, type_names

__all__ = ["DatasetSpec", "Loaded", "datasets", "load", "load_report", "read_file", "spec", "type_names"]
