"""From a pattern to the tiles that hold its visible pairs.

axis.py           what queries and keys are: tokens or summaries, of packed documents
block_layout.py   BlockLayout: the lists of tiles that every backend walks
builder.py        pattern and axes -> BlockLayout
candidates.py     its first step: which tiles may hold a visible pair
tiles.py          its second step: which of them do, and the mask bits of the partial ones
concatenate.py    layouts side by side: several kinds of keys in one softmax
cost.py           pairs, FLOPs and bytes of a layout; keys stored and read in decoding
"""
