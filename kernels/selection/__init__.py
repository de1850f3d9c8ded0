"""A router's choice of key blocks, and attention to it.

routing.py              scores of past blocks -> causal top-k -> Selection
selected_attention.py   attention to the blocks of a Selection
routing_health.py       diagnostics of a router's choice
"""
