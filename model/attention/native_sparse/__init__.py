"""Native sparse attention (NSA): routed attention, and summaries of all past spans."""
