"""Names and shapes of the tensors in published files, written out from their sources."""

# Of a block: the module's name in each layout, and its shape. D is the width, M the hidden width.
META = {
    "norm1": "D", "attn.qkv": "3D D", "attn.proj": "D D", "norm2": "D", "mlp.fc1": "M D", "mlp.fc2": "D M",
}  # fmt: skip
VJEPA2 = {
    "norm1": "D", "attention.query": "D D", "attention.key": "D D", "attention.value": "D D", "attention.proj": "D D",
    "norm2": "D", "mlp.fc1": "M D", "mlp.fc2": "D M",
}  # fmt: skip
IJEPA = {
    "layernorm_before": "D", "attention.q_proj": "D D", "attention.k_proj": "D D", "attention.v_proj": "D D",
    "attention.o_proj": "D D", "layernorm_after": "D", "mlp.fc1": "M D", "mlp.fc2": "D M",
}  # fmt: skip
IJEPA_OLD = {
    "layernorm_before": "D", "attention.attention.query": "D D", "attention.attention.key": "D D",
    "attention.attention.value": "D D", "attention.output.dense": "D D", "layernorm_after": "D",
    "intermediate.dense": "M D", "output.dense": "D M",
}  # fmt: skip
POOLER = {
    "layer_norm1": "D", "self_attn.q_proj": "D D", "self_attn.k_proj": "D D", "self_attn.v_proj": "D D",
    "self_attn.out_proj": "D D", "layer_norm2": "D", "mlp.fc1": "M D", "mlp.fc2": "D M",
}  # fmt: skip
CROSS = {"norm1": "D", "xattn.q": "D D", "xattn.kv": "2D D", "norm2": "D", "mlp.fc1": "M D", "mlp.fc2": "D M"}
CROSS_HF = {
    "layer_norm1": "D", "cross_attn.q_proj": "D D", "cross_attn.k_proj": "D D", "cross_attn.v_proj": "D D",
    "layer_norm2": "D", "mlp.fc1": "M D", "mlp.fc2": "D M",
}  # fmt: skip


def modules(prefix, named, width, hidden):
    """{name of a weight or bias: its shape} of the modules of one block."""
    sizes = {"D": width, "2D": 2 * width, "3D": 3 * width, "M": hidden}
    found = {}
    for name, shape in named.items():
        weight = tuple(sizes[s] for s in shape.split())
        found |= {f"{prefix}.{name}.weight": weight, f"{prefix}.{name}.bias": weight[:1]}
    return found


def blocks(prefix, depth, named, width, hidden):
    found = {}
    for i in range(depth):
        found |= modules(f"{prefix}.{i}", named, width, hidden)
    return found


def affine(name, *weight):
    """A weight of this shape and the bias of its first axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def meta_encoder(width, depth, hidden, kernel, table=None):
    found = affine("patch_embed.proj", width, 3, *kernel) | affine("norm", width)
    found |= {} if table is None else {"pos_embed": (1, table, width)}
    return found | blocks("blocks", depth, META, width, hidden)


def meta_predictor(width, depth, tokens, own=384, table=None):
    """tokens: how many are listed; None: the one of I-JEPA."""
    found = affine("predictor_embed", own, width) | affine("predictor_norm", own) | affine("predictor_proj", width, own)
    listed = {f"mask_tokens.{i}": (1, 1, own) for i in range(tokens or 0)}
    found |= {"mask_token": (1, 1, own)} if tokens is None else listed
    found |= {} if table is None else {"predictor_pos_embed": (1, table, own)}
    return found | blocks("predictor_blocks", depth, META, own, 4 * own)


def huggingface_vjepa2(width, depth, hidden, kernel, predictor_depth=12, own=384, tokens=10):
    encoder, embeddings = "encoder.embeddings.patch_embeddings.proj", "predictor.embeddings"
    found = affine(encoder, width, 3, *kernel) | affine("encoder.layernorm", width)
    found |= blocks("encoder.layer", depth, VJEPA2, width, hidden)
    found |= affine(f"{embeddings}.predictor_embeddings", own, width)
    found |= {f"{embeddings}.mask_tokens": (tokens, 1, 1, own)}
    found |= affine("predictor.layernorm", own) | affine("predictor.proj", width, own)
    return found | blocks("predictor.layer", predictor_depth, VJEPA2, own, 4 * own)


def huggingface_probe(width, hidden, classes, depth=3):
    found = {"pooler.query_tokens": (1, 1, width)} | affine("classifier", classes, width)
    found |= modules("pooler.cross_attention_layer", CROSS_HF, width, hidden)
    return found | blocks("pooler.self_attention_layers", depth, POOLER, width, hidden)


def meta_probe(width, hidden, classes, depth=3):
    found = {"pooler.query_tokens": (1, 1, width)} | affine("linear", classes, width)
    found |= modules("pooler.cross_attention_block", CROSS, width, hidden)
    return found | blocks("pooler.blocks", depth, META, width, hidden)


def huggingface_ijepa(width, depth, hidden, kernel, table, old=False):
    found = {"embeddings.position_embeddings": (1, table, width)} | affine("layernorm", width)
    found |= affine("embeddings.patch_embeddings.projection", width, 3, *kernel)
    prefix, named = ("encoder.layer", IJEPA_OLD) if old else ("layers", IJEPA)
    return found | blocks(prefix, depth, named, width, hidden)


def timm(width, depth, hidden, kernel, table, norm="norm", classes=None):
    found = affine("patch_embed.proj", width, 3, *kernel) | affine(norm, width) | {"pos_embed": (1, table, width)}
    found |= {} if classes is None else affine("head", classes, width)
    return found | blocks("blocks", depth, META, width, hidden)


def modalities(width):
    return {"img_mod_embed": (1, 1, width), "video_mod_embed": (1, 1, width)}


def meta_encoder_2_1(width, depth, hidden):
    found = affine("patch_embed.proj", width, 3, 2, 16, 16) | affine("patch_embed_img.proj", width, 3, 1, 16, 16)
    for i in range(4):
        found |= affine(f"norms_block.{i}", width)
    return found | modalities(width) | blocks("blocks", depth, META, width, hidden)


def meta_predictor_2_1(width, depth, levels, out, own=384):
    found = affine("predictor_embed", own, width)
    if levels > 1:
        found = affine("predictor_embed.0", width, levels * width) | affine("predictor_embed.2", own, width)
    found |= affine("predictor_norm", own) | modalities(own)
    found |= affine("predictor_proj", out, own) | affine("predictor_proj_context", out, own)
    found |= {f"mask_tokens.{i}": (1, 1, own) for i in range(8)}
    return found | blocks("predictor_blocks", depth, META, own, 4 * own)
