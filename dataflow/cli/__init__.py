"""The `dataflow` command: a skin over the library, one module a command."""
