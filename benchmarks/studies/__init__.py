"""Studies: what trained models reach, over seeds, each one command; README.md says how to run them.

A study is cases, each of which is measured under several seeds, and what its runs are summed up to.
"""
