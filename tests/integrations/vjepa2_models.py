"""Small VJEPA2 models of transformers, what they are called with, and every number that comes out."""

import copy

import torch
from torch import Tensor, nn

from jepa_kernels.testing import hold

SMALL = dict(
    hidden_size=64,
    num_attention_heads=2,
    num_hidden_layers=2,
    crop_size=32,
    patch_size=8,
    frames_per_clip=4,
    pred_hidden_size=32,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=2,
    pred_num_mask_tokens=3,
    pred_zero_init_mask_tokens=False,
    num_pooler_layers=1,
    initializer_range=0.15,  # so that every part shows in the output
)
PATCHES = 32  # of a clip [4, 3, 32, 32]


def small(kind: str = "VJEPA2Model", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.VJEPA2Config(**{**SMALL, **changes})).to(dtype).eval()
    for x in model.parameters():  # norms and biases start as ones and zeros, which hide faults
        if x.dim() == 1:
            x.data.add_(0.1 * torch.randn(x.shape))
    return model


def clips(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def masks(context: int = 11, target: int = 9, batch: int = 2, seed: int = 2, patches: int = PATCHES):
    """Ids of context and target [B, K], increasing, apart from each other."""
    drawn = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([torch.randperm(patches, generator=drawn) for _ in range(batch)])
    return shuffled[:, :context].sort(1).values, shuffled[:, context : context + target].sort(1).values


def arguments() -> dict[str, list[Tensor]]:
    context, target = masks()
    return dict(context_mask=[context], target_mask=[target])


def outputs(model: nn.Module, pixels: Tensor, **arguments) -> dict[str, Tensor]:
    out = model(pixels, **arguments)
    if "logits" in out:
        return {"logits": out.logits}
    found = {"last": out.last_hidden_state, "masked": out.masked_hidden_state}
    if out.predictor_output is not None:
        found["predicted"] = out.predictor_output.last_hidden_state
        found["target"] = out.predictor_output.target_hidden_state
    return {name: x for name, x in found.items() if x is not None}


def numbers(model: nn.Module, pixels: Tensor, run=outputs, **arguments) -> dict[str, Tensor]:
    """Outputs, and gradients of their products with drawn weights: of the pixels, and module by module.

    Weight and bias of a module come side by side: the gradient of a key's bias may be zero, and its error is then
    that of the weight's size.
    """
    pixels = pixels.detach().requires_grad_()
    model.zero_grad()
    found = run(model, pixels, **arguments)
    drawn = torch.Generator().manual_seed(3)
    sum((x * torch.randn(x.shape, generator=drawn).to(x.dtype)).sum() for x in found.values()).backward()
    found["pixels"] = pixels.grad
    for name, module in model.named_modules():
        grads = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        if grads:
            found[f"d {name}"] = torch.cat(grads)
    return {name: x.detach() for name, x in found.items()}


def exactly(model: nn.Module, pixels: Tensor, run=outputs, **arguments) -> dict[str, Tensor]:
    """The same of the model itself in float64."""
    return numbers(copy.deepcopy(model).double(), pixels.double(), run, **arguments)


def assert_within_budget(actual: dict[str, Tensor], exact: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    assert actual.keys() == exact.keys() == own.keys()
    parities = [hold(name, actual[name], exact[name], own[name]) for name in exact]
    assert not [str(parity) for parity in parities if not parity.ok]
