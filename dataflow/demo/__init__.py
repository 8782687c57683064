"""The main job on real data, as `dataflow demo` runs it: convert, cache, train on two ranks, kill, resume, account."""
