"A Python that a notebook starts with this folder in PYTHONPATH has the products of `tools/blas.py`, from its import of MLX on"
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Core:
    "Finds mlx.core, once"
    def find_spec(self, name, path=None, target=None):
        if name != 'mlx.core': return None
        sys.meta_path.remove(self)
        sys.path.append(str(Path(__file__).parents[1]))
        from blas import fast_blas, fast_products
        sys.path.pop()
        fast_blas()
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            fast_products()
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Core())
