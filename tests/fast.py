"Imported before MLX: on Linux it then computes its matrix products with PyTorch's, which are 50 times as fast as its own"
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from blas import fast_blas

fast_blas()
