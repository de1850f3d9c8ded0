"""Summaries of spans of tokens as additional keys.

hierarchy.py        the key axis of tokens and levels of summaries, with its layout
span_pooling.py     pools the keys and values of spans, level by level
join_summaries.py   pooling, rotation and concatenation in one operator, for GPUs
"""
