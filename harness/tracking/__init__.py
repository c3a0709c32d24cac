"""Records -> MLflow: live while a suite runs, and again from the records at any time, with the same outcome.

One experiment a suite; a parent run a method x configuration x domain with mean and spread over seeds; a child run a
seed; one comparison run with the table and its chart. MLflow is a view: everything in it can be rebuilt from the records
and the progress files that runs keep.

    rest.py        the server's REST interface with the standard library (why: see there)
    groups.py      the seeds of a method x configuration x domain, taken together; pure
    view.py        what MLflow should hold for a plan and its records; pure
    store.py       bring one MLflow run to what a view says
    curves.py      training curves out of progress.jsonl, which is hostile input
    ledger.py      what is published already
    publishing.py  all of a plan: ``publish``, ``pending``
    live.py        ``Tracker``: while runs run
"""

from harness.mlflow_server import ServerError, ui
from harness.tracking.live import Tracker
from harness.tracking.publishing import PublishSummary, pending, publish
from harness.tracking.rest import TrackingError

__all__ = ["PublishSummary", "ServerError", "Tracker", "TrackingError", "pending", "publish", "ui"]
