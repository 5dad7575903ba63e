"""Leaves that everything else may use: each file stands alone on the standard library, torch,
iopath and fvcore.
"""
