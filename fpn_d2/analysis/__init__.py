"""What models cost and what they are worth: the list of components, and the study of variants."""

from .complexity import count_macs, count_parameters
from .size_ap import ap_by_size
from .study import run_study

__all__ = ["ap_by_size", "count_macs", "count_parameters", "run_study"]
