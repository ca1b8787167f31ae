"""The pipeline as a Prefect flow: `python -m flows.prune`. The library and the stages know nothing of it.

Decides that Prefect and DVC send no usage reports, and how long a flow waits for the server that Prefect starts for it
where none is set: Prefect's 20 s are too few on a busy machine. Each reads its variables when it is imported.
"""

import os

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}
PATIENT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}

for _name, _value in (QUIET | PATIENT).items():
    os.environ.setdefault(_name, _value)
