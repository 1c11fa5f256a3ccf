"MLX on a Linux CPU with the matrix products of PyTorch, in place of the reference BLAS that its package brings: 50 times as fast"
import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

def fast_blas():
    "To be called before MLX is imported, which then finds PyTorch's `sgemm_` first; elsewhere nothing happens"
    found = find_spec('torch')
    if sys.platform != 'linux' or not found or 'mlx.core' in sys.modules: return
    path = str(Path(found.origin).parent/'lib'/'libtorch_cpu.so')
    os.environ.setdefault('MKL_CBWR', 'AUTO,STRICT')
    try: usable = adds_in_one_order(ctypes.CDLL(path).sgemm_)
    except (OSError, AttributeError): return
    if usable: ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

def adds_in_one_order(sgemm) -> bool:
    "Whether a row of a product is the same with and without other rows, as with the reference BLAS: tests of caches need that"
    r = np.random.default_rng(0)
    a, b = (r.standard_normal((n, 96)).astype(np.float32) for n in (50, 128))
    def product(x): # x @ b.T
        out, one, zero = np.empty((len(x), len(b)), np.float32), ctypes.c_float(1), ctypes.c_float(0)
        n, m, k = (ctypes.byref(ctypes.c_int(i)) for i in (len(b), *x.shape))
        b_at, x_at, out_at = (ctypes.c_void_p(v.ctypes.data) for v in (b, x, out))
        sgemm(b'T', b'N', n, m, k, ctypes.byref(one), b_at, k, x_at, k, ctypes.byref(zero), out_at, n)
        return out
    return (product(a) == np.concatenate([product(row[None]) for row in a])).all()
