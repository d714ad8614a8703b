"""Tiles of attention for each family of GPUs, and where PyTorch's own kernel is the faster one.

A table of tiles: family of GPUs -> width of the head as padded -> what one program of the kernel takes on; a
row serves all widths up to its own. Tables are laid over one another row by row (`attention.tiles_for`).
`python -m benchmarks.gpu.tiles` rewrites rows from measurements, so each has a line, and says at its end how
it was found. Until they are measured they are chosen by compiling ahead of time: no spills, shared memory
within the device's, and of those the most queries, because each program reads all keys.

    sm_80   and sm_86 for 8.6 and 8.9 (99 KiB of shared memory): copies by cp.async, products from registers.
            The accumulator and the scores of 128 x 64 need eight warps; at a width of 64 four have room on
            sm_80, and each then reads the keys for twice as many queries.
    sm_90   copies by TMA, products from shared memory; 128 keys at a time, two stages of 64 KiB at a width of
            128.
    sm_100  both products in tensor memory. At a width of 128 the loop is split among specialised warps, with
            64 keys at a time: two segments with 128 spill.
    sm_120  TMA, but the matrix instructions and the shared memory of sm_86.
    gfx942  has 64 KiB of LDS, gfx950 has 160; four warps of 64 lanes.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """One program's share, and how it is compiled."""

    BLOCK_N: int  # queries
    BLOCK_M: int  # keys at a time
    num_warps: int
    num_stages: int
    WARP_SPECIALIZE: bool = False


TILES = {
    "sm_80": {
        48: Tile(128, 32, 4, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        64: Tile(128, 64, 4, 3),  # compiled: no spills with Triton 3.6, 3.9
        80: Tile(128, 64, 8, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 64, 8, 3),  # compiled: no spills with Triton 3.6, 3.9
        160: Tile(128, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_86": {
        48: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        64: Tile(128, 64, 8, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        80: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        128: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        160: Tile(128, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_90": {
        128: Tile(128, 128, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        160: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_100": {
        64: Tile(128, 128, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        80: Tile(128, 128, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 64, 8, 3, WARP_SPECIALIZE=True),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        160: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_120": {
        64: Tile(128, 64, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
        80: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        160: Tile(128, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
    "gfx942": {
        80: Tile(128, 64, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
        128: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        160: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 4, 1),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "gfx950": {
        80: Tile(128, 64, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
        128: Tile(128, 64, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
        160: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
        256: Tile(64, 32, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
}
# One segment of queries over two of keys, where the tile above spills.
TWO_KEY_SEGMENTS_TILES = {
    "sm_80": {
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.6, 3.9
    },
    "sm_86": {
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.6, 3.9
    },
}
# The diagonal and a second accumulator take registers of their own.
CAUSAL_OR_SUMMED_TILES = {
    "sm_80": {
        64: Tile(64, 64, 4, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
    "sm_86": {
        64: Tile(64, 64, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
    "sm_90": {
        64: Tile(128, 64, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_100": {
        160: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_120": {
        64: Tile(64, 64, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        128: Tile(128, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
        256: Tile(64, 32, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
    "gfx942": {
        128: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 4, 1),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "gfx950": {
        128: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 32, 4, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
}
# Summed, where the tile of a causal one spills.
SUMMED_TILES = {
    "sm_80": {
        160: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_86": {
        160: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
    "sm_90": {
        64: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        160: Tile(128, 32, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_100": {
        64: Tile(64, 64, 4, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        160: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "sm_120": {
        160: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.6, 3.9
    },
}
# Triton before 3.6 needs more registers for the same: in place of the rows above, of two segments too.
TILES_BEFORE_3_6 = {
    "sm_80": {
        64: Tile(128, 64, 8, 3),  # compiled: no spills with Triton 3.4
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4
        160: Tile(128, 16, 8, 2),  # compiled: no spills with Triton 3.4
    },
    "sm_86": {
        80: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4
        160: Tile(128, 16, 8, 2),  # compiled: no spills with Triton 3.4
    },
    "sm_120": {
        64: Tile(128, 64, 8, 2),  # compiled: no spills with Triton 3.4
        128: Tile(128, 32, 8, 3),  # compiled: no spills with Triton 3.4
        160: Tile(128, 16, 8, 2),  # compiled: no spills with Triton 3.4
        256: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.4
    },
    "gfx942": {
        80: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4
    },
    "gfx950": {
        80: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4
        128: Tile(128, 32, 4, 2),  # compiled: no spills with Triton 3.4
        160: Tile(128, 32, 4, 1),  # compiled: no spills with Triton 3.4
        256: Tile(64, 32, 4, 1),  # compiled: no spills with Triton 3.4
    },
}
CAUSAL_OR_SUMMED_TILES_BEFORE_3_6 = {
    "sm_80": {
        256: Tile(32, 32, 8, 3),  # compiled: no spills with Triton 3.4
    },
    "sm_86": {
        48: Tile(64, 64, 8, 2),  # compiled: no spills with Triton 3.4
        160: Tile(64, 16, 8, 2),  # compiled: no spills with Triton 3.4
        256: Tile(32, 32, 8, 3),  # compiled: no spills with Triton 3.4
    },
    "sm_120": {
        128: Tile(64, 64, 8, 2),  # compiled: no spills with Triton 3.4
        160: Tile(64, 16, 8, 1),  # compiled: no spills with Triton 3.4
        256: Tile(32, 32, 8, 2),  # compiled: no spills with Triton 3.4
    },
    "gfx950": {
        256: Tile(64, 32, 4, 1),  # compiled: no spills with Triton 3.4
    },
}
# fp32 without TF32: NVIDIA's matrix units do not have it, and the products are unrolled multiply-adds.
FP32_TILES = {
    "sm": {
        128: Tile(32, 32, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(32, 16, 8, 2),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
    "gfx": {
        128: Tile(64, 32, 4, 1),  # compiled: no spills with Triton 3.4, 3.6, 3.9
        256: Tile(32, 32, 4, 1),  # compiled: no spills with Triton 3.4, 3.6, 3.9
    },
}

# Where PyTorch's own kernel is expected to be faster, "auto" takes it: family -> head widths, for one segment
# in half precision. From published figures, not from measurements of ours.
STOCK = {
    "sm_80": (64, 128),  # FlashAttention 2, written for this device
    "sm_86": (64, 128),  # the same
    "sm_90": (64, 128),  # cuDNN, 1.4 times what Triton reaches
    "sm_100": (64, 128),  # cuDNN, twice what Triton reaches
    "sm_120": (64, 128),  # FlashAttention 2
    "gfx942": (64, 128),  # AOTriton, tuned on this device
    "gfx950": (64, 128),  # the same
}
# There it is only where PyTorch takes cuDNN: FlashAttention 2 is not made for these.
STOCK_BY_CUDNN = ("sm_90", "sm_100")
# PyTorch's lead pays for copying two segments into one from about this many keys on: the copies take 12 D
# bytes per token, the lead saves its share of 4 D keys operations per token. cuDNN's is a third or more. The
# others' is not known so well, but at 4096 keys a tenth pays (on AMD's a fifth), at 9292 half of that.
STOCK_SEGMENTS = {
    "sm_80": 4096,  # computed
    "sm_86": 4096,  # computed
    "sm_90": 2048,  # computed
    "sm_100": 2048,  # computed
    "sm_120": 4096,  # computed
    "gfx942": 4096,  # computed
    "gfx950": 4096,  # computed
}
