"""The search for the fastest candidate that fits: named strategies and searched plans, at all useful batch sizes.

It runs in a child process. Memory comes from the predictor, time from the operator times of the traced steps.
"""
