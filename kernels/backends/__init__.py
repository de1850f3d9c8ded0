"""The backends of `attention()`. Each is a module with

    unsupported(q, k, v, layout) -> str | None                     why it cannot serve this call, or None

and either two passes, or one function that autograd differentiates:

    forward(q, k, v, layout, scale) -> (out, lse)
    backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale) -> (grad_q, grad_k, grad_v)

    attention(q, k, v, layout, scale, with_lse) -> (out, lse or None)

Shapes: q, out `[batch, heads, queries, head_dim]`; k, v `[batch, kv_heads, keys, head_dim]`; lse `[batch, heads,
queries]`. Passes share q, k, v, out and lse: a backward pass may come from another backend than its forward pass.

    reference     dense masked softmax: the oracle
    blocked       plain PyTorch, O(tiles), any device
    triton/       our kernels for GPUs
    hopper/       our kernels for H100 and H200
    flash         FlashAttention-4: dense and plain windows
    flex          FlexAttention on its Triton kernels
"""
