"""The conformance cases of every op on this machine.

`python -m jepa_kernels verify`, or `pytest --pyargs jepa_kernels.verify`.
"""
