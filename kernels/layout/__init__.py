"""Data structures that list the visible (query, key) pairs of one batch, and the builder of block layouts.

axis.py           Axis: the tokens or summaries that queries and keys represent, and their documents
block_layout.py   BlockLayout: the lists of tiles that every backend walks
builder.py        build_layout(): from a pattern and two axes to a BlockLayout
candidates.py     step 1 of the builder: tiles that may hold a visible pair
tiles.py          step 2 of the builder: the tiles that hold a visible pair, with the masks of partial ones
concatenate.py    concatenates layouts whose keys share one softmax
selection.py      Selection: the key blocks that each query attends to
cached_keys.py    CachedKeys: the keys in a cache that a decoding step attends to
cost.py           pairs, FLOPs and bytes of a layout; keys stored and read in decoding
"""
