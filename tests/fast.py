"""Imported before MLX: with OPTIQ_BLAS=torch it computes its matrix products on Linux with PyTorch's, 50 times as fast

`make test` sets it for all files but one, whose caches are compared to a digit that the order of a sum decides.
"""
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from blas import fast_blas

if os.environ.get('OPTIQ_BLAS') == 'torch': fast_blas()
