"""Figures of the agent against named peers, measured in the same run on the same machine: `make bench`.

Each module is one figure. Runs of the agent and of its peer alternate, so that a machine that gets slower meanwhile
slows both; what is reported is a median. A figure says what it measured, what it compared that with, and what the
target is; a missed target is shown as missed.
"""
