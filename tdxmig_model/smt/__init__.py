"""The model in z3: induction for every size, bounded search, and aids to find what is missing.

`z3api` is the only file of the package that imports z3.
"""
