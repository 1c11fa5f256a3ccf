"MLX on a Linux CPU, with the matrix products of PyTorch in place of the reference BLAS that its package brings: 50 times as fast"
import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

def fast_blas():
    "To be called before MLX is imported, which then finds PyTorch's `cblas_sgemm` first; elsewhere nothing happens"
    found = find_spec('torch')
    if sys.platform != 'linux' or not found or 'mlx.core' in sys.modules: return
    library = Path(found.origin).parent/'lib'/'libtorch_cpu.so'
    if library.exists(): ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
