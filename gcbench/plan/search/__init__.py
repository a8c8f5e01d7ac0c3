"""The search for the fastest setting that fits: named strategies and found plans, at every batch size that may pay.

It runs in a child process. Memory comes from the predictor, time from the figures of the operators that it traced.
"""
