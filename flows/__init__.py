"""The pipeline as a Prefect flow: `python -m flows.prune`. The library and the stages know nothing of it.

Decides that Prefect and DVC send no usage reports; they read these variables when they are imported.
"""

import os

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
