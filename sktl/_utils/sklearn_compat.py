"""The one room in which private names of scikit-learn are used.

They have kept their meaning since scikit-learn 1.3, and the suites that come with
scikit-learn's own contributors rely on them; when one moves, this file is the only
one to change.
"""

from sklearn.base import _fit_context as fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_sample_weight as check_sample_weight
from sklearn.utils.validation import _check_y as check_y

__all__ = [
    "DocLinkMixin",
    "Interval",
    "StrOptions",
    "check_feature_names_in",
    "check_sample_weight",
    "check_y",
    "fit_context",
]


class DocLinkMixin:
    """Let the HTML representation of an estimator link to its page in our documents.

    scikit-learn's own estimators do the same; without this there is no link at all.
    """

    _doc_link_module = "sktl"
    _doc_link_template = (
        "https://sktl.readthedocs.io/en/stable/api/sktl.{estimator_name}.html"
    )
