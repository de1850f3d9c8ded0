"""Routed attention as dense attention under masks made query by query: the truth that test_routed.py compares with."""

import torch

from kernels.patterns import NativeSparse
from model.attention import AttentionOutput
from tests.kernels.routing_oracle import naive_choice, naive_mask, naive_summaries, window_start


def softmax_of(scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, lse) where `mask` allows; 0 and -inf in a row that sees nothing."""
    seen = mask.any(-1)
    lse = torch.where(mask, scores, -1e300).logsumexp(-1)
    weights = torch.where(mask, scores - lse[..., None], -torch.inf).exp()
    return weights, torch.where(seen, lse, -torch.inf)


class Naive:
    """Replaces a core by dense attention under masks made query by query, and the indexer's loss by autograd's."""

    def __init__(self, core, documents):
        self.core, self.pattern, self.documents = core, core.pattern, documents
        self.length = documents.shape[1]

    def __call__(self, inputs, layout):
        x, q, k, v, *_ = inputs
        pattern, core, documents = self.pattern, self.core, self.documents
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        k_heads, v_heads = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        router_queries, summaries = self.route(x, q, k)
        chosen = naive_choice(
            router_queries, summaries, documents, pattern.top_k, pattern.window, pattern.block, pattern.first_block
        )
        of_block = naive_mask(chosen, documents, pattern.block).repeat_interleave(heads // core.selectors, 1)
        key = torch.arange(self.length)
        start = torch.tensor([window_start(t, pattern.window, pattern.block) for t in range(self.length)])
        same = documents[:, None, :, None] == documents[:, None, None, :]
        past = same & (key <= key[:, None])
        local = past & (key >= start[:, None])
        scores = q @ k_heads.mT * q.shape[-1] ** -0.5
        if core.attends_densely:
            weights, lse = softmax_of(scores, past.expand_as(scores))
            out = weights @ v_heads
        elif isinstance(pattern, NativeSparse):
            out, lse, weights = self.branches(inputs, layout, scores, v_heads, local, of_block)
        else:
            weights, lse = softmax_of(scores, local | of_block)
            out = weights @ v_heads
        auxiliary = None
        if pattern.router == "indexer":
            if core.warming_up:
                weights, _ = softmax_of(scores, past.expand_as(scores))
                takes_part = self.eligible(past)
            else:
                takes_part = of_block.unflatten(1, (core.selectors, -1))[:, :, 0]
            auxiliary = self.loss(router_queries, summaries, weights.detach(), takes_part)
        return AttentionOutput(out, lse, auxiliary)

    def route(self, x, q, k):
        pattern, core = self.pattern, self.core
        if core.indexer is None:
            summaries = naive_summaries(k, self.documents, pattern.block)
            queries = q.unflatten(1, (core.selectors, -1)).mean(2)
            return queries, summaries.repeat_interleave(core.selectors // k.shape[1], 1)
        x = x if core.training_settings.indexer_gradient else x.detach()
        queries = core.indexer.q_proj(x).unflatten(-1, (core.selectors, -1)).transpose(1, 2)
        summaries = naive_summaries(core.indexer.k_proj(x)[:, None], self.documents, pattern.block)
        return queries * pattern.indexer_dim**-0.5, summaries.expand(-1, core.selectors, -1, -1)

    def branches(self, inputs, layout, scores, v_heads, local, of_block):
        core, group = self.core, inputs.q_BHTD.shape[1] // inputs.k_BKTD.shape[1]
        levels = layout.summaries.levels
        pooled = core.pool(inputs.unrotated_k_BTKD, inputs.v_BKTD.transpose(1, 2), inputs.rotation, levels)
        keys, values = (layout.summaries.join([t]).repeat_interleave(group, 1) for t in pooled[0])
        coarse = layout.summaries.layout.dense_mask().expand(-1, scores.shape[1], -1, -1)
        coarse_scores = inputs.q_BHTD @ keys.mT * inputs.q_BHTD.shape[-1] ** -0.5
        masks = torch.cat([local | of_block, coarse.expand(len(scores), -1, -1, -1)], -1)
        weights, lse = softmax_of(torch.cat([scores, coarse_scores], -1), masks)
        of_tokens = weights[..., : self.length]
        if core.gates is None:
            return weights @ torch.cat([v_heads, values], 2), lse, of_tokens
        gates = torch.sigmoid(core.gates(inputs.x_BTW)).unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]
        of_tokens, _ = softmax_of(scores, of_block)  # what the indexer learns from: the routed branch's own softmax
        out = gates[0] * (softmax_of(scores, local.expand_as(scores))[0] @ v_heads)
        out = out + gates[1] * (of_tokens @ v_heads)
        out = out + gates[2] * (softmax_of(coarse_scores, coarse.expand_as(coarse_scores))[0] @ values)
        return out, lse, of_tokens

    def eligible(self, past):
        pattern, blocks = self.pattern, self.length // self.pattern.block
        stop = torch.tensor([window_start(t, pattern.window, pattern.block) for t in range(self.length)])
        whole = past & (torch.arange(self.length) < min(self.length, blocks * pattern.block))
        whole = whole & (torch.arange(self.length) < stop[:, None])
        return whole.expand(-1, self.core.selectors, -1, -1)

    def loss(self, queries, summaries, weights, takes_part):
        """takes_part: token by token, so a block takes part where any of its tokens does."""
        pattern, blocks = self.pattern, summaries.shape[2]
        cut = lambda t: t[..., : blocks * pattern.block].unflatten(-1, (blocks, pattern.block))  # noqa: E731
        takes_part = cut(takes_part).any(-1)
        received = cut(weights).sum(-1).unflatten(1, (self.core.selectors, -1)).mean(2) * takes_part
        total = 0.0
        logits = queries @ summaries.mT
        for b, s, t in takes_part.any(-1).nonzero().tolist():
            part = takes_part[b, s, t]
            wanted = received[b, s, t, part] / received[b, s, t, part].sum()
            total = total + (wanted * (wanted.log() - logits[b, s, t, part].log_softmax(-1))).sum()
        return total / self.core.selectors * self.core.training_settings.indexer_loss
