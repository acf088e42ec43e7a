"""Rotary embeddings: the table of rotations, and weights reordered so that one kind of rotation serves all models.

Llama-like checkpoints rotate dimension i with i + d/2, DeepSeek's rotate 2i with 2i + 1. Attention only sees dot products of
queries and keys, so the same reordering of both changes nothing: all weights are brought to neighbouring pairs at load.
"""

import math

import torch
from torch import Tensor

from workers.model_config import RopeConfig


def rotation_table(rope: RopeConfig, max_position: int, device: torch.device) -> Tensor:
    """[max_position, dim / 2, 2] float32: cosine and sine of each position and pair, with YaRN's attention factor in them."""
    angles = torch.arange(max_position, dtype=torch.float32).unsqueeze(1) * _frequencies(rope)
    table = torch.stack((angles.cos(), angles.sin()), -1)
    return table.mul_(_attention_factor(rope)).to(device)


def softmax_scale(rope: RopeConfig, head_dim: int) -> float:
    """1 / sqrt(head_dim), with YaRN's `mscale_all_dim` squared where a config has it (DeepSeek)."""
    scale: float = head_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def pair_neighbours(weight: Tensor, rope: RopeConfig) -> Tensor:
    """Reorder rows so that rotated pairs are neighbours.

    weight  [heads, head_dim, ...]; the last rope.dim rows of each head are rotated
    """
    if rope.interleaved:
        return weight
    kept, rotated = weight.split_with_sizes((weight.shape[1] - rope.dim, rope.dim), 1)
    halves = torch.unflatten(rotated, 1, (2, -1))
    return torch.cat((kept, halves.transpose(1, 2).flatten(1, 2)), 1)


def _frequencies(rope: RopeConfig) -> Tensor:
    """[dim / 2] float32: radians per position."""
    powers = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    plain = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, powers)
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Short waves stay, long ones are stretched by `factor`, those between are blended."""
    wavelength = 2 * math.pi / plain
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    is_long = wavelength > rope.original_max_position / rope.low_freq_factor
    is_short = wavelength < rope.original_max_position / rope.high_freq_factor
    return torch.where(is_short, plain, torch.where(is_long, plain / rope.factor, blended))


def _yarn(rope: RopeConfig, powers: Tensor) -> Tensor:
    """Dimensions that turn often stay, those that turn less than once are stretched, with a ramp between."""

    def dimension_turning(times: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001
    stretched_share = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept_share = 1 - stretched_share
    return 1.0 / (rope.factor * powers) * (1 - kept_share) + 1.0 / powers * kept_share


def _attention_factor(rope: RopeConfig) -> float:
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
