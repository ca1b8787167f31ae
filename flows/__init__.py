"""The pipeline as a Prefect flow: `python -m flows.prune`. The library and the stages know nothing
of it.

Prefect and DVC read these variables when they are imported. Neither sends usage reports. A flow
waits longer than Prefect's 20 s for the server that Prefect starts for it; on a busy machine those
are too few.
"""

import os
from importlib.util import find_spec

from blockpruner.core.errors import missing

for _name, _value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(_name, _value)
for _name in ("dvc", "prefect", "ruamel"):
    if find_spec(_name) is None:
        raise missing(_name, "dag")
