"""Routed attention: a router chooses key blocks for each query.

routing.py              block summaries, scores and top-k: from router queries and keys to a Selection
selected_attention.py   attention to the chosen blocks
indexer_loss.py         the loss that trains a router's scores to predict attention
routing_health.py       diagnostics of the choice
"""
