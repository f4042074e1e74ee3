"""Checkpoints of upstream glq (0.1 – 0.8): read, loaded and served as they are.

Another project of the same name and quant_method, with another format: a rotation of both sides of a matrix, E8 shells,
QuIP#'s E8P or QTIP's trellis. docs/upstream.md says what is supported. No pickle is ever executed.
"""
