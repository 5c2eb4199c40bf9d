"""Building blocks of the models, with the published parameter names. They call public ops and hold no dispatch."""

from jepa_kernels.nn.action_predictor import ActionPredictor
from jepa_kernels.nn.attention import Attention
from jepa_kernels.nn.batch_norm import BatchNorm1d
from jepa_kernels.nn.block import MLP, Block, compile_blocks
from jepa_kernels.nn.ema import EMA
from jepa_kernels.nn.encoder import Encoder
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.modulation import Modulation, modulate
from jepa_kernels.nn.patch_embed import PatchEmbed
from jepa_kernels.nn.pooler import AttentiveClassifier, AttentivePooler
from jepa_kernels.nn.predictor import Predictor
from jepa_kernels.nn.sigreg import SIGReg

__all__ = [
    "EMA",
    "MLP",
    "ActionPredictor",
    "Attention",
    "AttentiveClassifier",
    "AttentivePooler",
    "BatchNorm1d",
    "Block",
    "Encoder",
    "Linear",
    "Modulation",
    "PatchEmbed",
    "Predictor",
    "SIGReg",
    "compile_blocks",
    "modulate",
]
