"""The ops of `bevfn bench ops`: sparse and deformable convolution, voxel pooling and deformable attention against peers
and the machine.
"""

from bevfn.bench import attention, deform, machine, pool, sparse


def measure() -> dict:
    """Figures of every op, and the machine's limits of the same run; sparse convolution with one thread."""
    return {
        "gemm_gflops": machine.gemm_gflops(),
        "copy_gbps": machine.copy_gbps(),
        "sparse": sparse.measure(),
        "voxel_pool": pool.measure(),
        "deform_conv": deform.measure(),
        "deform_attn": attention.measure(),
    }
