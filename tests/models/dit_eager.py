"""DiT once more, from a state_dict, in the plainest PyTorch: what the tests hold the model against.

Nothing here comes from the package, so that a slip there cannot repeat itself here.
"""

import math

import torch
import torch.nn.functional as F


def linear(state, name, x):
    return F.linear(x, state[name + ".weight"], state[name + ".bias"])


def affine_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps=1e-6)


def modulated_norm(x, shift, scale):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def softmax_attention(q, k, v, heads, mask=None):
    outputs = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        outputs.append(scores.softmax(-1) @ c)
    return torch.cat(outputs, -1)


def self_attention(state, name, x, heads):
    q, k, v = linear(state, name + ".qkv", x).chunk(3, -1)
    return linear(state, name + ".proj", softmax_attention(q, k, v, heads))


def mlp(state, name, x):
    h = linear(state, name + ".fc1", x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return linear(state, name + ".fc2", h)


def block(state, name, x, c, heads, conditioning, mask=None):
    if conditioning == "adaln_zero":
        s1, a1, g1, s2, a2, g2 = linear(state, name + "adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        x = x + g1[:, None] * self_attention(state, name + "attn", modulated_norm(x, s1, a1), heads)
        return x + g2[:, None] * mlp(state, name + "mlp", modulated_norm(x, s2, a2))
    if conditioning == "adaln":
        s1, a1, s2, a2 = linear(state, name + "adaLN_modulation.1", F.silu(c)).chunk(4, -1)
        x = x + self_attention(state, name + "attn", modulated_norm(x, s1, a1), heads)
        return x + mlp(state, name + "mlp", modulated_norm(x, s2, a2))
    x = x + self_attention(state, name + "attn", affine_norm(state, name + "norm1", x), heads)
    if conditioning == "cross_attention":
        h = affine_norm(state, name + "norm_cross", x)
        q = linear(state, name + "cross_attn.q", h)
        k, v = linear(state, name + "cross_attn.k", c), linear(state, name + "cross_attn.v", c)
        x = x + linear(state, name + "cross_attn.proj", softmax_attention(q, k, v, heads, mask))
    return x + mlp(state, name + "mlp", affine_norm(state, name + "norm2", x))


def position_table(width, rows, columns):
    table = torch.zeros(rows, columns, width, dtype=torch.float64)
    quarter = width // 4
    for i in range(quarter):
        frequency = 1 / 10000 ** (i / quarter)
        for row in range(rows):
            for column in range(columns):
                table[row, column, i] = math.sin(column * frequency)
                table[row, column, quarter + i] = math.cos(column * frequency)
                table[row, column, 2 * quarter + i] = math.sin(row * frequency)
                table[row, column, 3 * quarter + i] = math.cos(row * frequency)
    return table.reshape(1, rows * columns, width).float()


def model(state, x, t, y, heads, conditioning="adaln_zero", mask=None):
    """The whole network in the dtype of the state; y are labels (N,), a text (N, S, E), or None."""
    weight = state["x_embedder.proj.weight"]
    width, channels, p, _ = weight.shape
    n, _, height, columns = x.shape
    patches = x.reshape(n, channels, height // p, p, columns // p, p).permute(0, 2, 4, 1, 3, 5)
    tokens = patches.reshape(n, -1, channels * p * p) @ weight.reshape(width, -1).T
    tokens = tokens + state["x_embedder.proj.bias"]
    tokens = tokens + position_table(width, height // p, columns // p).to(weight.dtype)

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    time = torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype)
    time = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", time)))
    if y is not None and y.ndim == 3:
        c = torch.cat([time[:, None], linear(state, "y_embedder.proj", y)], 1)
    else:
        parts = [time] if y is None else [time, state["y_embedder.embedding_table.weight"][y]]
        c = sum(parts) if conditioning.startswith("adaln") else torch.stack(parts, 1)
    if mask is not None:
        mask = torch.cat([torch.ones(n, 1, dtype=torch.bool), mask], 1)
    count = tokens.shape[1]
    if conditioning == "in_context":
        tokens = torch.cat([tokens, c], 1)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        tokens = block(state, f"blocks.{i}.", tokens, c, heads, conditioning, mask)
    tokens = tokens[:, :count]
    if conditioning.startswith("adaln"):
        shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
        tokens = modulated_norm(tokens, shift, scale)
    else:
        tokens = affine_norm(state, "final_layer.norm_final", tokens)
    pixels = linear(state, "final_layer.linear", tokens)
    pixels = pixels.reshape(n, height // p, columns // p, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(n, -1, height, columns)
