"""The contestants of the benchmarks: one function each, which the contestant's own process imports by name.

Each function is for bench.compare: it imports what it needs, calls imports_done() and returns a Contestant.
"""
