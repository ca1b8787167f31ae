"""Equal commands on one cache: all end well, with equal bytes, and one of them computes.

BLOCKPRUNER_STARTS rounds, each with two or three processes at random moments; 200 were run before a
release.
"""

import json
import os
import subprocess
import sys

STARTS = os.environ.get("BLOCKPRUNER_STARTS", "1")


def test_of_equal_commands_one_computes_and_all_end_well():
    command = [sys.executable, "-m", "tests.contention", STARTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["codes"] == {"0": found["commands"]} and found["equal bytes"] == found["commands"]
    assert found["most"] == {"fits": 1, "trainings": 1}, "and no score and no checkpoint twice"
    assert found["left beside OUT"] == 0
