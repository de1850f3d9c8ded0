"""The backends of `attention()`. Each is a module with the same three functions:

    unsupported(q, k, v, layout) -> str | None                     why it cannot serve this call, or None
    forward(q, k, v, layout, scale) -> (out, lse)
    backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale) -> (grad_q, grad_k, grad_v)

Shapes: q, out `[batch, heads, queries, head_dim]`; k, v `[batch, kv_heads, keys, head_dim]`; lse `[batch, heads,
queries]`. They share q, k, v, out and lse, so that a backward pass may come from another backend than its forward pass.
"""
