"""The main module of a process that scans files: `python -P -m dataflow.indexing.worker DESCRIPTOR`."""

from __future__ import annotations

import sys

from dataflow.convert.worker import main
from dataflow.indexing.scanning import serve

if __name__ == "__main__":
    main(int(sys.argv[1]), serve)
