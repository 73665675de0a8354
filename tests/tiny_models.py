"""Small random models and packed streams that several test files share."""

import torch
import torch.distributed as dist

from kernels import token_logps
from model import Llama, LlamaConfig
from plumbing import parallel

LENGTHS = (7, 1, 12, 3)  # documents of a stream: odd, and one that is a single token
# what a config says of norms that are not Llama's
QWEN3 = dict(model_type="qwen3", qk_norm="head")
OLMO2 = dict(model_type="olmo2", qk_norm="width", post_norm=True)


def tiny_config(**changes):
    """A Llama of 3 layers with grouped heads and a head size that is not D / H."""
    shape = dict(vocab_size=97, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=12, max_position_embeddings=128)  # fmt: skip
    return LlamaConfig(**shape | changes)


@torch.no_grad()
def random_llama(config, seed=0, std=0.2):
    """Every parameter random, biases and norms too: a zero bias or a norm of one would hide that it is not
    used.
    """
    model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.copy_(torch.randn(param.shape, generator=generator) * std + (1.0 if param.ndim == 1 else 0.0))
    return model


def random_documents(vocab_size, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def stream(documents):
    """(input_ids, position_ids, cu_seqlens, max_seqlen) of documents laid end to end: the arguments of
    Llama.forward.
    """
    lengths = torch.tensor([len(d) for d in documents])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return torch.cat(documents), torch.cat([torch.arange(n) for n in lengths]), cu_seqlens, int(lengths.max())


def next_token_targets(documents):
    """Each document's ids shifted by one, -100 at its last position: (T,)."""
    return torch.cat([torch.cat((d[1:], torch.tensor([-100]))) for d in documents])


def nll_sum(model, documents, **kwargs):
    """Summed next-token negative log-likelihood of the documents, through one packed forward."""
    hidden = model(*stream(documents), **kwargs)
    return -token_logps(hidden, model.lm_head.weight, next_token_targets(documents)).sum()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(tensors):
    """{name: a copy with the rows of all ranks, where it is split}, of tensors of one mesh.

    One sum over ranks, in float64, which holds all values: a gather of each tensor alone takes 4 ms.
    """
    split = {name: tensor for name, tensor in tensors.items() if parallel.is_sharded(tensor)}
    found = {name: tensors[name].detach().clone() for name in tensors.keys() - split.keys()}
    if not split:
        return found
    sums = torch.zeros(sum(tensor.numel() for tensor in split.values()), dtype=torch.float64)
    parts = sums.split([tensor.numel() for tensor in split.values()])
    for part, tensor in zip(parts, split.values(), strict=True):
        first, local = parallel.local_rows(tensor)
        part.view(tensor.shape)[first : first + len(local)] = local
    mesh = tensor.device_mesh
    # The last dimension of the mesh splits rows; another one holds copies.
    dist.all_reduce(sums, group=mesh.get_group(mesh.ndim - 1))
    for part, (name, tensor) in zip(parts, split.items(), strict=True):
        found[name] = part.view(tensor.shape).to(tensor.dtype)
    return found


def relative_error(a, b):
    """Largest absolute difference over the largest magnitude of b."""
    return ((a - b).abs().max() / b.abs().max()).item()
