"""Routed attention: a local window, and the past blocks that a router chooses for each query."""
