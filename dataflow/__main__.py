"""`python -m dataflow` is the `dataflow` command."""

from dataflow.cli.main import main

main(prog_name="dataflow")
