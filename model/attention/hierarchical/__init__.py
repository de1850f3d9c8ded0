"""Hierarchical attention: tokens nearby, and pooled summaries of growing spans further away."""
