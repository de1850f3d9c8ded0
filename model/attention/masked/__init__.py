"""Patterns that are masks over the tokens: dense, windows, strided, block-sparse, and any new mask."""
