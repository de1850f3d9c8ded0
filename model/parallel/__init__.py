"""Context parallelism: a sequence of packed documents split along its length over several ranks.

    ranges.py         which tokens each rank holds, and which keys its queries may see
    exchange.py       brings entries from the ranks that hold them; gradients go back the same way
    context.py        Context: the ranks of a group, their tokens, and the exchanges among them

model/attention/<family>/shard.py: what each family of patterns exchanges.

Every rank runs embedding, norms, projections, SwiGLU and loss on its own tokens. Attention alone communicates: a layout
is data, so a rank builds the rows of its own queries and receives the keys that these rows name.
"""
