"""Initialisation: SIREN's and VI3NR's, for single tensors, for layers and for whole networks."""

from .estimates import Moments, moments
from .lsuv import lsuv_init_
from .network import vi3nr_init_
from .report import Report, report
from .search import SigmaSearch, search_sigma_p
from .siren import siren_init_, siren_uniform_
from .tune import SigmaTuning, tune_sigma_p
from .vi3nr import default_sigma_p, vi3nr_gain_MC, vi3nr_input_gain
from .weights import vi3nr_normal_, vi3nr_orthogonal_, vi3nr_uniform_

__all__ = [
    "Moments",
    "Report",
    "SigmaSearch",
    "SigmaTuning",
    "default_sigma_p",
    "lsuv_init_",
    "moments",
    "report",
    "search_sigma_p",
    "siren_init_",
    "siren_uniform_",
    "tune_sigma_p",
    "vi3nr_gain_MC",
    "vi3nr_init_",
    "vi3nr_input_gain",
    "vi3nr_normal_",
    "vi3nr_orthogonal_",
    "vi3nr_uniform_",
]
