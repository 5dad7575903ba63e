"""The doctor: looks at every image and annotation of a config's data before the first step."""

from detkit.data.doctor.anchors import AnchorLevel
from detkit.data.doctor.check import Report, check_datasets, warn_before_training
from detkit.data.doctor.finding import KINDS, SEVERITIES, Example, Finding, Findings, Kind
from detkit.data.doctor.fix import write_cleaned
from detkit.data.doctor.page import page_of

__all__ = [
    "KINDS",
    "SEVERITIES",
    "AnchorLevel",
    "Example",
    "Finding",
    "Findings",
    "Kind",
    "Report",
    "check_datasets",
    "page_of",
    "warn_before_training",
    "write_cleaned",
]
