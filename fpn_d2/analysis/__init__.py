"""What models cost and what they are worth: the list of components, and the study of variants."""

from fpn_d2.analysis.measure.complexity import count_macs, count_parameters
from fpn_d2.analysis.study.run import run_study
from fpn_d2.evaluation.size_ap import ap_by_size

__all__ = ["ap_by_size", "count_macs", "count_parameters", "run_study"]
