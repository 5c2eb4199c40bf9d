"""Layers as other libraries put them into the places of linear ones."""

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Integers(nn.Module):
    """As quantisers write it: the weights are no parameters, `weight` is a method, inputs are float32 alone."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer("values", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def weight(self):
        return self.values.float() * self.scale

    def forward(self, x):
        return F.linear(x, self.weight())
