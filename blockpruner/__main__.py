"""`python -m blockpruner` is the command `blockpruner`."""

from blockpruner.cli.main import main

main()
