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

def fast_products(weights=400): # how many unpacked weights are kept
    """MLX on a Linux CPU with float32 in products that it computes 3 to 400 times as slowly itself

    These are the products of bfloat16 or float16, and those with a packed weight. Their sums are then float32, as on a
    GPU, and only the result is rounded; MLX's own loops on a CPU round each partial sum. A packed weight is unpacked by
    MLX and kept as long as its bytes cannot change: what is kept shares them, so that MLX writes a change elsewhere.
    """
    import mlx.core as mx
    if sys.platform != 'linux': return
    half, kept = (mx.bfloat16, mx.float16), {}
    packed, matmul, addmm, attend = mx.quantized_matmul, mx.matmul, mx.addmm, mx.fast.scaled_dot_product_attention
    def up(x): return x.astype(mx.float32)
    def place(x): # ▸ what tells its numbers from those of all other arrays, while it is there
        at = np.asarray(x.view(mx.uint16) if x.dtype in half else x).__array_interface__
        return at['data'][0], at['strides'], x.shape, x.dtype
    def halves(*xs): return xs[0].dtype in half and all(x.dtype == xs[0].dtype for x in xs)
    def product(a, b, **options):
        return matmul(up(a), up(b), **options).astype(a.dtype) if halves(a, b) else matmul(a, b, **options)
    def sum_and_product(c, a, b, *args, **options):
        if not halves(c, a, b): return addmm(c, a, b, *args, **options)
        return addmm(up(c), up(a), up(b), *args, **options).astype(c.dtype)
    def attention(q, k, v, **options):
        return attend(*map(up, (q, k, v)), **options).astype(q.dtype) if halves(q, k, v) else attend(q, k, v, **options)
    def unpacked(w, scales, biases, how):
        def made(): return mx.dequantize(w, up(scales), up(biases), **how)
        if w.ndim > 2: return made() # a cache, which grows
        parts = w, scales, biases
        try: key = *map(place, parts), *how.items()
        except (RuntimeError, ValueError): return made() # while a function is traced
        if key not in kept:
            if len(kept) >= weights: kept.pop(next(iter(kept)))
            kept[key] = made(), [x[None] for x in parts]
            mx.eval(kept[key])
        return kept[key][0]
    def packed_product(x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None, mode='affine', **options):
        how = dict(group_size=group_size, bits=bits)
        if mode != 'affine' or biases is None or scales.dtype not in (mx.float32, *half):
            return packed(x, w, scales, biases, transpose, mode=mode, **how, **options)
        dense = unpacked(w, scales, biases, how)
        return matmul(up(x), dense.swapaxes(-1, -2) if transpose else dense).astype(x.dtype)
    mx.quantized_matmul, mx.matmul, mx.array.__matmul__, mx.addmm = packed_product, product, product, sum_and_product
    mx.fast.scaled_dot_product_attention = attention

def keep_memory():
    "Freed memory stays with the process on Linux, so that the next tensor need not ask for it, page by page"
    if sys.platform != 'linux': return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    for option, size in ((-3, 2**25), (-1, 2**30), (-2, 2**26)): # from where on apart, kept at the end, asked for at once
        if mallopt: mallopt(option, size)
