"""The error report: where a detector is wrong, as a page, JSON and CSV."""

from detkit.evaluation.report.report import ReportOptions, read_results, write_report

__all__ = ["ReportOptions", "read_results", "write_report"]
