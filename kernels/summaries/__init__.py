"""Summaries of spans of tokens as further keys.

hierarchy.py        tokens and levels of summaries on one key axis, with their layout
span_pooling.py     pools the keys and values of spans, level by level
join_summaries.py   pooling, rotation and placement in one operator, for GPUs
"""
