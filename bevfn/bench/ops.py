"""The ops of `bevfn bench ops`: sparse and deformable convolution, voxel pooling and deformable attention against peers
and the machine.
"""

from pathlib import Path

from bevfn.bench import attention, deform, machine, pool, sparse


def measure(frame: Path | None = None) -> dict:
    """Figures of every op, and the machine's limits of the same run; sparse convolution with one thread.

    frame: folder of a key frame, of whose points and cameras the sizes are; None: what stands for one in each file.
    """
    return {
        "gemm_gflops": machine.gemm_gflops(),
        "copy_gbps": machine.copy_gbps(),
        "frame": None if frame is None else str(frame),
        "sparse": sparse.measure(frame),
        "voxel_pool": pool.measure(frame),
        "deform_conv": deform.measure(),
        "deform_attn": attention.measure(frame),
    }
